"""A folder written by `save_to_disk` -> its dataset, or its splits. Its Arrow files are read once before they are used.

`state.json` names the files. Names that lead out of the folder are refused, and so are files that are cut or damaged,
which would otherwise be met in the middle of a run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from holdfast.data.files.faults import brief, check_readable, no_rows, show, words_of

SPLITS_FILE, STATE_FILE, FILES_KEY = "dataset_dict.json", "state.json", "_data_files"


def is_saved(path: Path) -> bool:
    """Whether the folder was written by `save_to_disk`."""
    return any((path / marker).is_file() for marker in (STATE_FILE, SPLITS_FILE))


def load_saved(
    path: Path, split: str | None, *, streaming: bool = False, keep_in_memory: bool | None = None
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """The dataset saved in the folder, or the one of its splits. Raises `ValueError` for what is missing or damaged."""
    splits = _check_splits(path) if (path / SPLITS_FILE).is_file() else None
    if split is not None and split not in (splits or []):
        raise ValueError(
            f"split={split!r} was asked for; the dataset saved in {show(path)} has {splits or 'no splits'}. "
            f"{'Choose one of them.' if splits else 'Leave `split` out.'}"
        )
    chosen = [split] if split is not None else splits
    for folder in [path / name for name in chosen] if chosen is not None else [path]:
        _check_dataset(folder)
    folder = path if split is None else path / split
    try:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=keep_in_memory)
    except Exception as error:  # whatever their readers make of metadata that are not theirs
        raise _damaged(folder, f"it could not be loaded, {words_of(error)}") from error
    if not streaming:
        return saved
    if isinstance(saved, DatasetDict):
        return IterableDatasetDict({name: part.to_iterable_dataset() for name, part in saved.items()})
    return saved.to_iterable_dataset()


def _check_splits(path: Path) -> list[str]:
    splits = _object(path / SPLITS_FILE).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise _damaged(path / SPLITS_FILE, f"`splits` must be names of folders; found {brief(splits)}")
    for name in splits:
        if not _is_plain(name):
            raise _damaged(path / SPLITS_FILE, f"`splits` must be names of folders in it; found {brief(name)}")
    return splits


def _check_dataset(folder: Path) -> None:
    """ValueError where one of the folder's files is missing, damaged or outside of it, or it has no rows."""
    state = _object(folder / STATE_FILE)
    _object(folder / "dataset_info.json")
    files = state.get(FILES_KEY)
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise _damaged(folder / STATE_FILE, f"`{FILES_KEY}` must be a list of files; found {brief(files)}")
    num_rows = 0
    for file in files:
        name = file.get("filename")
        if not isinstance(name, str) or not _is_plain(name):
            raise _damaged(folder / STATE_FILE, f"`{FILES_KEY}` must name files in the folder; found {brief(name)}")
        num_rows += _num_rows(folder / name)
    if num_rows == 0:
        raise no_rows(folder, "none")


def _num_rows(file: Path) -> int:
    """The number of rows of an Arrow file, all of which is read and checked."""
    check_readable(file)
    num_rows = 0
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                batch.validate(full=True)
                num_rows += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(file, f"it could not be read from row {num_rows} on, {words_of(error)}") from error
    return num_rows


def _object(file: Path) -> Mapping[str, Any]:
    check_readable(file)
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"it is no JSON, {words_of(error)}") from error
    if not isinstance(read, dict):
        raise _damaged(file, f"it must be a JSON object; found {type(read).__name__}")
    return read


def _is_plain(name: str) -> bool:
    """Whether a name is that of something in a folder, and no path that leads out of it."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{show(path)} should be part of a dataset written by `save_to_disk`; {found}. Save the dataset again."
    )
