"""`completions.*.response`: the name of a column, and what inside of its values is meant.

A path is a column, followed by keys, by numbers of items (from 0, or from the end below 0), or by `*` for all items,
with dots between them. A column whose own name has dots is meant by its whole name. Given up: conditions, arithmetic.
"""

import difflib
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

Steps = tuple[str | int, ...]
"""A column, and the steps into its values."""

EVERY = "*"


def steps_of(path: str, columns: Collection[str], target: str) -> Steps:
    """The steps of a path in a dataset with these columns. ValueError with the nearest column where there is none."""
    if path in columns:
        return (path,)
    column, *inside = path.split(".")
    if column in columns and inside and all(inside):
        return (column, *(int(step) if _is_number(step) else step for step in inside))
    near = difflib.get_close_matches(column, list(columns), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else "Name one of these."
    raise ValueError(
        f"`columns` was to take {target!r} from {path!r}; the dataset has no such column, but {sorted(columns)}. {hint}"
    )


def value_at(row: Mapping[str, Any], steps: Steps) -> Any:
    """What stands there in a row. ValueError where a key or an item is missing, or what should hold it holds none."""
    return _inside(row[str(steps[0])], steps, 1)


def _inside(value: Any, steps: Steps, number: int) -> Any:
    if number == len(steps):
        return value
    step = steps[number]
    if step == EVERY and isinstance(value, list):
        return [_inside(item, steps, number + 1) for item in value]
    if isinstance(step, int) and isinstance(value, list) and -len(value) <= step < len(value):
        return _inside(value[step], steps, number + 1)
    if isinstance(value, Mapping) and step in value:
        return _inside(value[step], steps, number + 1)
    if isinstance(value, Mapping) and str(step) in value:
        return _inside(value[str(step)], steps, number + 1)
    raise ValueError(
        f"`columns` names {name_of(steps)!r}; found {reprlib.repr(value)} at {name_of(steps[:number])!r}, which has no "
        f"{step!r}. Correct the row, or what `columns` names."
    )


def name_of(steps: Steps) -> str:
    """The path as it is written."""
    return ".".join(map(str, steps))


def _is_number(step: str) -> bool:
    return step.removeprefix("-").isdecimal()
