"""A weight and a target margin for each pair, in columns of the data that a run names (`weight_column`,
`margin_column`).

Like a pair's source they are no model input, and no layout knows them. A collator of its own wraps the run's data
collator and adds one number for each row to what that returns, so a user's own collator works as well. Rows are checked
where their numbers are known: a dataset before anything is scored, a stream as it is read. Given up: a column that is
read because of its name alone; many public datasets have a `margin` that means something else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from datasets import Dataset

from holdfast.batch import PAIR_MARGINS, PAIR_WEIGHTS
from holdfast.visible import visible

_ROWS_AT_A_TIME = 100_000


class PairValueOptions(Protocol):
    """The options of a run (`DPOConfig`) that name the columns."""

    weight_column: str | None
    margin_column: str | None


def pair_value_columns(options: PairValueOptions) -> list[str]:
    """The columns of the data that a run reads one number of each pair from."""
    return [name for name in (options.weight_column, options.margin_column) if name is not None]


def with_pair_values(collator: Any, options: PairValueOptions, *, is_training: bool) -> Any:
    """`collator`; around it, where the run names such columns, one that adds their numbers. Rows that are evaluated may
    lack a column: each pair then counts once, and is to reach the margin 0."""
    keys = {PAIR_WEIGHTS: options.weight_column, PAIR_MARGINS: options.margin_column}
    columns = {key: column for key, column in keys.items() if column is not None}
    return WithPairValues(collator, columns, are_required=is_training) if columns else collator


@final
@dataclass(frozen=True, slots=True)
class WithPairValues:
    """A data collator: what `collator` makes of the rows without these columns, and under each key of `columns` the
    numbers of its column, fp32 [P]. ValueError where a row has none, or one that it may not have; unless they
    `are_required`, a column that no row has is left out."""

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    columns: Mapping[str, str]
    are_required: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        names = set(self.columns.values())
        batch = self.collator([{name: value for name, value in row.items() if name not in names} for row in rows])
        found: dict[str, list[Any]] = {}
        for key, column in self.columns.items():
            if not self.are_required and not any(column in row for row in rows):
                continue
            absent = next((row for row in rows if column not in row), None)
            if absent is not None:
                raise ValueError(_refusal(key, column, f"a row has no such column, but {sorted(absent)}"))
            found[key] = [_plain(row[column]) for row in rows]
            wrong = [value for value in found[key] if not _is_allowed(key, value)]
            if wrong:
                raise ValueError(_refusal(key, column, f"a row has {_shown(wrong[0])}"))
        return {**batch, **{key: torch.tensor(values, dtype=torch.float32) for key, values in found.items()}}


def check_pair_values(options: PairValueOptions, datasets: Mapping[str, Any]) -> None:
    """ValueError where the data to train on lack a column that the run names, or where a row's number may not be.
    Streams are checked as they are read."""
    for key, column in ((PAIR_WEIGHTS, options.weight_column), (PAIR_MARGINS, options.margin_column)):
        for name, dataset in datasets.items():
            if column is None or not isinstance(dataset, Dataset):
                continue
            if column not in dataset.column_names and name != "train":
                continue
            if column not in dataset.column_names:
                raise ValueError(
                    f"{_OPTIONS[key]}={column!r} was asked for; found no such column in the {name} dataset, but "
                    f"{sorted(dataset.column_names)}. Add it, with a number for each row, or name the column that "
                    "has it."
                )
            _check_column(dataset, key, column, name)


def _check_column(dataset: Dataset, key: str, column: str, name: str) -> None:
    rows: Any = dataset.select_columns([column]).with_format("arrow")
    total = 0.0
    for first in range(0, len(dataset), _ROWS_AT_A_TIME):
        values = rows[first : first + _ROWS_AT_A_TIME][column].to_pylist()
        wrong = next((place for place, value in enumerate(values) if not _is_allowed(key, value)), None)
        if wrong is not None:
            found = f"row {first + wrong} of the {name} dataset has {_shown(values[wrong])}"
            raise ValueError(_refusal(key, column, found))
        total += float(np.sum(np.asarray(values, dtype=np.float32), dtype=np.float64))
    if key == PAIR_WEIGHTS and total == 0:
        found = f"all rows of the {name} dataset have 0, so nothing would count (in fp32 less than 1e-45 is 0)"
        raise ValueError(_refusal(key, column, found))


def _plain(value: Any) -> Any:
    """The number that a scalar of numpy or torch holds, since a stream may be formatted; any other value as it is."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0)
    return value.item() if is_scalar else value


def _is_allowed(key: str, value: Any) -> bool:
    """Whether a row may have this value: a finite number, and for a weight of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST and (value >= 0 or key != PAIR_WEIGHTS)  # neither holds of a NaN


def _shown(value: Any) -> str:
    """The value as a message shows it, cut where it is long."""
    text = visible(repr(value))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


_LONGEST_SHOWN = 60
_LARGEST = 1e15
"""Of larger weights the square of a gradient norm may be beyond fp32; a larger margin swallows any policy's."""
_OPTIONS = {PAIR_WEIGHTS: "weight_column", PAIR_MARGINS: "margin_column"}
_DEMANDS = {
    PAIR_WEIGHTS: ("how much each pair counts", "a finite number of at least 0, at most 1e15, such as 1"),
    PAIR_MARGINS: ("the margin that each pair is to reach", "a finite number of at most 1e15 in size, such as 0"),
}


def _refusal(key: str, column: str, found: str) -> str:
    meaning, demand = _DEMANDS[key]
    return (
        f"{_OPTIONS[key]}={column!r} says {meaning}, as {demand}; {found}. Correct these rows, or leave the option out."
    )
