"""Lengths of many rows in a few numbers: mean, quantiles, and a histogram whose bins double."""

from dataclasses import dataclass
from typing import final

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """How many rows have a length from `first` to `last`, both included."""

    first: int
    last: int
    count: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The distribution of a length. `quantiles` are by their share (`0.5` is the median), each the length of a row."""

    mean: float
    least: int
    most: int
    quantiles: dict[float, int]
    histogram: tuple[Bin, ...]

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Lengths":
        """The distribution of these lengths, of which there is at least one."""
        values = np.quantile(lengths, QUANTILES, method="inverted_cdf")
        return cls(
            mean=float(lengths.mean()),
            least=int(lengths.min()),
            most=int(lengths.max()),
            quantiles={share: int(value) for share, value in zip(QUANTILES, values, strict=True)},
            histogram=histogram(lengths),
        )


def histogram(lengths: np.ndarray) -> tuple[Bin, ...]:
    """The lengths in bins 0, 1, 2 to 3, 4 to 7, 8 to 15, ..., from the first to the last that has a row."""
    bins = np.where(lengths > 0, np.frexp(lengths)[1], 0)
    counts = np.bincount(bins)
    return tuple(
        Bin(first=0 if number == 0 else 2 ** (number - 1), last=0 if number == 0 else 2**number - 1, count=int(count))
        for number, count in enumerate(counts)
        if number >= bins.min()
    )
