"""A path or a name -> a dataset, through the `datasets` library, with errors that name the file and the line.

JSON files are read once before `datasets` reads them. That library reports a malformed line as a byte offset in some
chunk, or not at all: a line `null` becomes a row of None, and two objects in a line become two rows. CSV columns are
read as text, so that an answer "42" or "NA" stays what it is.

Given up: the time of that first reading (about a second for 200 MB), and folders of several formats, of which
`datasets` would read only one.
"""

import csv
import difflib
import json
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

AnyDataset = Dataset | IterableDataset | DatasetDict | IterableDatasetDict

_BLANK = b"\xef\xbb\xbf \t\r\n"  # white space, and a byte order mark

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_preferences(
    path_or_name: str | Path, *, split: str | None = None, name: str | None = None, **kwargs: Any
) -> AnyDataset:
    """The dataset in a local file or folder, or of that name on the hub; a dict of its splits when it has several.

    A file is `.json` (one array of objects, or one object a line), `.jsonl`, `.parquet` or `.csv`, and is the split
    "train". A folder holds such files of one kind, or a dataset written by `save_to_disk`. What exists locally is
    taken before the hub is asked. `split` chooses a split, `name` a configuration of a hub dataset or folder;
    `kwargs` go to `datasets.load_dataset` (or `load_from_disk`).

    Raises `ValueError` for a missing or empty file (with near names), an unknown kind of file, and malformed JSON
    (with file, line and column).
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return _load_file(path, split, name, kwargs)
    if path.is_dir():
        is_saved = any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
        return _load_saved(path, split, name, kwargs) if is_saved else _load_folder(path, split, name, kwargs)
    if _looks_local(str(path_or_name)):
        raise ValueError(f"preference data was asked for from {str(path_or_name)!r}; {_not_found(path)}")
    try:
        return _only_split(datasets.load_dataset(str(path_or_name), name, split=split, **kwargs))
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"preference data was asked for from {str(path_or_name)!r}; {_not_found(path)} Nor could it be loaded as "
            f"the name of a hub dataset: {error}"
        ) from error


def check_json(path: Path, *, encoding: str = "utf-8-sig") -> None:
    """ValueError with file, line and column where the file does not hold JSON objects.

    They may stand one a line or in one array. A file that is one object on several lines is accepted, too.
    """
    with path.open("rb") as file:
        numbered = ((number, line.rstrip(b"\r\n")) for number, line in enumerate(file, start=1) if line.strip(_BLANK))
        number, line = next(numbered, (0, b""))
        if number == 0:
            raise ValueError(f"{path} must hold at least one row; found an empty file. Check how it was written.")
        if line.lstrip(_BLANK).startswith(b"["):
            rows = _parsed(line + b"\n" + file.read(), path, number, encoding)
            if not rows:
                raise ValueError(f"{path} must hold at least one row; found an empty array. Check how it was written.")
            for index, row in enumerate(rows):
                _check_object(row, f"{path}, element {index} of the array")
            return
        if _is_one_object(path, line, encoding):
            return
        _check_object(_parsed(line, path, number, encoding), f"{path}, line {number}")
        for number, line in numbered:
            _check_object(_parsed(line, path, number, encoding.removesuffix("-sig")), f"{path}, line {number}")


def _parsed(text: bytes, path: Path, number: int, encoding: str) -> Any:
    """The value in `text`, which begins at line `number` of the file."""
    try:
        return json.loads(text.decode(encoding))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number + text[: error.start].count(10)}: the text must be in {encoding}; found {error}. "
            "Convert the file, or pass `encoding=`."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(_malformed(path, number + error.lineno - 1, error)) from error


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(
            f'{where}: a row must be a JSON object such as {{"prompt": ..., "chosen": ..., "rejected": ...}}; found '
            f"{type(value).__name__} {str(value)[:60]}. Correct or remove it."
        )


def _is_one_object(path: Path, first_line: bytes, encoding: str) -> bool:
    """Whether the file is one object on several lines, which its first line alone is not."""
    try:
        json.loads(first_line.decode(encoding))
    except ValueError:
        try:
            return isinstance(json.loads(path.read_text(encoding)), dict)
        except ValueError:
            return False
    return False


def _malformed(path: Path, line: int, error: json.JSONDecodeError) -> str:
    text = error.doc.split("\n")[error.lineno - 1]
    start = max(0, error.colno - 31)
    return (
        f"{path}, line {line}, column {error.colno}: malformed JSON, {error.msg[0].lower() + error.msg[1:]}; found "
        f"...{text[start : error.colno + 30]!r}. Correct the line or remove it."
    )


def _load_file(path: Path, split: str | None, name: str | None, kwargs: dict[str, Any]) -> AnyDataset:
    builder = _builder([path])
    if name is not None:
        raise ValueError(
            f"name={name!r} chooses a configuration of a hub dataset or folder; {path} is a file, which has none. "
            "Leave `name` out."
        )
    if split is not None and not split.startswith("train"):
        raise ValueError(
            f"split={split!r} was asked for; the file {path} is one split, 'train'. Leave `split` out, or take a part "
            "of it, such as 'train[:100]'."
        )
    options = _checked_options([path], builder, kwargs)
    return _load(path, builder, {"data_files": str(path), "split": split or "train", **options})


def _load_folder(path: Path, split: str | None, name: str | None, kwargs: dict[str, Any]) -> AnyDataset:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in BUILDERS and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        found = sorted(item.name for item in path.iterdir())[:5]
        raise ValueError(
            f"the folder {path} must hold {', '.join(BUILDERS)} files or a dataset written by `save_to_disk`; found "
            f"{found or 'nothing'}. Check the path."
        )
    options = _checked_options(files, _builder(files), kwargs)
    return _load(path, str(path), {"name": name, "split": split, **options})


def _load_saved(path: Path, split: str | None, name: str | None, kwargs: dict[str, Any]) -> AnyDataset:
    if name is not None:
        raise ValueError(
            f"name={name!r} chooses a configuration of a hub dataset or folder; {path} was written by `save_to_disk`, "
            "which has none. Leave `name` out."
        )
    saved = datasets.load_from_disk(str(path), **kwargs)
    if split is None:
        return _only_split(saved)
    splits = list(saved) if isinstance(saved, DatasetDict) else []
    if isinstance(saved, DatasetDict) and split in saved:
        return saved[split]
    raise ValueError(
        f"split={split!r} was asked for; the dataset saved in {path} has {splits or 'no splits'}. "
        f"{'Choose one of them.' if splits else 'Leave `split` out.'}"
    )


def _load(path: Path, builder: str, options: dict[str, Any]) -> AnyDataset:
    try:
        return _only_split(datasets.load_dataset(builder, **options))
    except (DatasetGenerationError, StopIteration, OSError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} must hold at least one row; found none. Check how it was written.") from error
        raise ValueError(f"{path} could not be read: {error.__cause__ or error}. Check the file(s).") from error


def _checked_options(files: list[Path], builder: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of `datasets.load_dataset`. Raises `ValueError` for faults of the files that it would not report."""
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} must hold at least one row; found an empty file. Check how it was written.")
        if builder == "json" and "field" not in kwargs:
            check_json(file, encoding=kwargs.get("encoding", "utf-8-sig"))
    if builder != "csv":
        return kwargs
    with files[0].open(encoding=kwargs.get("encoding", "utf-8-sig"), newline="") as file:
        header = next(csv.reader(file, delimiter=kwargs.get("sep", kwargs.get("delimiter") or ",")))
    return {"keep_default_na": False, "features": Features(dict.fromkeys(header, Value("string"))), **kwargs}


def _builder(files: list[Path]) -> str:
    kinds = {BUILDERS.get(file.suffix.lower(), "") for file in files}
    if "" in kinds:
        raise ValueError(f"preference data must be a file of {', '.join(BUILDERS)}; found {files[0]}. Convert it.")
    if len(kinds) > 1:
        raise ValueError(
            f"a folder of preference data must hold files of one kind; found {sorted(kinds)} in {files[0].parent}. "
            "Give one of the files, or move them apart."
        )
    return kinds.pop()


def _only_split(loaded: AnyDataset) -> AnyDataset:
    if isinstance(loaded, DatasetDict | IterableDatasetDict) and len(loaded) == 1:
        return next(iter(loaded.values()))
    return loaded


def _looks_local(path_or_name: str) -> bool:
    """A name on the hub is `name` or `owner/name`, without a file's suffix."""
    is_path = path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") > 1 or "\\" in path_or_name
    return is_path or Path(path_or_name).suffix.lower() in BUILDERS


def _not_found(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no such file, and no folder {folder}. Check the path."
    names = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"near names in {folder}: {near}" if near else f"{folder} holds {names[:5] or 'nothing'}"
    return f"there is no such file or folder; {hint}. Check the path."
