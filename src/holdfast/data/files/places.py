"""A row's number -> the file and the line it comes from, for datasets that `load_preferences` has read from files.

The files are read again up to that row, so that nothing is kept for the rows that have no fault.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from weakref import WeakKeyDictionary

from datasets import Dataset, IterableDataset

from holdfast.data.files.contents import Contents, Reading
from holdfast.data.files.faults import show
from holdfast.data.files.splits import rows_of_split

AnyRows = Dataset | IterableDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows of a file that follow each other in the dataset."""

    path: Path
    first: int
    num_rows: int


_PARTS: "WeakKeyDictionary[AnyRows, tuple[Reading, list[_Part]]]" = WeakKeyDictionary()


def remember_places(dataset: AnyRows, contents: Contents, split: str, path: Path) -> None:
    """Note where the rows of a dataset come from, which was loaded as that split of these contents."""
    parts = []
    for name, start, end in rows_of_split(split, contents.split_lengths, path):
        before = 0
        for file in contents.files[name]:
            length = contents.num_rows[file]
            first, last = max(start - before, 0), min(end - before, length)
            if first < last:
                parts.append(_Part(path=file, first=first, num_rows=last - first))
            before += length
    _PARTS[dataset] = (contents.reading, parts)


def place_of(dataset: AnyRows, row: int) -> str | None:
    """`pairs.jsonl, line 7`: where the row of that number comes from; None for rows that are not as they were loaded.

    A dataset that was mapped, filtered, selected from or shuffled is another one, whose rows have no place.
    """
    reading, parts = _PARTS.get(dataset, (None, []))
    for part in parts:
        if row < part.num_rows:
            return _place(part.path, part.first + row, reading)
        row -= part.num_rows
    return None


def _place(path: Path, row: int, reading: Reading | None) -> str:
    if reading is None or reading.kind == "parquet":
        return f"{show(path)}, row {row}"
    try:
        line, _ = next(islice(reading.rows(path), row, None))
    except (OSError, StopIteration, ValueError):  # changed meanwhile
        return f"{show(path)}, row {row}"
    return f"{show(path)}, line {line}"
