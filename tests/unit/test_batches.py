"""Many rows together give what each row gives by itself: token ids, verdicts, and the first error."""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Json, List, Value, are_progress_bars_disabled
from huggingface_hub.utils import are_progress_bars_disabled as hub_is_off
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

import tiny
import tokenizer_kinds
from holdfast.data import batch_tokenizer
from holdfast.data.batch_tokenizer import BatchTokenizer, EncodedPair
from holdfast.data.columns import TOKENIZED_COLUMNS
from holdfast.data.formats import read_preference
from holdfast.data.prepare import prepare_dataset
from holdfast.data.progress import bars
from holdfast.data.tokenize import TokenizedPair, tokenize
from holdfast.data.usability import UNUSABLE_REASONS, unusable_reason
from holdfast.data.verdicts import USABLE, Judge

Row = dict[str, Any]
MESSAGES = tiny.preference_rows(12)
TOOLS = [{"type": "function", "function": {"name": "tides", "parameters": {"day": "Monday"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "tides"}]}


def text(messages: list[Row]) -> str:
    return " ".join(message["content"] for message in messages)


ROWS: dict[str, list[Row]] = {
    "messages": MESSAGES,
    "implicit prompt": [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in MESSAGES],
    "text": [{side: text(row[side]) for side in row} for row in MESSAGES],
    "implicit text": [
        {side: text(row["prompt"]) + " " + text(row[side]) for side in ("chosen", "rejected")} for row in MESSAGES
    ],
    "text that merges": [{"prompt": "He measured the ", "chosen": "water", "rejected": "smoke"}] * 3,
    "tools": [{**row, "tools": TOOLS if n % 2 else []} for n, row in enumerate(MESSAGES)],
    "tools as JSON": [{**row, "tools": json.dumps(TOOLS)} for row in MESSAGES],
    "template variables": [{**row, "chat_template_kwargs": {"style": "dry"}} for row in MESSAGES],
    "tool calls": [{**row, "prompt": [*row["prompt"], CALL, {"role": "tool", "content": "ebb"}]} for row in MESSAGES],
    "reasoning": [{**row, "chosen": [{**row["chosen"][0], "reasoning": "Hm."}]} for row in MESSAGES],
    "special tokens in some": [
        {**row, "prompt": [{"role": "user", "content": f"{n} {tiny.END}" if n % 3 else "No"}, *row["prompt"]]}
        for n, row in enumerate(MESSAGES)
    ],
}
TEMPLATES = {
    "ChatML": tiny.CHAT_TEMPLATE,
    "a prompt that is no prefix": tiny.CHAT_TEMPLATE + "{% if add_generation_prompt %}<think></think>{% endif %}",
    "without special tokens": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} {% endfor %}",
    "its own names of tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m['content'] }}<|im_end|>{% endfor %}",
}


@functools.cache
def made(kind: str) -> PreTrainedTokenizerFast:
    return tokenizer_kinds.KINDS[kind][0]()


