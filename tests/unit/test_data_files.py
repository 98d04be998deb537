"""Each kind of fault in each kind of file: the rows are right, value by value, or one `ValueError` names file and line.

The rows of a table are loaded whole and as a stream; both must say the same.
"""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader

from holdfast.data.files.places import AnyRows, places_of
from holdfast.data.load import load_preferences

ROWS = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
HEADER = "prompt,chosen,rejected\n"
TABLE = HEADER + "0?,yes,no\n1?,yes,no\n2?,yes,no\n"

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    """The rows at a path of the test's folder, of each split where there are several."""

    def load(path: str, **options: Any) -> Any:
        loaded = load_preferences(tmp_path / path, cache_dir=str(tmp_path / ".cache"), **options)
        return {key: list(part) for key, part in loaded.items()} if isinstance(loaded, dict) else list(loaded)

    return load


def row(**columns: Any) -> dict[str, Any]:
    return {**ROWS[0], **columns}


def text_row(*fields: str) -> dict[str, str]:
    return dict(zip(("prompt", "chosen", "rejected"), fields, strict=True))


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


BAD_CSV = {
    "too few": (TABLE + "a,b\n", r"a.csv, line 5: a row must have 3 fields, .*; found 2, \['a', 'b'\]. Correct"),
    "too many": (TABLE + "a,b,c,d\n", r"line 5: a row must have 3 fields, .*; found 4, "),
    "after lines in a field": (HEADER + '"a\n\nb",c,d\n\nx,y\n', r"line 6: a row must have 3 fields, .*; found 2"),
    "name twice": ("prompt,chosen,rejected,prompt\na,b,c,d\n", r"line 1: .* name of its own; found 'prompt' twice"),
    "no name": (",prompt,chosen,rejected\n0,a,b,c\n", r"line 1: each column must have a name; .* column 1 has none"),
    "NUL": (TABLE + "a\0,b,c\n", r"line 5: text must not hold NUL characters; found \['a\\x00'"),
    "open quote": (TABLE + '"a,b,c\nd,e,f\n', r"line 5: a quoted field must end with .* found none .*\(line 6\)"),
    "text after a quote": (TABLE + '"a"x,b,c\n', r"a.csv, line 5: malformed CSV, ',' expected after '\"'"),
    "no rows": (HEADER, r"a.csv must hold at least one row; found none"),
    "blank lines": ("\n \n\n", r"a.csv must hold at least one row; found no line of column names"),
    "Latin-1": (TABLE.encode() + b"caf\xe9,b,c\n", r"line 5: the text must be in utf-8; .* Convert the file, or pass"),
    "UTF-16": (TABLE.encode("utf-16"), r"line 1: the text must be in utf-8; .* it is UTF-16. .* `encoding='utf-16'`"),
    "UTF-16 without mark": (
        (HEADER + "\xe9,b,c\n").encode("utf-16-le"),
        r"the text must be in utf-8; .*`encoding='utf-16-le'`",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(range(128, 200)), r"a.csv, line 1: .* it is compressed by zstd. Unpack it"),
}

