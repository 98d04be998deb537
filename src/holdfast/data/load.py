"""A path or a name -> a dataset. Files are read by our own rules (see `data.files`), names on the hub by `datasets`.

Local files are read twice: once to check each row and to find the types of the columns, and once into the cache. So a
fault is an error with file and line before anything else happens, for a stream as for a dataset that is loaded whole.
CSV columns are text, so that an answer "42" or "NA" stays what it is.

Given up: the time of that first reading (about two seconds of CPU for 300 MB of JSON), folders of several formats, of
which `datasets` would read only one, and the options of its readers: whoever needs them loads with `datasets` and hands
the dataset over.
"""

import difflib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetNotFoundError

from holdfast.data.files.builder import load_contents
from holdfast.data.files.contents import KINDS, Reading, examine
from holdfast.data.files.faults import brief, kind_of, show, words_of
from holdfast.data.files.folder import files_of_folder, kind_of_files
from holdfast.data.files.places import places_of, remember_places
from holdfast.data.files.saved import is_saved, load_saved
from holdfast.data.files.splits import rows_of_split, whole_splits
from holdfast.data.row_error import naming_places
from holdfast.data.shapes.convert import with_columns
from holdfast.data.shapes.mapping import ColumnMapping, check_mapping

AnyDataset = Dataset | IterableDataset | DatasetDict | IterableDatasetDict

_OF_READING = ("encoding", "field", "sep", "delimiter")
_OF_LOADING = ("streaming", "cache_dir", "num_proc", "keep_in_memory", "download_mode")
_OF_SAVED = ("streaming", "keep_in_memory")


def load_preferences(
    path_or_name: str | Path,
    *,
    split: str | None = None,
    name: str | None = None,
    columns: ColumnMapping | None = None,
    **kwargs: Any,
) -> AnyDataset:
    """The dataset in a local file or folder, or of that name on the hub; a dict of its splits when it has several.

    A file is `.json` (one array of objects, or one object a line), `.jsonl`, `.parquet` or `.csv`, and is the split
    "train". A folder holds such files of one kind, or a dataset written by `save_to_disk`. What exists locally is
    taken before the hub is asked. `split` chooses a split, or a part of one (`train[:10%]`), `name` a configuration of
    a hub dataset or folder. `columns` is the name of a public format, or a mapping from what holdfast reads to the
    columns of the dataset (see `holdfast.data.shapes.mapping`).

    For files, `kwargs` are `encoding`, `field` (of JSON), `sep` or `delimiter` (of CSV), and of `datasets.load_dataset`
    `streaming`, `cache_dir`, `num_proc`, `keep_in_memory` and `download_mode`. For a name on the hub they go to
    `datasets.load_dataset`.

    Raises `ValueError` for a missing or empty file (with near names), an unknown kind of file, for what is malformed
    (with file and line), for an option that is unknown, for a split that does not exist or has no rows, and for
    `columns` that cannot be or that the dataset does not have (with the nearest).
    """
    if columns is not None:
        check_mapping(columns)
    loaded = _load(path_or_name, split, name, kwargs)
    if columns is None:
        return loaded
    if not isinstance(loaded, DatasetDict | IterableDatasetDict):
        return _with_columns(loaded, columns, split or "train")
    return type(loaded)({part: _with_columns(rows, columns, str(part)) for part, rows in loaded.items()})


def _with_columns(rows: Any, columns: ColumnMapping, name: str) -> Any:
    with naming_places(places_of(rows)):
        return with_columns(rows, columns, name=name)


def _load(path_or_name: str | Path, split: str | None, name: str | None, kwargs: dict[str, Any]) -> AnyDataset:
    path = _path(path_or_name)
    split = None if split is None else str(split)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = 0
    except (OSError, ValueError) as error:
        raise ValueError(
            f"preference data was asked for from '{show(path)}', which could not be opened: "
            f"{getattr(error, 'strerror', None) or error}. Check the path and its rights."
        ) from error
    if mode == 0:
        return _load_by_name(str(path_or_name), path, split, name, kwargs)
    if stat.S_ISDIR(mode):
        return _load_folder(path, split, name, kwargs)
    if stat.S_ISREG(mode):
        return _load_file(path, split, name, kwargs)
    raise ValueError(
        f"preference data must be a file or a folder; found {kind_of(mode)}, {show(path)}. Write the rows to a file, "
        "and give its path."
    )


def _path(path_or_name: str | Path) -> Path:
    if not str(path_or_name).strip():
        raise ValueError(
            f"preference data was asked for from {str(path_or_name)!r}, which names nothing. Give the path of a file "
            "or folder ('.' is the current one), or a name on the hub."
        )
    try:
        return Path(path_or_name).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"preference data was asked for from '{show(path_or_name)}'; {error}. Write the home folder out."
        ) from error