def check(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    preferences = [read_preference(row) for row in rows]
    found = BatchTokenizer(tokenizer, None)(preferences)
    assert found == [EncodedPair.of(tokenize(preference, tokenizer)) for preference in preferences]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_token_ids_of_every_row(rows: list[Row], template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one row is looked at by itself but those that spell out special tokens."""
    monkeypatch.setattr(batch_tokenizer, "NUM_COMPARED", 0)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    check(rows, tokenizer)


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
@pytest.mark.parametrize("rows", ["messages", "text", "special tokens in some"])
def test_token_ids_of_every_tokenizer(kind: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_tokenizer, "NUM_COMPARED", 0)
    check(ROWS[rows], made(kind))


def test_token_ids_where_transformers_has_moved_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_tokenizer, "compiled_template", lambda *_: None)
    monkeypatch.setattr(batch_tokenizer, "NUM_COMPARED", 0)
    check(MESSAGES, tiny.tokenizer())


def test_a_batch_that_would_differ_is_tokenized_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of many rows is compared with that of one before it is trusted."""
    monkeypatch.setattr(BatchTokenizer, "_compiled_template", property(lambda _: lambda **_: "something else"))
    check(MESSAGES, tiny.tokenizer())


def test_a_tokenizer_that_renders_in_a_way_of_its_own() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, *args, **kwargs):  # type: ignore[override]
            return super().apply_chat_template([*conversation, *conversation], *args, **kwargs)

    tokenizer = Own(tokenizer_object=tiny.tokenizer().backend_tokenizer, eos_token=tiny.END)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    check(MESSAGES, tokenizer)


@pytest.mark.parametrize(
    ("name", "num_proc"),
    [
        ("messages", None),
        ("implicit prompt", None),
        ("implicit text", None),
        ("tools", None),
        ("tool calls", None),
        ("special tokens in some", None),
        ("special tokens in some", 2),
    ],
)
def test_a_dataset_in_several_batches(name: str, num_proc: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 5; other columns stay, an implicit prompt is split off, and rows of a selection are those selected."""
    monkeypatch.setattr("holdfast.data.prepare._BATCH_ROWS", 5)
    monkeypatch.setattr("holdfast.data.prepare._JUDGED_ROWS", 5)
    rows = [{**row, "note": {"n": [n]}} for n, row in enumerate(ROWS[name])]
    data = Dataset.from_list(rows)
    chosen = [9, 3, 4, 0, 11, 2, 5]
    for part in (data, data.select(chosen)):
        kept = list(part)
        prepared = list(prepare_dataset(part, tiny.tokenizer(), num_proc=num_proc))
        for row, found in zip(kept, prepared, strict=True):
            pair = tokenize(read_preference(row), tiny.tokenizer())
            assert [found[column] for column in TOKENIZED_COLUMNS] == [getattr(pair, c) for c in TOKENIZED_COLUMNS]
            whole = (
                found if "prompt" in row else {**found, **{s: found["prompt"] + found[s] for s in row if s != "note"}}
            )
            assert {column: whole[column] for column in row} == row


def test_a_column_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of any shape, which Arrow holds as text."""
    sides = dict.fromkeys(("prompt", "chosen", "rejected"), List({"role": Value("string"), "content": Value("string")}))
    rows = [{**row, "chat_template_kwargs": {"style": ["dry", n]}} for n, row in enumerate(MESSAGES)]
    data = Dataset.from_list(rows, features=Features({**sides, "chat_template_kwargs": Json()}))
    assert data[1]["chat_template_kwargs"] == {"style": ["dry", 1]}
    for row, found in zip(rows, prepare_dataset(data, tiny.tokenizer()), strict=True):
        assert found["prompt_ids"] == tokenize(read_preference(row), tiny.tokenizer()).prompt_ids


FAULTS = {
    "raises": "{{ raise_exception('no tides') }}",
    "divides by zero": "{{ 1 // 0 }}",
    "has no such name": "{{ nothing.at.all }}",
    "has no such key": "{{ message['content']['x']['y'] }}",
    "adds what cannot be added": "{{ 1 + 'a' }}",
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("form", ["dataset", "stream", "workers"])
def test_the_row_that_a_template_fails_on_is_named(fault: str, form: str) -> None:
    """The first one, though a later row of the batch is malformed as well."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{% if message['content'] == 'tides' %}" + fault
    tokenizer.chat_template += "{% endif %}{{ message['content'] }}{% endfor %}"
    bad = {**MESSAGES[5], "prompt": [{"role": "user", "content": "tides"}]}
    data: Any = Dataset.from_list([*MESSAGES[:5], bad, {**MESSAGES[6], "chosen": []}, bad])
    if form == "stream":
        data = data.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"^train dataset, row 5: the chat template cannot render .*\['user'\]"):
        list(prepare_dataset(data, tokenizer, num_proc=1 if form == "workers" else None))


IDS = st.lists(st.integers(0, 3), max_size=5)


@given(
    st.lists(st.tuples(IDS, IDS, IDS), min_size=1, max_size=8),
    st.sampled_from([None, 2, 3, 4, 6]),
    st.sampled_from(["keep_start", "keep_end"]),
    st.sampled_from([pa.int32(), pa.int64(), pa.uint8()]),
    st.integers(0, 3),
)
def test_verdicts(rows: list[tuple], max_length: int | None, mode: Any, kind: pa.DataType, start: int) -> None:
    """Of whole columns and of slices of them, against the rule for one row."""
    judge = Judge(max_length=max_length, truncation_mode=mode, vocab_size=4, name="train")
    columns = {
        column: pa.chunked_array([pa.array([row[n] for row in part], pa.list_(kind)) for part in (rows[:2], rows[2:])])
        for n, column in enumerate(TOKENIZED_COLUMNS)
    }
    table = pa.table(columns).slice(start)
    expected = [
        unusable_reason(
            TokenizedPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, cut_ids=[]), max_length, mode
        )
        for prompt, chosen, rejected in rows[start:]
    ]
    found = judge.verdicts(table, start)
    assert [None if code == USABLE else UNUSABLE_REASONS[code] for code in found] == expected


@pytest.mark.parametrize("value", [None, [4, -1], [4, 9], [None, 1]])
def test_verdicts_name_the_row_with_wrong_ids(value: Any) -> None:
    judge = Judge(max_length=None, truncation_mode="keep_start", vocab_size=9, name="train")
    good = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    table = pa.Table.from_pylist([good, {**good, "chosen_ids": value}, {**good, "prompt_ids": [-7]}])
    with pytest.raises(ValueError, match=r"^train dataset, row 41: .*'chosen_ids'"):
        judge.verdicts(table, 40)
    assert np.array_equal(judge.verdicts(table[:1], 0), [USABLE])


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages go to a terminal, as far as anybody asks."""
    monkeypatch.setattr("holdfast.data.progress.is_terminal", lambda: True)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("num_proc", [None, 2])
def test_disable_tqdm_leaves_nothing_on_the_screen(num_proc: int | None, capfd: pytest.CaptureFixture[str]) -> None:
    data = Dataset.from_list(MESSAGES)
    prepare_dataset(data, tiny.tokenizer(), disable_tqdm=True, num_proc=num_proc)
    assert "%|" not in capfd.readouterr().err
    assert not are_progress_bars_disabled()
    prepare_dataset(data, tiny.tokenizer(), num_proc=num_proc)
    assert "Tokenizing train dataset" in capfd.readouterr().err


@pytest.mark.parametrize("num_proc", [None, 2])
def test_bars_that_redraw_a_line_are_not_shown_in_a_file(
    num_proc: int | None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook shows them."""
    data = Dataset.from_list(MESSAGES)
    prepare_dataset(data, tiny.tokenizer(), num_proc=num_proc)
    assert "%|" not in capfd.readouterr().err
    assert not are_progress_bars_disabled()
    monkeypatch.setattr("holdfast.data.progress.is_notebook", lambda: True)
    prepare_dataset(data, tiny.tokenizer(), num_proc=num_proc)
    assert "Tokenizing train dataset" in capfd.readouterr().err


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("of_datasets", [True, False])
@pytest.mark.parametrize("of_transformers", [True, False])
def test_bars_that_the_user_has_switched_off_stay_off(
    of_datasets: bool, of_transformers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["datasets.utils.tqdm"], "_hf_datasets_progress_bars_disabled", not of_datasets)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", of_transformers)

    def states() -> tuple[bool, bool, bool]:
        return are_progress_bars_disabled(), not logging.is_progress_bar_enabled(), hub_is_off()

    before = states()
    with bars(are_shown=True):
        assert states() == before
    with bars(are_shown=False):
        assert states() == (True, True, True)
    assert states() == before
    monkeypatch.setattr("holdfast.data.progress.is_terminal", lambda: False)
    with bars(are_shown=True):
        assert states() == (True, True, True)
    assert states() == before == (not of_datasets, not of_transformers, before[2])


def test_real_pairs_are_tokenized_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(
        os.environ.get("HOLDFAST_REAL_PAIRS", Path(__file__).parents[3] / "shared/data/preference_pairs_en.jsonl")
    )
    if not path.is_file():
        pytest.skip("no real pairs: set HOLDFAST_REAL_PAIRS")
    monkeypatch.setattr(batch_tokenizer, "NUM_COMPARED", 0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    check(rows[::5], made("Llama 3"))


def test_long_rows_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_tokenizer, "NUM_COMPARED", 0)
    monkeypatch.setattr(batch_tokenizer, "_MOST_CHARACTERS", 300)
    for name in ("messages", "text"):
        check(ROWS[name], made("a bos token"))


class Letters(PreTrainedTokenizer):
    """A tokenizer that is written in Python: a token for each letter."""

    def __init__(self, **kwargs: Any) -> None:
        self._letters = {letter: n for n, letter in enumerate(["<unk>", *map(chr, range(32, 127)), "\n"])}
        super().__init__(unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._letters)

    def get_vocab(self) -> dict[str, int]:
        return {**self._letters, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._letters.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._letters)[index]


@pytest.mark.parametrize("rows", ["messages", "text", "special tokens in some"])
def test_a_tokenizer_in_python(rows: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Letters(pad_token=tiny.PAD, bos_token=tiny.START, eos_token=tiny.END)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    check(ROWS[rows], tokenizer)
    prepared = prepare_dataset(Dataset.from_list(ROWS[rows]), tokenizer)
    assert prepared[0]["prompt_ids"] == tokenize(read_preference(ROWS[rows][0]), tokenizer).prompt_ids
    assert ("where it becomes this token, such as '<|im_end|>' in row 1" in caplog.text) == (rows.startswith("special"))