BAD_JSON = {
    "cut": (LINES[:-9], r"a.jsonl, line 3, column \d+: malformed JSON"),
    "deep": (LINES + "[" * 100_000 + "\n", r"a.jsonl, line 4: values must not be nested thousands of times"),
    "deep from the start": ('{"a":' * 5000 + "1" + "}" * 5000, r"a.jsonl, line 1: values must not be nested thousands"),
    "too deep for a column": (lines(row(x=json.loads("[" * 60 + "]" * 60))), r"line 1, column 'x': .* nested 40 deep"),
    "key twice": (
        LINES + '{"prompt": "a", "prompt": "b"}',
        r"line 4: an object must have each key once; found 'prompt'",
    ),
    "key twice inside": (LINES + '{"prompt": [{"role": "a", "role": "b"}]}', r"line 4: .* found 'role' twice"),
    "key twice in an array": ('[\n{"a": 1},\n{"a": 1, "a": 2}]', r"a.jsonl, line 3: .* found 'a' twice"),
    "key twice in an object": ('{\n"a": 1,\n"a": 2}', r"a.jsonl, line 1: .* found 'a' twice"),
    "half a pair": (LINES + r'{"prompt": "\uD83D"}', r"line 4: text must not hold half of a surrogate pair.*ud83d"),
    "half a pair as key": (LINES + r'{"\udc00": "a"}', r"line 4: text must not hold half of a surrogate pair"),
    "half a pair in an array": ('[\n{"a": "b"},\n\n{"a": "\\ud800"}]', r"a.jsonl, line 4: .* half of a surrogate pair"),
    "5000 digits": (LINES + '{"x": ' + "1" * 5000 + "}", r"line 4: a number must have at most 4300 digits; found more"),
    "5000 digits at once": ('{"x": ' + "1" * 5000 + "}", r"a.jsonl, line 1: a number must have at most 4300 digits"),
    "400 digits": (
        LINES + '{"x": ' + "1" * 400 + "}",
        r"line 4, column 'x': .*column of floats; found one of 400 digits",
    ),
    "no object": (LINES + '"a"\n', r"line 4: a row must be a JSON object .* found str a"),
    "empty object": (LINES + "{}\n", r"line 4: a row must be a JSON object .* found an empty object"),
    "two in a line": (LINES + '{"a": 1}{"a": 2}\n', r"line 4, column 9: malformed JSON, extra data"),
    "comma before the end": ('[{"a": 1},\n]', r"line 2, column 1: malformed JSON, expecting value"),
    "array not closed": ('[\n{"a": 1}\n', r"malformed JSON, expecting ',' delimiter"),
    "no comma": ('[{"a": 1}\n{"a": 2}]', r"line 2, column 1: malformed JSON, expecting ',' delimiter"),
    "text after the array": ('[{"a": 1}]\nx', r"line 2, column 1: malformed JSON, extra data"),
    "array of numbers": ("[1]\n[2]\n", r"line 1, element 0 of the array: a row must be a JSON object .* found int 1"),
    "blank lines": ("\n \n\t\n", r"a.jsonl must hold at least one row; found an empty file"),
    "mark alone": ("\ufeff", r"a.jsonl must hold at least one row; found an empty file"),
    "gzip": (gzip.compress(LINES.encode()), r"a.jsonl, line 1: .* it is compressed by gzip. Unpack it"),
    "Latin-1": (LINES.encode() + b'{"prompt": "\xe9"}', r"a.jsonl, line 4: the text must be in utf-8"),
    "UTF-16": (LINES.encode("utf-16"), r"a.jsonl, line 1: the text must be in utf-8; .*pass `encoding='utf-16'`"),
    "NULs": (LINES + "\0\0\n", r"a.jsonl, line 4, column 1: malformed JSON"),
}

BAD_TEXTS = [("a.csv", *fault) for fault in BAD_CSV.values()] + [("a.jsonl", *fault) for fault in BAD_JSON.values()]


@both_ways
@pytest.mark.parametrize(("name", "text", "message"), BAD_TEXTS, ids=[f"csv {key}" for key in BAD_CSV] + [*BAD_JSON])
def test_text_that_is_refused(load, tmp_path, name, text, message, streaming) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load(name, streaming=streaming)
    assert str(tmp_path / name) in str(caught.value)


RIGHT_CSV = {
    "byte order mark": ("\ufeff" + TABLE, ROWS),
    "ends of line of old": (TABLE.replace("\n", "\r"), ROWS),
    "ends of line of Windows": (TABLE.replace("\n", "\r\n"), ROWS),
    "blank lines": ("\n\n" + TABLE.replace("\n", "\n\n  \n"), ROWS),
    "no end of line": (TABLE.rstrip(), ROWS),
    "quotes": (HEADER + 'a"b,"c""d","e,\nf"\n', [text_row('a"b', 'c"d', "e,\nf")]),
    "longer than Python's limit": (HEADER + f"{'x' * 200_000},b,c\n", [text_row("x" * 200_000, "b", "c")]),
    "what looks like a value": (HEADER + "NA,42,2020-01-01\nnull,,1e5\n", [
        text_row("NA", "42", "2020-01-01"), text_row("null", "", "1e5"),
    ]),
    "spaces and other separators of lines": (HEADER + " a ,b\u2028c,\x85d\x0b\n", [
        text_row(" a ", "b\u2028c", "\x85d\x0b"),
    ]),
}  # fmt: skip

