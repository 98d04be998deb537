"""Files of every kind load as they are; a file that is not as it should be is named with the line and what to do."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from holdfast.data.files.json_rows import json_rows
from holdfast.data.load import AnyDataset, load_preferences

ROWS = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """`load_preferences` with a cache of its own, on a file of a given name and text."""

    def load(file_name: str, text: str | bytes | None = None, **options: Any) -> AnyDataset:
        path = tmp_path / file_name
        if text is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_preferences(path, cache_dir=str(tmp_path / ".cache"), **options)

    return load


@pytest.mark.parametrize(
    ("file_name", "text"),
    [
        ("pairs.jsonl", LINES),
        ("pairs.jsonl", LINES.replace("\n", "\r\n\r\n")),  # blank lines and Windows ends of line
        ("pairs.jsonl", "\ufeff" + LINES),
        ("pairs.json", LINES),
        ("pairs.json", json.dumps(ROWS)),
        ("pairs.json", json.dumps(ROWS, indent=1)),
        ("pairs.csv", "prompt,chosen,rejected\n0?,yes,no\n1?,yes,no\n2?,yes,no\n"),
        ("pairs.CSV", "prompt,chosen,rejected\n0?,yes,no\n1?,yes,no\n2?,yes,no\n"),
    ],
)
def test_files(load: Any, file_name: str, text: str) -> None:
    assert list(load(file_name, text)) == ROWS


def test_parquet(load: Any, tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "pairs.parquet")
    assert list(load("pairs.parquet")) == ROWS


def test_one_object_is_one_row(load: Any) -> None:
    assert list(load("pair.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]
    assert list(load("nested.json", json.dumps({"data": ROWS}), field="data")) == ROWS


def test_columns_of_csv_are_text(load: Any) -> None:
    """Read as numbers and missing values, "NA" would vanish and 42 would not be an answer."""
    read = load("pairs.csv", 'prompt,chosen,rejected\n"6 * 7, please?",42,NA\nNaCl?,,None\n')
    assert list(read) == [
        {"prompt": "6 * 7, please?", "chosen": "42", "rejected": "NA"},
        {"prompt": "NaCl?", "chosen": "", "rejected": "None"},
    ]
    semicolons = load("semicolons.csv", "prompt;chosen;rejected\na;1;2\n", sep=";")
    assert list(semicolons) == [{"prompt": "a", "chosen": "1", "rejected": "2"}]


def test_a_part_of_a_file(load: Any) -> None:
    assert list(load("pairs.jsonl", LINES, split="train[:2]")) == ROWS[:2]
    assert list(load("pairs.jsonl", split="train", streaming=True)) == ROWS
    with pytest.raises(ValueError, match=r"split='test' was asked for; the file .* is one split, 'train'. Leave"):
        load("pairs.jsonl", split="test")
    with pytest.raises(ValueError, match=r"name='en' chooses a configuration .* is a file, which has none. Leave"):
        load("pairs.jsonl", name="en")


def test_folders_of_files(load: Any) -> None:
    load("few/train.jsonl", LINES)
    assert list(load("few")) == ROWS
    load("few/test.jsonl", LINES.splitlines()[0])
    both = load("few")
    assert {split: list(part) for split, part in both.items()} == {"train": ROWS, "test": ROWS[:1]}
    assert list(load("few", split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"few could not be read: Unknown split \"dev\".*\['train', 'test'\]"):
        load("few", split="dev")
    load("table/train.csv", "prompt,chosen,rejected\na,1,NA\n")
    assert list(load("table")) == [{"prompt": "a", "chosen": "1", "rejected": "NA"}]


def test_folders_that_are_refused(load: Any, tmp_path: Path) -> None:
    load("mixed/train.jsonl", LINES)
    (tmp_path / "mixed/more.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(ValueError, match=r"files of one kind; found \['csv', 'json'\] in .*mixed. Give one"):
        load("mixed")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other must hold .json, .jsonl, .parquet, .csv files .*; found nothing"):
        load("other")
    (tmp_path / "other/notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"found \['notes.txt'\]. Check the path"):
        load("other")
    load("broken/train.jsonl", LINES)
    (tmp_path / "broken/train.jsonl").write_text(LINES + "{")
    with pytest.raises(ValueError, match=r"train.jsonl, line 4, column 2: malformed JSON"):
        load("broken")


def test_datasets_saved_to_disk(tmp_path: Path) -> None:
    one = Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "two")
    assert list(load_preferences(tmp_path / "one")) == ROWS
    assert {split: len(part) for split, part in load_preferences(tmp_path / "two").items()} == {"train": 3, "test": 1}
    assert list(load_preferences(tmp_path / "two", split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"split='dev' was asked for; .* has \['train', 'test'\]. Choose one"):
        load_preferences(tmp_path / "two", split="dev")
    with pytest.raises(ValueError, match=r"split='train' was asked for; .* has no splits. Leave `split` out"):
        load_preferences(tmp_path / "one", split="train")
    with pytest.raises(ValueError, match=r"name='en' chooses .* written by `save_to_disk`, which has none"):
        load_preferences(tmp_path / "one", name="en")


GOOD_LINE = LINES.splitlines()[0] + "\n"


@pytest.mark.parametrize(
    ("file_name", "text", "message"),
    [
        (
            "a.jsonl",
            GOOD_LINE + '{"prompt": "a", "chosen": \n' + GOOD_LINE,
            r"a.jsonl, line 2, column 27: malformed JSON, e",
        ),
        ("a.jsonl", GOOD_LINE * 3 + GOOD_LINE[:-2] + ",}", r"line 4, column 5[12]: malformed JSON, .*Correct the line"),
        ("a.jsonl", "oops\n" + GOOD_LINE, r"line 1, column 1: malformed JSON, .*found \.\.\.'oops'"),
        ("a.jsonl", GOOD_LINE.strip() + GOOD_LINE, r"line 1, column 52: malformed JSON, extra data; found .*rejected"),
        (
            "a.jsonl",
            GOOD_LINE + "null\n" + GOOD_LINE,
            r"line 2: a row must be a JSON object .*found NoneType None. Corr",
        ),
        ("a.jsonl", GOOD_LINE + "[1, 2]\n", r"line 2: a row must be a JSON object such as \{\"prompt\".*found list"),
        ("a.json", "[" + GOOD_LINE + ",\n" + GOOD_LINE + ", x]", r"a.json, line 4, column 3: malformed JSON"),
        ("a.json", '[{"prompt": "a"}, "b"]', r"element 1 of the array: a row must be a JSON object .*found str b"),
        ("a.json", "[]", r"must hold at least one row; found an empty array"),
        ("a.jsonl", GOOD_LINE.encode() + b'{"prompt": "\xe9"}', r"line 2: the text must be in utf-8.*pass `encoding=`"),
        ("a.jsonl", "", r"a.jsonl must hold at least one row; found an empty file. Check how it was written"),
        ("a.jsonl", "\n\n", r"a.jsonl must hold at least one row; found an empty file"),
        ("a.csv", "", r"a.csv must hold at least one row; found an empty file"),
        ("a.csv", "prompt,chosen,rejected\n", r"a.csv must hold at least one row; found none. Check"),
        (
            "a.csv",
            "prompt,chosen,rejected\na,b,c\na,b,c,d\n",
            r"a.csv, line 3: a row must have 3 fields, .*; found 4, \['a', 'b', 'c', 'd'\]. Correct",
        ),
        ("a.parquet", "", r"a.parquet must hold at least one row; found an empty file"),
        ("a.parquet", "PAR", r"a.parquet could not be read: .*Check the file"),
        ("a.txt", "x", r"must be a file of .json, .jsonl, .parquet, .csv; found .*a.txt. Convert it"),
    ],
)
def test_files_that_are_refused(load: Any, file_name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(file_name, text)


def test_latin_text_is_read_when_its_encoding_is_given(load: Any) -> None:
    text = json.dumps({**ROWS[0], "prompt": "caf\xe9"}, ensure_ascii=False).encode("latin-1")
    assert load("a.jsonl", text, encoding="latin-1")[0]["prompt"] == "caf\xe9"


def test_a_missing_file_is_refused_with_near_names(tmp_path: Path) -> None:
    (tmp_path / "pairs_en.jsonl").write_text(LINES)
    with pytest.raises(
        ValueError, match=r"pair_en.jsonl'; there is no such file.*near names in .*\['pairs_en.jsonl'\]"
    ):
        load_preferences(tmp_path / "pair_en.jsonl")
    with pytest.raises(
        ValueError, match=r"zzz.csv'; there is no such file.* holds \['pairs_en.jsonl'\]. Check the path"
    ):
        load_preferences(tmp_path / "zzz.csv")
    with pytest.raises(ValueError, match=r"no such file, and no folder .*absent. Check the path"):
        load_preferences(tmp_path / "absent/pairs.jsonl")


def test_other_names_are_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(path: str, name: str | None, *, split: str | None, **options: Any) -> DatasetDict:
        asked.append((path, name, split, options))
        if path == "owner/absent":
            raise DatasetNotFoundError("Dataset 'owner/absent' doesn't exist on the Hub")
        return DatasetDict(train=Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    assert list(load_preferences("owner/pairs", name="en", revision="v1")) == ROWS
    with pytest.raises(
        ValueError, match=r"'owner/absent'; there is no such file.*name of a hub dataset: Dataset 'owner"
    ):
        load_preferences("owner/absent", split="train")
    assert asked == [("owner/pairs", "en", None, {"revision": "v1"}), ("owner/absent", None, "train", {})]


def test_the_check_reads_a_byte_order_mark_only_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE.encode() * 2)
    assert len(list(json_rows(path))) == 2
    path.write_bytes(GOOD_LINE.encode() + b"\xef\xbb\xbf" + GOOD_LINE.encode())
    with pytest.raises(ValueError, match=r"line 2, column 1: malformed JSON"):
        list(json_rows(path))
