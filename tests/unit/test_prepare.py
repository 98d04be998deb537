"""Datasets of every kind get token ids; what cannot be used is counted, named and never dropped in silence."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_from_disk
from torch.utils.data import DataLoader

import tiny
from holdfast.data.columns import MASK_COLUMNS, TOKENIZED_COLUMNS
from holdfast.data.formats import read_preference
from holdfast.data.load import load_preferences
from holdfast.data.prepare import Preparation, prepare_dataset
from holdfast.data.tokenize import tokenize

TOKENIZER = tiny.tokenizer()
ROWS = tiny.preference_rows(12)
TEXT_ROWS = [
    {"prompt": f"What is {n}?", "chosen": f" It is {n}.", "rejected": " I do not know.", "score": n} for n in range(12)
]
ID_ROWS = [{"prompt_ids": [1, 2, n], "chosen_ids": [4, 5], "rejected_ids": [6]} for n in range(5)]
REPOSITORY = Path(__file__).parents[2]


def stream(rows: list[dict], num_shards: int = 1) -> IterableDataset:
    if not rows:
        return IterableDataset.from_generator(lambda: iter(rows))
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)


def expected_ids(row: dict) -> dict[str, list[int]]:
    pair = tokenize(read_preference(row), TOKENIZER)
    return {column: getattr(pair, column) for column in TOKENIZED_COLUMNS}


def ids(row: dict) -> dict[str, list[int]]:
    return {column: row[column] for column in TOKENIZED_COLUMNS}


@pytest.mark.parametrize("rows", [ROWS, TEXT_ROWS, [{k: row[k] for k in ("chosen", "rejected")} for row in TEXT_ROWS]])
@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_token_ids_stand_beside_the_other_columns(make: type, rows: list[dict]) -> None:
    """A prompt that both completions begin with is a column of its own afterwards, and no longer part of them."""
    prepared = list(prepare_dataset(make(rows), TOKENIZER, vocab_size=512))
    assert len(prepared) == len(rows)
    for row, found in zip(rows, prepared, strict=True):
        assert ids(found) == expected_ids(row)
        assert all(found.pop(column, None) is None for column in MASK_COLUMNS)
        if "prompt" in row:
            assert found == row | expected_ids(row)
        else:
            assert {side: found["prompt"] + found[side] for side in ("chosen", "rejected")} == row


@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_tokenized_rows_stay_as_they_are(make: type, caplog: pytest.LogCaptureFixture) -> None:
    assert list(prepare_dataset(make(ID_ROWS), TOKENIZER, max_length=4)) == ID_ROWS
    assert caplog.messages == []


def test_preparing_twice_changes_nothing() -> None:
    once = prepare_dataset(Dataset.from_list(ROWS), TOKENIZER)
    assert list(prepare_dataset(once, TOKENIZER)) == list(once)


def test_a_first_batch_without_prompts_does_not_fix_the_type() -> None:
    """Arrow would infer a column of nothing from the first 1,000 empty prompts."""
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}] * 1000 + [{"prompt": "x", "chosen": "a", "rejected": "b"}]
    assert len(prepare_dataset(Dataset.from_list(rows), TOKENIZER)[1000]["prompt_ids"]) == 1


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_tensor_format_does_not_reach_the_ids(kind: str) -> None:
    prepared = prepare_dataset(Dataset.from_list(ROWS).with_format(kind), TOKENIZER)
    assert [ids(row) for row in prepared] == [expected_ids(row) for row in ROWS]


def test_a_transform_of_the_user_makes_the_columns() -> None:
    raw = Dataset.from_list([{"question": row["prompt"]} for row in TEXT_ROWS])

    def transform(batch: dict) -> dict:
        return {"prompt": batch["question"], "chosen": [" yes"] * len(batch["question"]), "rejected": [" no"] * 12}

    prepared = prepare_dataset(raw.with_transform(transform), TOKENIZER)
    expected = [expected_ids({"prompt": row["prompt"], "chosen": " yes", "rejected": " no"}) for row in TEXT_ROWS]
    assert [ids(row) for row in prepared] == expected


REPORT = (
    r"3 of 6 rows \(50.0 %\) of the train dataset cannot be used and are left out\. chosen equals rejected: 1 "
    r"\(row\(s\) 3\); empty completion: 1 \(row\(s\) 1\); prompt fills max_length: 1 \(row\(s\) 5\)\. "
    r"Raise `max_length` \(now 4\), or set `truncation_mode='keep_end'`"
)
MIXED = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [1, 2, 3], "chosen_ids": [], "rejected_ids": [6]},
    {"prompt_ids": [1, 2, 3], "chosen_ids": [5], "rejected_ids": [6]},
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [4, 6]},
    {"prompt_ids": [1, 2, 3], "chosen_ids": [6], "rejected_ids": [6, 7, 8, 9][1:]},
    {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [6], "rejected_ids": [7]},
]


def test_unusable_rows_are_reported_by_reason_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    prepared = prepare_dataset(Dataset.from_list(MIXED), TOKENIZER, max_length=4)
    assert list(prepared) == [MIXED[0], MIXED[2], MIXED[4]]
    assert len(caplog.messages) == 1
    assert re.match(REPORT, caplog.messages[0])


def test_at_most_five_rows_are_named(caplog: pytest.LogCaptureFixture) -> None:
    rows = [MIXED[1]] * 7 + [MIXED[0]]
    prepare_dataset(Dataset.from_list(rows), TOKENIZER)
    assert "empty completion: 7 (row(s) 0, 1, 2, 3, 4, ...). Correct these rows to use them." in caplog.text


def test_only_the_first_process_reports(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    assert len(prepare_dataset(Dataset.from_list(MIXED), TOKENIZER, max_length=4)) == 3
    assert caplog.messages == []


def test_a_stream_reports_the_1st_10th_and_100th(caplog: pytest.LogCaptureFixture) -> None:
    rows = [MIXED[0], *[MIXED[1]] * 150, *[MIXED[5]] * 3, MIXED[2]]
    prepared = prepare_dataset(stream(rows), TOKENIZER, max_length=4)
    assert caplog.messages == []  # nothing is read before it is asked for, but up to the first usable row
    assert list(prepared) == [MIXED[0], MIXED[2]]
    assert [message.split(". ")[0] for message in caplog.messages] == [
        f"{count} row(s) of the train dataset could not be used so far and were left out ({reason}; "
        f"the latest: row {row})"
        for count, reason, row in [
            (1, "empty completion", 1),
            (10, "empty completion", 10),
            (100, "empty completion", 100),
            (1, "prompt fills max_length", 151),
        ]
    ]
    assert "Said at the 1st, 10th, 100th, ... such row" in caplog.messages[0]


@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_a_dataset_without_a_usable_row_is_refused_before_training(make: type) -> None:
    message = (
        r"the train dataset must have at least one usable row; found none in 3 \(empty completion: 1, "
        r"prompt fills max_length: 2; max_length=4, truncation_mode='keep_start'\)\. Raise `max_length`"
    )
    with pytest.raises(ValueError, match=message):
        prepare_dataset(make([MIXED[5], MIXED[1], MIXED[5]]), TOKENIZER, max_length=4)


@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_an_empty_dataset_is_refused(make: type) -> None:
    with pytest.raises(ValueError, match=r"the train dataset has no rows; at least one pair is needed. Check the file"):
        prepare_dataset(make([]), TOKENIZER)


@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_missing_columns_are_refused_with_the_dataset_named(make: type) -> None:
    with pytest.raises(ValueError, match=r"eval dataset: a preference dataset needs .*found \['answer', 'prompt'\]"):
        prepare_dataset(make([{"prompt": "a", "answer": "b"}]), TOKENIZER, name="eval")


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_malformed_row_is_named(num_proc: int | None) -> None:
    rows = [*TEXT_ROWS[:7], {**TEXT_ROWS[7], "rejected": None}, *TEXT_ROWS[8:]]
    with pytest.raises(ValueError, match=r"^train dataset, row 7: the column 'rejected' must hold text .*found None"):
        prepare_dataset(Dataset.from_list(rows), TOKENIZER, num_proc=num_proc)


def test_a_malformed_row_of_a_stream_is_named_when_it_is_reached() -> None:
    prepared = iter(prepare_dataset(stream([*TEXT_ROWS[:2], {**TEXT_ROWS[2], "chosen": None}]), TOKENIZER))
    assert [next(prepared)["score"], next(prepared)["score"]] == [0, 1]
    with pytest.raises(ValueError, match=r"^train dataset, row 2: the column 'chosen'"):
        next(prepared)


def mixed_rows() -> Iterator[dict]:
    yield from ({column: row[column] for column in ("prompt", "chosen", "rejected")} for row in TEXT_ROWS[:2])
    yield from ROWS[:2]
    yield {column: ROWS[2]["prompt"] + ROWS[2][column] for column in ("chosen", "rejected")}
    yield ID_ROWS[0]
    yield {**TEXT_ROWS[0], "chosen": ROWS[0]["chosen"]}


def test_every_row_is_read_for_what_it_is() -> None:
    """A stream that goes from text to messages to an implicit prompt to ids, and then to a row that is a mix."""
    prepared = iter(prepare_dataset(IterableDataset.from_generator(mixed_rows), TOKENIZER))
    expected = [*map(expected_ids, [*TEXT_ROWS[:2], *ROWS[:3]]), ID_ROWS[0]]
    assert [ids(next(prepared)) for _ in expected] == expected
    with pytest.raises(ValueError, match=r"row 6: the columns .* must be all text or all messages; found \{'prompt'"):
        next(prepared)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"row 1: the column 'chosen_ids' must hold a list of token ids; found None. Correct"),
        ([1.5], r"row 1: the column 'chosen_ids' must hold a list of token ids; found list \[1.5\]"),
        ([[1]], r"must hold a list of token ids; found list \[\[1\]\]"),
        (["a"], r"must hold a list of token ids; found list \['a'\]"),
        ([4, -1], r"the token ids in the column 'chosen_ids' must be in 0..511, the model's vocabulary; found -1"),
        ([4, 512], r"must be in 0..511, the model's vocabulary; found 512.*resize_token_embeddings"),
    ],
)
def test_ids_that_are_none_are_refused(value: object, message: str) -> None:
    rows = [ID_ROWS[0], {**ID_ROWS[1], "chosen_ids": value}]
    with pytest.raises(ValueError, match=message):
        list(prepare_dataset(IterableDataset.from_generator(lambda: iter(rows)), TOKENIZER, vocab_size=512))
    if value in (None, [4, -1], [4, 512]):  # the others cannot stand in one arrow column with row 0
        with pytest.raises(ValueError, match=message):
            prepare_dataset(Dataset.from_list(rows), TOKENIZER, vocab_size=512)


def test_negative_ids_are_refused_without_a_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"row 0: .*'prompt_ids' must be at least 0; found -100"):
        prepare_dataset(Dataset.from_list([{**ID_ROWS[0], "prompt_ids": [-100]}]), TOKENIZER)


def test_ids_of_a_tokenizer_that_is_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row 0: the token ids in the column 'prompt_ids' must be in 0..99"):
        prepare_dataset(Dataset.from_list(TEXT_ROWS), TOKENIZER, vocab_size=100)


@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_a_missing_chat_template_is_said_before_mapping(make: type) -> None:
    with pytest.raises(
        ValueError, match=r"^the rows hold messages, which need a chat template; the tokenizer has none"
    ):
        prepare_dataset(make(ROWS), tiny.tokenizer(chat_template=False))


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_prompt_that_is_no_prefix_is_said_once(num_proc: int | None, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*TEXT_ROWS, *({"prompt": "He measured the ", "chosen": "water", "rejected": "smoke"},) * 4]
    columns = ("prompt", "chosen", "rejected")
    dataset = Dataset.from_list([{column: row[column] for column in columns} for row in rows])
    prepare_dataset(dataset, TOKENIZER, num_proc=num_proc)
    assert len(caplog.messages) == 1
    assert "is not a prefix" in caplog.text
    assert "in 4 of 16 rows (25.0 %) of the train dataset" in caplog.text
    assert "is left out: ' ' in row 12" in caplog.text
    caplog.clear()
    list(prepare_dataset(dataset.to_iterable_dataset(), TOKENIZER))
    assert len(caplog.messages) == 1
    assert "in at least one row of the train dataset" in caplog.text
    assert "is left out: ' ' in row 12" in caplog.text


def test_the_cache_is_used_again_and_survives_another_max_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
    first = prepare_dataset(load_from_disk(tmp_path / "rows"), tiny.tokenizer())
    caplog.clear()

    def never(*_: object) -> None:
        raise AssertionError("the rows were tokenized again")

    monkeypatch.setattr("holdfast.data.add_ids.tokenize", never)
    called_before = tiny.tokenizer()
    called_before(["a", "b c"], padding=True, truncation=True, max_length=3)
    lengths = sorted(len(row["prompt_ids"]) for row in first)
    again = prepare_dataset(load_from_disk(tmp_path / "rows"), called_before, max_length=lengths[-1])
    assert [ids(row) for row in again] == [ids(row) for row in first if len(row["prompt_ids"]) < lengths[-1]]
    assert "prompt fills max_length" in caplog.text
    with pytest.raises(AssertionError, match="tokenized again"):
        prepare_dataset(load_from_disk(tmp_path / "rows"), tiny.tokenizer(vocab_size=400))


def test_the_report_is_given_again_from_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Dataset.from_list(MIXED).save_to_disk(tmp_path / "rows")
    messages = []
    for _ in range(2):
        caplog.clear()
        prepare_dataset(load_from_disk(tmp_path / "rows"), TOKENIZER, max_length=4)
        messages.append(caplog.messages)
    assert messages[0] == messages[1]
    assert len(messages[0]) == 1


def test_the_main_process_goes_first() -> None:
    order = []

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        order.append("enter")
        yield
        order.append("exit")

    prepared = prepare_dataset(Dataset.from_list(ID_ROWS), TOKENIZER, main_process_first=first())
    assert (len(prepared), order) == (5, ["enter", "exit"])


def test_workers_share_a_stream_and_each_row_comes_once() -> None:
    prepared = prepare_dataset(stream(ROWS, num_shards=4), TOKENIZER)
    loaded = list(DataLoader(prepared, batch_size=None, num_workers=2))
    expected = [row | expected_ids(row) | dict.fromkeys(MASK_COLUMNS) for row in ROWS]
    assert sorted(map(str, loaded)) == sorted(map(str, expected))


def test_a_stream_goes_on_where_it_stood() -> None:
    prepared = prepare_dataset(stream([MIXED[1], *ID_ROWS]), TOKENIZER)
    rows = iter(prepared)
    assert [next(rows), next(rows)] == ID_ROWS[:2]
    state = prepared.state_dict()
    resumed = prepare_dataset(stream([MIXED[1], *ID_ROWS]), TOKENIZER)
    resumed.load_state_dict(state)
    assert list(resumed) == ID_ROWS[2:]


def test_evaluation_datasets() -> None:
    good, bad = Dataset.from_list(ID_ROWS), Dataset.from_list([MIXED[1]])
    preparation = Preparation(processing_class=TOKENIZER, max_length=9)
    assert preparation.of_eval(None) is None
    assert list(preparation.of_eval(good)) == ID_ROWS
    for parts in (
        {"a": good, "b": good},
        DatasetDict(a=good, b=good),
        IterableDatasetDict(a=good.to_iterable_dataset()),
    ):
        prepared = preparation.of_eval(parts)
        assert {key: list(part) for key, part in prepared.items()} == dict.fromkeys(parts, ID_ROWS)
    with pytest.raises(ValueError, match=r"the eval 'b' dataset must have at least one usable row"):
        preparation.of_eval({"a": good, "b": bad})
    with pytest.raises(ValueError, match=r"eval_dataset is a dict of evaluation datasets; found an empty one. Give"):
        preparation.of_eval({})


def test_other_arguments_that_are_refused() -> None:
    with pytest.raises(TypeError, match=r"train dataset must be a `datasets.Dataset`.*found list.*Dataset.from_list"):
        prepare_dataset(ROWS, TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"found DatasetDict. Choose a split"):
        prepare_dataset(DatasetDict(train=Dataset.from_list(ROWS)), TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="truncation_mode must be one of"):
        prepare_dataset(Dataset.from_list(ROWS), TOKENIZER, truncation_mode="middle")  # type: ignore[arg-type]


def test_real_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """300 real conversations: every one is used or reported, and the ids decode to the words that were there."""
    path = Path(os.environ.get("HOLDFAST_REAL_PAIRS", REPOSITORY / "../shared/data/preference_pairs_en.jsonl"))
    if not path.is_file():
        pytest.skip("no real pairs: set HOLDFAST_REAL_PAIRS")
    caplog.set_level(logging.WARNING)
    pairs = load_preferences(path, cache_dir=str(tmp_path))
    everything = prepare_dataset(pairs, TOKENIZER, vocab_size=512)
    assert len(everything) == len(pairs) == 300
    assert caplog.messages == []
    prepared = prepare_dataset(pairs, TOKENIZER, max_length=1024)
    fitting = [row for row in everything if len(row["prompt_ids"]) < 1024]
    assert list(prepared) == fitting
    assert f"prompt fills max_length: {300 - len(fitting)} (row(s)" in caplog.text
    for row in everything.select(range(50)):
        prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["prompt"])
        assert TOKENIZER.decode(row["prompt_ids"]) == prompt + "<|im_start|>assistant\n"
        for side in ("chosen", "rejected"):
            assert TOKENIZER.decode(row[f"{side}_ids"]) == row[side][0]["content"] + "<|im_end|>\n"