LATE = [row(prompt="x" * 2000) for _ in range(6000)]  # more than the first 10 MB

RIGHT_JSON = {
    "byte order mark": ("\ufeff" + LINES, ROWS),
    "ends of line of Windows": (LINES.replace("\n", "\r\n\r\n"), ROWS),
    "array after blank lines": ("\n\n" + json.dumps(ROWS, indent=1), ROWS),
    "NUL and other characters": (lines(row(prompt="a\0b\u2028\x85\U0001f600\\ud800")), [
        row(prompt="a\0b\u2028\x85\U0001f600\\ud800"),
    ]),
    "dates": (lines(row(prompt="2020-01-01T00:00:00Z", chosen="2020-01-01")), [
        row(prompt="2020-01-01T00:00:00Z", chosen="2020-01-01"),
    ]),
    "text beside messages": (mixed := [
        *(row(prompt=text) for text in ("42", "null", "[1]", '{"a": 1}', "2020-01-01", '"')),
        row(prompt=[{"role": "user", "content": "a"}]), row(prompt=3), row(prompt=None), row(prompt=True),
    ], mixed),
    "parts beside text": (parts := [
        row(prompt=[{"role": "user", "content": "7"}, {"role": "tool", "content": [{"type": "text", "text": "8"}]}]),
    ], parts),
    "other keys in each object": (keys := [
        row(tools=[{"a": "1"}, {"b": {"c": [1, 2.5]}}]), row(tools=[]), row(tools=None), row(tools=[{"a": {}}]),
    ], keys),
    "a key that is missing": (LINES + '{"prompt": "a", "chosen": "b"}', [
        *ROWS, {"prompt": "a", "chosen": "b", "rejected": None},
    ]),
    "numbers": (lines(row(x=1), row(x=2.5), row(x=2**70)), [row(x=1.0), row(x=2.5), row(x=float(2**70))]),
    "whole numbers": (lines(row(x=2**63 - 1), row(x=-(2**63))), [row(x=2**63 - 1), row(x=-(2**63))]),
    "infinity": (lines(row(x=float("-inf"))), [row(x=float("-inf"))]),
    "lists": (lists := [row(x=[]), row(x=[[1], []]), row(x=[None])], lists),
    "messages after 10 MB of text": (late := [*LATE, row(prompt=[{"role": "user", "content": "a"}])], late),
    "a column that begins late": (late := [*(row(x=None, **r) for r in LATE), row(x=[{"a": 1}])], late),
}  # fmt: skip

RIGHT_TEXTS = [("a.csv", *right) for right in RIGHT_CSV.values()] + [
    ("a.jsonl", *right) for right in RIGHT_JSON.values()
]


@both_ways
@pytest.mark.parametrize(("name", "text", "rows"), RIGHT_TEXTS, ids=[f"csv {key}" for key in RIGHT_CSV] + [*RIGHT_JSON])
def test_text_that_is_read_as_it_is(load, tmp_path, name, text, rows, streaming) -> None:
    (tmp_path / name).write_bytes((lines(*text) if isinstance(text, list) else text).encode())
    read = load(name, streaming=streaming)
    assert read == rows
    assert [list(map(type, r.values())) for r in read] == [list(map(type, r.values())) for r in rows]


@both_ways
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-be", "utf-32", "shift_jis"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_other_encodings(load, tmp_path, name, encoding, streaming) -> None:
    word = "\u3042" if encoding == "shift_jis" else "caf\xe9"
    rows = [*ROWS, text_row(word, "b", "c")]
    as_lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
    texts = {"a.csv": TABLE + f"{word},b,c\n", "a.jsonl": as_lines, "a.json": json.dumps(rows, ensure_ascii=False)}
    (tmp_path / name).write_bytes(texts[name].encode(encoding))
    assert load(name, encoding=encoding, streaming=streaming) == rows


def parquet(path: Path, table: pa.Table | None = None, **options: Any) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS) if table is None else table, path, **options)


def cut(path: Path) -> None:
    parquet(path)
    path.write_bytes(path.read_bytes()[:-30])


def damaged(path: Path) -> None:
    """The pages of the second of three groups of rows are overwritten; the footer is as it was."""
    parquet(path, row_group_size=1, compression="gzip")
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)


