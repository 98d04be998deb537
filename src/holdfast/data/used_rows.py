"""Which rows of a dataset its prepared form has: those that are used, by their numbers as the dataset was loaded."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

_USED: WeakKeyDictionary[Dataset, NDArray[np.int64]] = WeakKeyDictionary()


def remember_used_rows(prepared: Dataset, rows: Sequence[int]) -> None:
    """Notes the rows that a prepared dataset has been left with, in order."""
    _USED[prepared] = np.array(rows, dtype=np.int64)


def used_rows(prepared: Dataset) -> NDArray[np.int64]:
    """The number of each row of a prepared dataset in the dataset that was prepared, counted from 0: all numbers, where
    no row was left out."""
    rows = _USED.get(prepared)
    return np.arange(len(prepared)) if rows is None else rows
