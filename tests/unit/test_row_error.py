"""A row that cannot be used is named by its number and, where it was loaded from a file, by file and line."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import tiny
from holdfast.data.load import load_preferences
from holdfast.data.prepare import prepare_dataset
from holdfast.data.row_error import RowError

GOOD = {"prompt": "What is it?", "chosen": "a book", "rejected": "a boat"}
BAD = GOOD | {"chosen": None}
IDS = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}


def written(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in a file, of which each line after the first is followed by an empty one."""
    file = folder / f"pairs{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text("\n\n".join(json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("suffix", "place"), [(".jsonl", "line 7"), (".parquet", "row 3")])
def test_file_and_line(tmp_path, suffix, place, is_streamed):
    file = written(tmp_path, suffix, [GOOD, GOOD, GOOD, BAD, GOOD])
    with pytest.raises(
        ValueError, match=rf"train dataset, row 3 \(.*pairs\{suffix}, {place}\): .*must hold text or a list of messages"
    ):
        list(prepare_dataset(load_preferences(file, streaming=is_streamed), tiny.tokenizer()))


def test_of_several_processes(tmp_path):
    file = written(tmp_path, ".jsonl", [GOOD] * 6 + [BAD])
    with pytest.raises(ValueError, match=r"row 6 \(.*line 13\): "):
        prepare_dataset(load_preferences(file), tiny.tokenizer(), num_proc=2)


def test_the_first_row(tmp_path):
    file = written(tmp_path, ".jsonl", [{"question": "a"}])
    with pytest.raises(ValueError, match=r"train dataset \(.*pairs.jsonl, line 1\): .*needs the columns"):
        prepare_dataset(load_preferences(file), tiny.tokenizer())


@pytest.mark.parametrize("ids", [[-1], [99_999]])
def test_token_ids(tmp_path, ids):
    file = written(tmp_path, ".jsonl", [IDS, IDS | {"chosen_ids": ids}])
    with pytest.raises(ValueError, match=r"row 1 \(.*pairs.jsonl, line 3\): the token ids"):
        prepare_dataset(load_preferences(file), tiny.tokenizer(), vocab_size=512)


def test_ids_of_unlike_lengths():
    rows = [IDS | {"chosen_ids": [[1], [2, 3]]}]
    with pytest.raises(ValueError, match=r"row 0: the column 'chosen_ids' must hold a list of token ids"):
        prepare_dataset(Dataset.from_list(rows), tiny.tokenizer())


def test_rows_of_no_file_are_named_by_number():
    rows = Dataset.from_list([GOOD, GOOD | {"chosen": ""}, BAD])
    with pytest.raises(ValueError, match=r"train dataset, row 2: the column"):
        prepare_dataset(rows, tiny.tokenizer())


def test_it_can_be_sent_to_another_process():
    error = RowError("train", 3, "odd", "a.jsonl, line 4")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "train dataset, row 3 (a.jsonl, line 4): odd"