NAMES_TWICE = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "chosen", "prompt"])
BYTES = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
NOT_UTF8 = pa.table({"prompt": pa.Array.from_buffers(pa.string(), 1, BYTES)})

BAD_PARQUET: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no rows": (lambda path: parquet(path, pa.Table.from_pylist(ROWS)[:0]), r"must hold at least one row; found none"),
    "no columns": (lambda path: parquet(path, pa.table({})), r"could not be read: it has no columns. Check the file"),
    "a name twice": (lambda path: parquet(path, NAMES_TWICE), r"a name of its own; found 'prompt' twice"),
    "cut": (cut, r"b.parquet could not be read: .*Check the file"),
    "damaged": (damaged, r"b.parquet could not be read from row \d on: "),
    "not UTF-8": (lambda path: parquet(path, NOT_UTF8), r"b.parquet could not be read from row 0 on: .*UTF8"),
    "text": (lambda path: path.write_text(LINES), r"b.parquet could not be read: "),
    "gzip": (
        lambda path: path.write_bytes(gzip.compress(LINES.encode())),
        r"by its first bytes it is compressed by gzip",
    ),
    "encrypted": (lambda path: path.write_bytes(b"PARE" + bytes(99) + b"PARE"), r"it is an encrypted Parquet file"),
}


