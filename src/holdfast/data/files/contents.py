"""All files of a dataset, read once: each row is checked, the types of the columns are found and the rows counted.

One pass with flat memory, before anything is trained or written. The types are those of the whole: a column that is
None in the first gigabyte and a list after it is a column of lists.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Features, Value

from holdfast.data.files.csv_rows import csv_header, csv_rows
from holdfast.data.files.faults import check_readable, show, words_of
from holdfast.data.files.json_rows import json_rows
from holdfast.data.files.parquet_tables import parquet_features, parquet_tables
from holdfast.data.files.shapes import Shape, table_of

Kind = Literal["json", "csv", "parquet"]

KINDS: dict[str, Kind] = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""The suffixes of files that are read, and what they hold."""

_BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How files are read. `field` is for JSON, `separator` for CSV, and Parquet needs none of them."""

    kind: Kind
    encoding: str = "utf-8-sig"
    field: str | None = None
    separator: str = ","

    def rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The line and the row of each row of a file of text."""
        if self.kind == "csv":
            return csv_rows(path, encoding=self.encoding, separator=self.separator)
        return json_rows(path, encoding=self.encoding, field=self.field)

    def tables(self, file: str, features: Features) -> Iterator[pa.Table]:
        """The rows of a file as tables of these types. Raises `ValueError` with file and line, as the first pass."""
        path = Path(file)
        if self.kind == "parquet":
            yield from parquet_tables(path, features)
            return
        rows = []
        for _, row in self.rows(path):
            rows.append(row)
            if len(rows) == _BATCH_ROWS:
                yield table_of(rows, features)
                rows = []
        if rows:
            yield table_of(rows, features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Files by split, how they are read, the types of their columns, and the number of rows of each file."""

    files: Mapping[str, Sequence[Path]]
    reading: Reading
    features: Features
    num_rows: Mapping[Path, int]

    @property
    def split_lengths(self) -> dict[str, int]:
        """The number of rows of each split."""
        return {split: sum(self.num_rows[file] for file in files) for split, files in self.files.items()}


def examine(files: Mapping[str, Sequence[Path]], reading: Reading) -> Contents:
    """What the files hold. Raises `ValueError` with file and line for the first fault, and for a file without rows."""
    every = list(dict.fromkeys(file for of_split in files.values() for file in of_split))
    for file in every:
        check_readable(file)
    try:
        features, num_rows = {"json": _of_json, "csv": _of_csv, "parquet": _of_parquet}[reading.kind](every, reading)
    except OSError as error:
        raise ValueError(
            f"{show(error.filename or every[0])} could not be read: {words_of(error)}. Check the file(s)."
        ) from error
    return Contents(files=files, reading=reading, features=features, num_rows=num_rows)


def _of_json(files: Sequence[Path], reading: Reading) -> tuple[Features, dict[Path, int]]:
    columns: dict[str, Shape] = {}
    num_rows = {}
    for file in files:
        count = 0
        for line, row in reading.rows(file):
            count += 1
            for name, value in row.items():
                shape = columns.get(name) or columns.setdefault(name, Shape())
                try:
                    shape.add(value)
                except ValueError as error:
                    raise ValueError(
                        f"{show(file)}, line {line}, column {name!r}: {error}. Correct the line or remove it."
                    ) from error
        num_rows[file] = count
    return Features({name: shape.feature(name) for name, shape in columns.items()}), num_rows


def _of_csv(files: Sequence[Path], reading: Reading) -> tuple[Features, dict[Path, int]]:
    num_rows = {file: sum(1 for _ in reading.rows(file)) for file in files}
    headers = [csv_header(file, encoding=reading.encoding, separator=reading.separator) for file in files]
    for file, header in zip(files, headers, strict=True):
        if set(header) != set(headers[0]):
            raise ValueError(
                f"the files of a dataset must have the same columns; found {headers[0]} in {show(files[0])} and "
                f"{header} in {show(file)}. Rename the columns, or give one of the files."
            )
    return Features(dict.fromkeys(headers[0], Value("string"))), num_rows


def _of_parquet(files: Sequence[Path], reading: Reading) -> tuple[Features, dict[Path, int]]:
    found = {file: parquet_features(file) for file in files}
    first = found[files[0]][0]
    for file, (features, _) in found.items():
        if set(features) != set(first):
            raise ValueError(
                f"the files of a dataset must have the same columns; found {list(first)} in {show(files[0])} and "
                f"{list(features)} in {show(file)}. Rename the columns, or give one of the files."
            )
    return first, {file: num_rows for file, (_, num_rows) in found.items()}