def _load_by_name(asked: str, path: Path, split: str | None, name: str | None, kwargs: dict[str, Any]) -> AnyDataset:
    """The dataset of that name on the hub, for a path at which nothing is."""
    if _looks_local(asked):
        raise ValueError(f"preference data was asked for from '{show(asked)}'; {_not_found(path)}")
    try:
        loaded = datasets.load_dataset(asked, name, split=split, **kwargs)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"preference data was asked for from '{show(asked)}'; {_not_found(path)} Nor could it be loaded as "
            f"the name of a hub dataset: {words_of(error)}."
        ) from error
    return _only_split(loaded)


def _load_file(path: Path, split: str | None, name: str | None, kwargs: dict[str, Any]) -> AnyDataset:
    kind_of_files([path])
    if name is not None:
        raise ValueError(
            f"name={name!r} chooses a configuration of a hub dataset or folder; {show(path)} is a file, which has "
            "none. Leave `name` out."
        )
    if split is not None and not split.startswith("train"):
        raise ValueError(
            f"split={brief(split)} was asked for; the file {show(path)} is one split, 'train'. Leave `split` out, or "
            "take a part of it, such as 'train[:100]'."
        )
    return _load_files(path, {"train": [path]}, split or "train", kwargs)


def _load_folder(path: Path, split: str | None, name: str | None, kwargs: dict[str, Any]) -> AnyDataset:
    if not is_saved(path):
        files, options = files_of_folder(path, name)
        return _load_files(path, files, split, {**options, **kwargs})
    if name is not None:
        raise ValueError(
            f"name={name!r} chooses a configuration of a hub dataset or folder; {show(path)} was written by "
            "`save_to_disk`, which has none. Leave `name` out."
        )
    _check_options(kwargs, _OF_SAVED, path)
    return _only_split(load_saved(path, split, **kwargs))


def _load_files(
    path: Path, files: Mapping[str, list[Path]], split: str | None, options: Mapping[str, Any]
) -> AnyDataset:
    """The dataset of these files by split, which are the file `path` or lie in that folder."""
    _check_options(options, (*_OF_READING, *_OF_LOADING), path)
    reading = _reading([file for of_split in files.values() for file in of_split], options)
    contents = examine(files, reading)
    if split is not None:
        rows_of_split(split, contents.split_lengths, path)
        if options.get("streaming"):
            split = whole_splits(split, contents.split_lengths, path)
    loaded = load_contents(contents, split, **{key: options[key] for key in _OF_LOADING if key in options})
    for name, part in loaded.items() if isinstance(loaded, dict) else [(split or "train", loaded)]:
        remember_places(part, contents, str(name), path)
    return _only_split(loaded)


def _reading(files: list[Path], options: Mapping[str, Any]) -> Reading:
    """How the files are to be read. Raises `ValueError` for an unknown encoding or separator."""
    encoding, separator = options.get("encoding") or "utf-8-sig", options.get("sep") or options.get("delimiter") or ","
    kind = kind_of_files(files)
    field = options.get("field")
    try:
        "{}".encode(encoding)
    except (LookupError, TypeError, UnicodeError) as error:
        raise ValueError(
            f"encoding={encoding!r} is no encoding of text that Python knows. Give one such as 'latin-1'."
        ) from error
    if not isinstance(separator, str) or len(separator) != 1 or separator in '\0\r\n"':
        raise ValueError(f"sep={separator!r} must be one character between the fields of a CSV file, such as ';'.")
    return Reading(kind=kind, encoding=encoding, field=field, separator=separator)  # type: ignore[arg-type]


def _check_options(options: Mapping[str, Any], known: tuple[str, ...], path: Path) -> None:
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"the option(s) {unknown} were given for {show(path)}, for which only {list(known)} are known. Leave them "
            "out, or load it with `datasets.load_dataset` and pass the dataset."
        )


def _only_split(loaded: AnyDataset) -> AnyDataset:
    if isinstance(loaded, DatasetDict | IterableDatasetDict) and len(loaded) == 1:
        return next(iter(loaded.values()))
    return loaded


def _looks_local(path_or_name: str) -> bool:
    """A name on the hub is `name` or `owner/name`, without a file's suffix."""
    is_path = path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") > 1 or "\\" in path_or_name
    return is_path or Path(path_or_name).suffix.lower() in KINDS


def _not_found(path: Path) -> str:
    if path.is_symlink():
        return f"it is a symbolic link to {show(path.readlink())}, where nothing is. Check the link."
    folder = path.parent
    if not folder.is_dir():
        return f"there is no such file, and no folder {show(folder)}. Check the path."
    names = sorted(show(item.name) for item in folder.iterdir() if not item.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"near names in {show(folder)}: {near}" if near else f"{show(folder)} holds {names[:5] or 'nothing'}"
    return f"there is no such file or folder; {hint}. Check the path."
