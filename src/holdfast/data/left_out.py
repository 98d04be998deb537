"""Which rows of a prepared dataset were left out: how many, by reason, for what reports on a run later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

from datasets import Dataset


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Of `num_rows` rows, so many were left out for each reason (those of `usability.UNUSABLE_REASONS`)."""

    num_rows: int
    by_reason: Mapping[str, int]


def note_left_out(dataset: Dataset, left_out: LeftOut) -> None:
    """Notes what was left out of the rows that `dataset` was made of."""
    _LEFT_OUT[dataset] = left_out


def left_out_of(dataset: Any) -> LeftOut | None:
    """What was left out; None for a dataset that was not prepared, and for a stream."""
    return _LEFT_OUT.get(dataset) if isinstance(dataset, Dataset) else None


_LEFT_OUT: WeakKeyDictionary[Dataset, LeftOut] = WeakKeyDictionary()