@both_ways
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize(("write", "message"), BAD_PARQUET.values(), ids=[*BAD_PARQUET])
def test_parquet_that_is_refused(load, tmp_path, write, message, in_folder, streaming) -> None:
    """In a folder beside a sound file, too, the faulty one is named."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/b.parquet")
    if in_folder:
        columns = ["prompt", "chosen"] if message.startswith("a name") else ["prompt"]
        sound = pa.Table.from_pylist(ROWS)
        parquet(tmp_path / "data/a.parquet", sound.select(columns) if "UTF8" in message else sound)
    with pytest.raises(ValueError, match=message) as caught:
        load("data" if in_folder else "data/b.parquet", streaming=streaming)
    assert str(tmp_path / "data/b.parquet") in str(caught.value)


@both_ways
def test_parquet_files_of_other_columns_or_types(load, tmp_path, streaming) -> None:
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data/a.parquet")
    parquet(tmp_path / "data/b.parquet", pa.Table.from_pylist(ROWS).rename_columns(["prompt", "chosen", "x"]))
    with pytest.raises(
        ValueError, match=r"same columns; found \['prompt', 'chosen', 'rejected'\] in .*a.parquet and .*x"
    ):
        load("data", streaming=streaming)
    parquet(tmp_path / "data/b.parquet", pa.table({"prompt": [[{"role": "user"}]], "chosen": ["a"], "rejected": ["b"]}))
    with pytest.raises(ValueError, match=r"b.parquet could not be read from row 0 on: Couldn't cast"):
        load("data", streaming=streaming)


def card(data_files: str, more: str = "") -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n{more}---\n"


BAD_FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "an empty file": ({"a.jsonl": LINES, "b.jsonl": ""}, r"b.jsonl must hold at least one row; found an empty file"),
    "blank lines": ({"a.jsonl": LINES, "b.jsonl": "\n\n"}, r"b.jsonl must hold at least one row; found an empty file"),
    "names alone": ({"a.csv": TABLE, "b.csv": HEADER}, r"b.csv must hold at least one row; found none"),
    "a bad line": ({"a.jsonl": LINES, "b.jsonl": LINES + "{"}, r"b.jsonl, line 4, column 2: malformed JSON"),
    "other names": (
        {"a.csv": TABLE, "b.csv": "x,y\n1,2\n"}, r"same columns; found .* in .*a.csv and \['x', 'y'\] in .*b.csv",
    ),
    "packed": (
        {"data/train.jsonl.gz": "x", "a.jsonl": LINES, "README.md": card("'**/*l*'")},
        r"must be unpacked; found .*train.jsonl.gz",
    ),
}  # fmt: skip


@both_ways
@pytest.mark.parametrize(("files", "message"), BAD_FOLDERS.values(), ids=[*BAD_FOLDERS])
def test_folders_in_which_a_file_is_refused(load, tmp_path, files, message, streaming) -> None:
    write_folder(tmp_path / "data", files)
    with pytest.raises(ValueError, match=message):
        load("data", streaming=streaming)


def write_folder(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


OUTSIDE = [
    "../secret.jsonl", "FOLDER/secret.jsonl", "'**/../../secret.jsonl'", "sub/../../secret.jsonl", "'../*.jsonl'",
    "'..'", "[a.jsonl, ../secret.jsonl]", "[{split: train, path: ../secret.jsonl}]",
    "[{split: x, path: [a.jsonl, ../secret.jsonl]}]",
    "file://FOLDER/secret.jsonl", "https://example.com/a.jsonl", "hf://datasets/a/b/c.jsonl", "zip://x::../a.zip",
    "simplecache::../secret.jsonl", "'~/a.jsonl'", "'C:/a.jsonl'", "'..\\secret.jsonl'",
]  # fmt: skip


@pytest.mark.parametrize("data_files", OUTSIDE)
@pytest.mark.parametrize("file_name", ["README.md", ".huggingface.yaml"])
def test_metadata_do_not_reach_outside_of_their_folder(load, tmp_path, data_files, file_name) -> None:
    (tmp_path / "secret.jsonl").write_text(LINES)
    text = card(data_files.replace("FOLDER", str(tmp_path)))
    text = text if file_name == "README.md" else text.replace("---\n", "")
    write_folder(tmp_path / "data", {"a.jsonl": LINES, "sub/b.jsonl": LINES, file_name: text})
    with pytest.raises(
        ValueError, match=r"metadata of the folder .*data .* they name .* outside of the folder. Correct"
    ):
        load("data")


UNUSABLE_CARDS = {
    "---\n{oops\n---\n": r"README.md is no YAML, while parsing",
    "---\n" + "{a: " * 9999 + "\n---\n": r"README.md is no YAML",
    "---\nx: !!python/object/apply:os.system ['false']\n---\n": r"README.md is no YAML, could not determine",
    "---\n" + "x: y\n" * 200_001 + "---\n": r"README.md has a head of over 1000000 characters",
    "---\nconfigs: &a [*a]\n---\n": r"`configs` must be a list of mappings; found \[\[\[",
    "---\nconfigs: [{config_name: [x]}]\n---\n": r"each of `configs` needs a `config_name` of its own",
    "---\nconfigs: [{config_name: x}, {config_name: x}]\n---\n": r"each of `configs` needs a `config_name` of its own",
    "---\nconfigs: [{config_name: x, data_dir: ..}]\n---\n": r"they name '..', which is outside",
    "---\nconfigs: [{config_name: x, data_dir: [sub]}]\n---\n": r"paths must be text; found \['sub'\]",
    card("3"): r"`data_files` must be paths, or a `split` and a `path` each; found 3",
    card("[[a.jsonl]]"): r"`data_files` must be paths, or a `split`",
    card("[{split: '../x', path: a.jsonl}]"): r"`data_files` must be paths, or a `split`",
    card("[{split: x, path: a.jsonl}, {split: x, path: a.jsonl}]"): r"`data_files` must be paths, or a `split`",
    card("absent.jsonl"): r"its files could not be found, Unable to find",
    card("'*.csv'"): r"no .json, .jsonl, .parquet, .csv files are where `data_files` looks",
}


@pytest.mark.parametrize(("text", "message"), UNUSABLE_CARDS.items())
def test_metadata_that_cannot_be_used(load, tmp_path, text, message) -> None:
    write_folder(tmp_path / "data", {"a.jsonl": LINES, "sub/b.jsonl": LINES, "README.md": text})
    with pytest.raises(ValueError, match=message):
        load("data")


TWO = "---\nconfigs:\n- config_name: en\n  data_files: a.jsonl\n- config_name: de\n  data_files: b/*.jsonl\n---\n"


@both_ways
def test_metadata_that_stay_in_their_folder(load, tmp_path, streaming) -> None:
    write_folder(tmp_path / "two", {"a.jsonl": "{", "b/x.jsonl": LINES, "README.md": TWO})
    assert load("two", name="de", streaming=streaming) == ROWS
    with pytest.raises(ValueError, match=r"no `name` was given; .* has the configurations \['en', 'de'\]. Choose one"):
        load("two", streaming=streaming)
    with pytest.raises(ValueError, match=r"name='fr' was asked for; .* has the configurations \['en', 'de'\]"):
        load("two", name="fr", streaming=streaming)
    splits = card("[{split: one, path: a.csv}, {split: two, path: [b.csv]}]", "  sep: ';'\n")
    tables = {name: TABLE.replace(",", ";") for name in ("a.csv", "b.csv")}
    write_folder(tmp_path / "splits", {**tables, "c.jsonl": "{", "README.md": splits})
    assert load("splits", streaming=streaming) == {"one": ROWS, "two": ROWS}
    assert load("splits", split="two", streaming=streaming) == ROWS
    write_folder(tmp_path / "plain", {"a.jsonl": LINES})
    with pytest.raises(ValueError, match=r"name='x' chooses a configuration; .* has none"):
        load("plain", name="x", streaming=streaming)


def test_what_else_lies_in_a_folder_is_not_read(load, tmp_path) -> None:
    """A loading script, metadata of other times, hidden files; a link is the user's own and is followed."""
    infos = json.dumps({"default": {"features": {"x": 3}, "download_checksums": {"../secret.jsonl": {}}}})
    other = {"data.py": "raise SystemExit", "dataset_infos.json": infos, "config.json": "{", ".cache.jsonl": "{"}
    card_of_types = "---\ndataset_info: {features: [{name: prompt, dtype: int8}], splits: [{name: x}]}\n---\n"
    write_folder(tmp_path / "data", {"train.jsonl": LINES, **other, "README.md": card_of_types})
    assert load("data") == ROWS
    write_folder(tmp_path / "elsewhere", {"x.jsonl": LINES})
    (tmp_path / "data/test.jsonl").symlink_to(tmp_path / "elsewhere/x.jsonl")
    assert load("data") == {"train": ROWS, "test": ROWS}


