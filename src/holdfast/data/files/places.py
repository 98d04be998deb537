"""A row's number -> the file and the line it comes from, for datasets that `load_preferences` has read from files.

The files are read again up to that row, so that nothing is kept for the rows that have no fault.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, final
from weakref import WeakKeyDictionary

from datasets import Dataset, IterableDataset

from holdfast.data.files.contents import Contents, Reading
from holdfast.data.files.faults import show
from holdfast.data.files.splits import rows_of_split

AnyRows = Dataset | IterableDataset


class Places(Protocol):
    """Where the rows of a dataset come from. It can be sent to another process, as a row function of a stream is."""

    def of(self, row: int, values: Mapping[str, Any] | None = None) -> str | None:
        """The place of the row of that number, counted from 0, in words; None where it is not known. `values` is the
        row itself, where it is at hand."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows of a file that follow each other in the dataset."""

    path: Path
    first: int
    num_rows: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlaces:
    """Where the rows of files come from."""

    reading: Reading
    parts: tuple[_Part, ...]

    def of(self, row: int, values: Mapping[str, Any] | None = None) -> str | None:
        """`pairs.jsonl, line 7`: the place of the row of that number, counted from 0; None for one that there is not.

        A row of a Parquet file is named by its number in the file.
        """
        for part in self.parts:
            if row < part.num_rows:
                return _place(part.path, part.first + row, self.reading)
            row -= part.num_rows
        return None


_PLACES: WeakKeyDictionary[AnyRows, Places] = WeakKeyDictionary()


def places_of(dataset: AnyRows) -> Places | None:
    """Where the rows of the dataset come from; None unless it is one that was loaded from files, as it was loaded, or a
    mixture.

    A dataset that was mapped, filtered, selected from, renamed or shuffled is another one, whose rows have no place.
    """
    return _PLACES.get(dataset)


def remember(dataset: AnyRows, places: Places) -> None:
    """Note where the rows of a dataset come from."""
    _PLACES[dataset] = places


def keep_places(rows: AnyRows, of: AnyRows) -> None:
    """Notes that `rows` are those of the dataset `of`, or the first of them, in the same order."""
    if (places := places_of(of)) is not None:
        _PLACES[rows] = places


def remember_places(dataset: AnyRows, contents: Contents, split: str, path: Path) -> None:
    """The same for a dataset that was loaded as that split of these contents."""
    parts = []
    for name, start, end in rows_of_split(split, contents.split_lengths, path):
        before = 0
        for file in contents.files[name]:
            length = contents.num_rows[file]
            first, last = max(start - before, 0), min(end - before, length)
            if first < last:
                parts.append(_Part(path=file, first=first, num_rows=last - first))
            before += length
    remember(dataset, FilePlaces(reading=contents.reading, parts=tuple(parts)))


def _place(path: Path, row: int, reading: Reading) -> str:
    if reading.kind == "parquet":
        return f"{show(path)}, row {row}"
    try:
        line, _ = next(islice(reading.rows(path), row, None))
    except (OSError, StopIteration, ValueError):  # changed meanwhile
        return f"{show(path)}, row {row}"
    return f"{show(path)}, line {line}"
