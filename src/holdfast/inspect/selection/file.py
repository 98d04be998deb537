"""Rows of a dataset as a file that training reads like the one they come from: JSON lines, or Parquet by its suffix.

All columns stay, and rows keep their order. The file has its name only once it is complete. Given up: dates and other
values that JSON has no word for; Parquet keeps them.
"""

import io
import json
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from holdfast.data.progress import bars
from holdfast.inspect.ranking.shares import Values
from holdfast.store.files import write_durably

SUFFIXES = (".jsonl", ".parquet")


def check_output(path: Path) -> None:
    """ValueError where rows cannot be written to this path, or something is there already."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--output is to be {str(path)!r}. Name a file that ends in {' or '.join(SUFFIXES)}.")
    if path.exists() or path.is_symlink():
        raise ValueError(
            f"--output is to be {str(path)!r}, which is there already. Remove it, or name another file: nothing is "
            "overwritten."
        )


def check_column(name: str, dataset: Dataset) -> None:
    """ValueError where a column of this name cannot be added."""
    if not name.strip() or name in dataset.column_names:
        found = "is empty" if not name.strip() else f"is a column of the data ({', '.join(dataset.column_names)})"
        raise ValueError(f"--margin-column is {name!r}, which {found}. Choose another name.")


def write_rows(
    dataset: Dataset, rows: NDArray[np.int64], path: Path, *, column: str | None = None, values: Values | None = None
) -> None:
    """Writes these rows of the dataset, by their numbers. `column` is the name of one that is added, with a number of
    `values` for each row. ValueError where a value cannot be written as JSON, OSError where the file cannot."""
    dataset = dataset.with_format(None)
    with bars(are_shown=False):
        if column is not None and values is not None:
            of_all = np.full(len(dataset), np.nan)
            of_all[rows] = values
            dataset = dataset.add_column(column, of_all.tolist())  # type: ignore[call-arg]
        selected = dataset.select(rows.tolist())
        write_durably(path, _as_parquet(selected) if path.suffix == ".parquet" else _as_lines(selected))


def _as_parquet(rows: Dataset) -> bytes:
    file = io.BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


def _as_lines(rows: Dataset) -> bytes:
    lines = io.StringIO()
    for row in rows:
        assert isinstance(row, dict)
        try:
            lines.write(f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n")
        except (TypeError, ValueError) as error:
            name = next(name for name, value in row.items() if not _is_json(value))
            raise ValueError(
                f"rows were to be written as lines of JSON, which has no word for a value of the column {name!r} "
                f"({error}). Write them to a file that ends in .parquet."
            ) from error
    return lines.getvalue().encode()


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