DATA_FILE = "data-00000-of-00001.arrow"


def state(**changes: Any) -> Callable[[Path], None]:
    """A damage: `state.json` with these entries."""

    def change(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def bytes_of(name: str, start: int, end: int) -> Callable[[Path], Any]:
    """A damage: only those bytes of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[start:end])


BAD_SAVED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (bytes_of(DATA_FILE, 0, -100), rf"{DATA_FILE} should be part .*could not be read from row 0 on"),
    "no start": (bytes_of(DATA_FILE, 100, 9999), rf"{DATA_FILE} should be part .*could not be read from row 0 on"),
    "nothing in it": (bytes_of(DATA_FILE, 0, 0), rf"{DATA_FILE} must hold at least one row; found an empty file"),
    "missing": (lambda folder: (folder / DATA_FILE).unlink(), rf"{DATA_FILE} could not be opened: No such file"),
    "no info": (
        lambda folder: (folder / "dataset_info.json").unlink(),
        r"dataset_info.json could not be opened: No such",
    ),
    "info cut": (bytes_of("dataset_info.json", 0, 20), r"dataset_info.json should be part .*; it is no JSON"),
    "state cut": (bytes_of("state.json", 0, 20), r"state.json should be part .*; it is no JSON"),
    "state deep": (lambda folder: (folder / "state.json").write_text("[" * 9999), r"state.json should .*it is no JSON"),
    "state a list": (lambda folder: (folder / "state.json").write_text("[]"), r"must be a JSON object; found list"),
    "no files": (state(_data_files=[]), r"must hold at least one row; found none"),
    "files of no kind": (state(_data_files=3), r"`_data_files` must be a list of files; found 3"),
    **{
        name: (state(_data_files=[{"filename": name}]), r"state.json should .* must name files in the folder; found")
        for name in ("../other/" + DATA_FILE, "/etc/passwd", "..", "", "C:x", "..\\x")
    },
    "wrong format": (state(_format_type="no such"), r"could not be loaded, .*Save the dataset again"),
    "a pipe": (lambda folder: ((folder / DATA_FILE).unlink(), os.mkfifo(folder / DATA_FILE)), r"found a pipe, .*arrow"),
}


@both_ways
@pytest.mark.parametrize(("damage", "message"), BAD_SAVED.values(), ids=[*BAD_SAVED])
def test_saved_datasets_that_are_refused(tmp_path, damage, message, streaming) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved/other")
    damage(tmp_path / "saved/train")
    for path in ("saved", "saved/train"):
        with pytest.raises(ValueError, match=message):
            load_preferences(tmp_path / path, streaming=streaming)


@pytest.mark.parametrize("splits", [["../other"], ["/etc"], [], "train", [3], [""]])
def test_splits_of_saved_datasets_stay_in_their_folder(tmp_path, splits) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(ValueError, match=r"dataset_dict.json should .* `splits` must be names of folders"):
        load_preferences(tmp_path / "saved")


def test_a_saved_dataset_as_a_stream(tmp_path) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    stream = load_preferences(tmp_path / "saved", streaming=True)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == ROWS
    with pytest.raises(
        ValueError, match=r"option\(s\) \['num_proc'\] were given .* only \['streaming', 'keep_in_memory'\]"
    ):
        load_preferences(tmp_path / "saved", num_proc=2)


SPLITS: dict[str, list[int] | str] = {
    "train": [0, 1, 2],
    "train[:2]": [0, 1],
    "train[-34%:]": [2],
    "train[2:100]": [2],
    "train[:1]+train[2:]": [0, 2],
    "all": [0, 1, 2],
    "train[:0]": r"which has no rows; .* holds \{'train': 3\}. Write one of \['train'\], or a part",
    "train[3:]": r"which has no rows",
    "train[2:1]": r"which has no rows",
    "train[-5%:]": r"which has no rows",
    "train[abc]": r"data could not be read: Unrecognized instruction format: train\[abc\]",
    "train[1:2": r"data could not be read: Unrecognized instruction",
    "train[::2]": r"data could not be read: Unrecognized instruction",
    "train[:200%]": r"data could not be read: ",
    "training": r"data could not be read: Unknown split \"training\"",
    "train\n": r"data could not be read: A split is one line of text",
    "": r"data could not be read: ",
}


@pytest.mark.parametrize(("split", "expected"), SPLITS.items())
def test_splits_and_parts_of_them(load, tmp_path, split, expected) -> None:
    write_folder(tmp_path / "data", {"train.jsonl": LINES})
    if isinstance(expected, list):
        assert load("data", split=split) == [ROWS[number] for number in expected]
    else:
        with pytest.raises(ValueError, match=expected):
            load("data", split=split)
    if "[" in split:
        with pytest.raises(
            ValueError, match=r"as a stream, which is a whole split|which has no rows|could not be read"
        ):
            load("data", split=split, streaming=True)


def pipe(path: Path) -> None:
    os.mkfifo(path)


NO_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pipe": (pipe, r"must be a file.*; found a pipe, .*b.jsonl"),
    "a device": (lambda path: path.symlink_to("/dev/null"), r"must be a file.*; found a device, .*b.jsonl"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), r"link to nowhere, where nothing is|No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), r"could not be opened: Too many levels"),
}


@both_ways
@pytest.mark.parametrize(("make", "message"), NO_FILES.values(), ids=[*NO_FILES])
def test_what_is_no_file(load, tmp_path, make, message, streaming) -> None:
    write_folder(tmp_path / "data", {"a.jsonl": LINES})
    make(tmp_path / "data/b.jsonl")
    for path in ("data/b.jsonl", "data"):
        with pytest.raises(ValueError, match=message):
            load(path, streaming=streaming)


@pytest.mark.parametrize("path", ["", "  ", "a\0b", "x" * 5000, "~no-such-user/a", "\x1b[31ma.jsonl", "a\nb.jsonl"])
def test_paths_that_name_nothing(tmp_path, monkeypatch, path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"preference data was asked for from '") as caught:
        load_preferences(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", ["data[1]", "a*b", "a b", "{x}", "-x", "x.jsonl", "\xe9", "#x", "a\nb", "%41", "csv"])
def test_paths_of_odd_names(load, tmp_path, name) -> None:
    write_folder(tmp_path / name, {"train.jsonl": LINES})
    assert load(name) == ROWS
    assert load(f"{name}/train.jsonl", streaming=True) == ROWS
    (tmp_path / name / "train.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"train.jsonl, line 1, column 2: malformed JSON") as caught:
        load(name)
    assert str(caught.value).isprintable()


def test_a_file_that_may_not_be_read(load, tmp_path, monkeypatch) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)

    def refuse(path: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        ValueError, match=r"a.jsonl could not be opened: Permission denied. Check the path and its rights"
    ):
        load("a.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "nope"}, r"encoding='nope' is no encoding of text"),
        ({"encoding": "rot13"}, r"encoding='rot13' is no encoding of text"),
        ({"sep": ",,"}, r"sep=',,' must be one character"),
        ({"data_files": "x"}, r"the option\(s\) \['data_files'\] were given for .*a.json, .*pass the dataset"),
        ({"field": "x"}, r"field='x' was asked for; .*a.json must be an object .* found list"),
    ],
)
def test_options_that_are_refused(load, tmp_path, options, message) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with pytest.raises(ValueError, match=message):
        load("a.json", **options)


def test_fields_that_are_refused(load, tmp_path) -> None:
    for value, message in (
        ({"x": []}, r"found \[\]"),
        ({"y": ROWS}, r"found the keys \['y'\]"),
        ({"x": [1]}, "element 0"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(value))
        with pytest.raises(ValueError, match=message):
            load("a.json", field="x")


def place_of(dataset: AnyRows, row: int) -> str | None:
    places = places_of(dataset)
    return None if places is None else pickle.loads(pickle.dumps(places)).of(row)


@both_ways
def test_the_place_of_a_row(load, tmp_path, streaming) -> None:
    """The line of a row is that of its first character, over blank lines, several files and parts of splits."""
    write_folder(tmp_path / "data", {"a.jsonl": "\n" + LINES.replace("\n", "\n\n"), "b.jsonl": LINES})
    options: dict[str, Any] = {"cache_dir": str(tmp_path / ".cache"), "streaming": streaming}
    loaded: Any = load_preferences(tmp_path / "data", **options)
    places = [place_of(loaded, number) for number in range(7)]
    a, b = tmp_path / "data/a.jsonl", tmp_path / "data/b.jsonl"
    assert places == [f"{a}, line 2", f"{a}, line 4", f"{a}, line 6", *(f"{b}, line {n}" for n in (1, 2, 3)), None]
    if not streaming:
        part: Any = load_preferences(tmp_path / "data", split="train[2:4]", **options)
        assert [place_of(part, number) for number in range(3)] == [f"{a}, line 6", f"{b}, line 1", None]
        assert place_of(loaded.select([1, 0]), 0) is None
        assert place_of(loaded.rename_column("prompt", "question"), 0) is None
    (tmp_path / "c.csv").write_text(HEADER + '"a\nb",c,d\n\ne,f,g\n')
    parquet(tmp_path / "d.parquet")
    rows: Any = load_preferences(tmp_path / "c.csv", **options)
    assert [place_of(rows, number) for number in range(2)] == [f"{tmp_path}/c.csv, line {n}" for n in (2, 5)]
    rows = load_preferences(tmp_path / "d.parquet", **options)
    assert place_of(rows, 2) == f"{tmp_path}/d.parquet, row 2"


def test_a_stream_goes_to_other_processes(tmp_path) -> None:
    write_folder(tmp_path / "data", {"a.jsonl": LINES, "b.jsonl": LINES})
    stream: Any = load_preferences(tmp_path / "data", streaming=True, cache_dir=str(tmp_path / ".cache"))
    assert stream.num_shards == 2
    read = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(read, key=str) == sorted([*ROWS, *ROWS], key=str)


def test_a_file_that_has_changed_is_read_anew(load, tmp_path) -> None:
    """The cache goes by time and size, and by the options."""
    (tmp_path / "a.csv").write_text(TABLE)
    assert load("a.csv") == ROWS
    (tmp_path / "a.csv").write_text(HEADER + "a,b,c\n")
    assert load("a.csv") == [text_row("a", "b", "c")]
    stamp = (tmp_path / "a.csv").stat()
    (tmp_path / "a.csv").write_text(HEADER + "a,b,cc\n")
    os.utime(tmp_path / "a.csv", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load("a.csv") == [text_row("a", "b", "cc")]


def test_a_stream_names_the_file_that_was_cut_meanwhile(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    stream = load_preferences(tmp_path / "a.jsonl", streaming=True)
    (tmp_path / "a.jsonl").write_text(LINES + "{")
    with pytest.raises(ValueError, match=r"a.jsonl, line 4, column 2: malformed JSON"):
        list(stream)
