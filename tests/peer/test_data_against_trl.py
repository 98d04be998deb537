"""The same rows give the same token ids and the same padded tensors as in TRL 1.16; where they differ, we say why."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

import tiny
from holdfast.data.columns import TOKENIZED_COLUMNS
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.preference_collator import DataCollatorForPreference
from holdfast.data.prepare import prepare_dataset

peer = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs TRL")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),  # the peer's own
]

TOKENIZER = tiny.tokenizer()
REPOSITORY = Path(__file__).parents[2]
MESSAGES = tiny.preference_rows(40, seed=1)
WORDS = tiny.PROSE.split()
TEXTS = [
    {"prompt": " ".join(WORDS[n : n + 7]), "chosen": f" {WORDS[2 * n]} it is", "rejected": f" {WORDS[3 * n + 1]}."}
    for n in range(40)
]
TOOLS = [{"type": "function", "function": {"name": "tides", "description": "When", "parameters": {"day": "Monday"}}}]


def joined(row: dict[str, Any]) -> dict[str, Any]:
    return {column: row["prompt"] + row[column] for column in ("chosen", "rejected")}


KINDS = {
    "messages": MESSAGES,
    "text": TEXTS,
    "messages, implicit prompt": [joined(row) for row in MESSAGES],
    "text, implicit prompt": [joined(row) for row in TEXTS],
    "text that ends with eos": [{**row, "chosen": row["chosen"] + TOKENIZER.eos_token} for row in TEXTS],
    "text that merges across the boundary": [
        {**row, "prompt": row["prompt"] + " ", "chosen": row["chosen"].lstrip()} for row in TEXTS
    ],
    "one text is the beginning of the other": [{"chosen": "The sea", "rejected": "The sea is"}],
    "one conversation is the beginning of the other": [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["chosen"] + row["rejected"]}
        for row in MESSAGES
    ],
    "template variables": [{**row, "chat_template_kwargs": {"style": "dry"}} for row in MESSAGES],
    "tools": [{**row, "tools": TOOLS} for row in MESSAGES],
    "tools as JSON": [{**row, "tools": '[{"name": "tides", "default": null}]'} for row in MESSAGES],
}


def trl_ids(dataset: Dataset, tokenizer: Any, **options: Any) -> list[dict[str, list[int]]]:
    arguments = SimpleNamespace(
        **{"dataset_num_proc": None, "max_length": None, "truncation_mode": "keep_start"} | options
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    prepared = peer.DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, "train")
    return list(prepared.select_columns(list(TOKENIZED_COLUMNS)))


def our_ids(dataset: Dataset, tokenizer: Any, **options: Any) -> list[dict[str, list[int]]]:
    return list(prepare_dataset(dataset, tokenizer, **options).select_columns(list(TOKENIZED_COLUMNS)))


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS.keys())
def test_token_ids(rows: list[dict]) -> None:
    dataset = Dataset.from_list(rows)
    assert our_ids(dataset, TOKENIZER) == trl_ids(dataset, TOKENIZER)


def test_a_prefill_is_continued_and_not_closed() -> None:
    """A prompt that ends with the assistant: its message goes on in the completion. The peer closes it, and has the
    completion begin another message."""
    begin = {"role": "assistant", "content": "Well,"}
    rows = [{**row, "prompt": [*row["prompt"], begin]} for row in MESSAGES]
    ours = our_ids(Dataset.from_list(rows), TOKENIZER)
    assert ours != trl_ids(Dataset.from_list(rows), TOKENIZER)
    for row, found in zip(MESSAGES, ours, strict=True):
        for side in ("chosen", "rejected"):
            whole = [
                *row["prompt"],
                {"role": "assistant", "content": "Well," + row[side][0]["content"]},
                *row[side][1:],
            ]
            ids = TOKENIZER.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
            assert found["prompt_ids"] + found[f"{side}_ids"] == ids


def test_token_ids_of_a_template_whose_prompt_is_no_prefix() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think></think>{% endif %}"
    dataset = Dataset.from_list(MESSAGES)
    assert our_ids(dataset, tokenizer) == trl_ids(dataset, tokenizer)


def test_rows_left_out_for_their_prompt() -> None:
    dataset = Dataset.from_list(MESSAGES)
    lengths = sorted(len(row["prompt_ids"]) for row in trl_ids(dataset, TOKENIZER))
    ours, theirs = (ids(dataset, TOKENIZER, max_length=lengths[20]) for ids in (our_ids, trl_ids))
    assert ours == theirs
    assert 0 < len(ours) < len(MESSAGES)


def test_real_pairs() -> None:
    path = Path(os.environ.get("HOLDFAST_REAL_PAIRS", REPOSITORY / "../shared/data/preference_pairs_en.jsonl"))
    if not path.is_file():
        pytest.skip("no real pairs: set HOLDFAST_REAL_PAIRS")
    dataset = Dataset.from_json(str(path))
    for options in ({}, {"max_length": 1024}):
        ours = our_ids(dataset, TOKENIZER, **options)
        assert ours == trl_ids(dataset, TOKENIZER, **options)
        assert len(ours) > 100


IDS = st.lists(st.integers(1, 500), min_size=1, max_size=8)


@given(
    st.lists(st.fixed_dictionaries(dict.fromkeys(TOKENIZED_COLUMNS, IDS)), min_size=1, max_size=4),
    st.sampled_from([None, 10, 12]),
    st.sampled_from(["keep_start", "keep_end"]),
    st.sampled_from([None, 8]),
    st.booleans(),
)
def test_collated_tensors(rows: list[dict], length: int | None, mode: str, multiple: int | None, logps: bool) -> None:
    if logps:
        rows = [{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -0.1} for row in rows]
    options = {"pad_token_id": 0, "max_length": length, "truncation_mode": mode, "pad_to_multiple_of": multiple}
    ours, theirs = DataCollatorForPreference(**options)(rows), peer.DataCollatorForPreference(**options)(rows)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].dtype == tensor.dtype, name
    padded = PaddedLayout(**options)(rows)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(padded[name], theirs[name]), name
    # Their mask marks what our positions target, but for a token without a predecessor.
    mask = theirs["completion_mask"]
    mask[:, 0] = 0
    assert torch.equal(mask.flatten().nonzero().flatten(), padded["source"] + 1)


def test_where_we_differ_none_that_arrow_fills_in() -> None:
    """In one arrow type, every tool gets the keys of all others; TRL shows their None to the template."""
    rows = [{**MESSAGES[n], "tools": [{"name": "tides", key: "Monday"}]} for n, key in enumerate(["day", "hour"])]
    message = {"role": Value("string"), "content": Value("string")}
    tool = dict.fromkeys(["name", "day", "hour"], Value("string"))
    sides = dict.fromkeys(["prompt", "chosen", "rejected"], List(message))
    dataset = Dataset.from_list(rows, features=Features(sides | {"tools": List(tool)}))
    ours, theirs = our_ids(dataset, TOKENIZER), trl_ids(dataset, TOKENIZER)
    assert ours == [our_ids(Dataset.from_list([row]), TOKENIZER)[0] for row in rows]
    assert 'Tools: [{"name": "tides", "day": "Monday"}]<|im_end|>' in TOKENIZER.decode(ours[0]["prompt_ids"])
    assert '"hour": null}]<|im_end|>' in TOKENIZER.decode(theirs[0]["prompt_ids"])


def test_where_we_differ_text_without_a_common_beginning() -> None:
    """TRL looks at the character before the first, which is the last: a space there makes it the whole prompt."""
    dataset = Dataset.from_list([{"chosen": "blue ", "rejected": "green"}])
    ours, theirs = our_ids(dataset, TOKENIZER)[0], trl_ids(dataset, TOKENIZER)[0]
    assert ours["prompt_ids"] == []
    assert TOKENIZER.decode(ours["rejected_ids"]) == "green<|im_end|>"
    assert TOKENIZER.decode(theirs["rejected_ids"]) != "green<|im_end|>"
