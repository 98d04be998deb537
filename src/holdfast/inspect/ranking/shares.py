"""Many numbers in a few: a share with its standard error, a spread with its quantiles and its histogram, correlations.

Pairs are taken as drawn one by one. Where many pairs share a prompt the true standard errors are larger.
"""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
IsSo = NDArray[np.bool_]

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
NUM_BINS = 24
_LEAST_BINS = 6
_SHOWN = (0.005, 0.995)
"""The quantiles between which a histogram has bins of one width: a single far pair would squeeze all others into
one."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many pairs something is so for, of how many, and their share p with its standard error sqrt(p (1 - p) / n).
    Share and standard error are None of no pairs."""

    count: int
    num_pairs: int
    share: float | None
    standard_error: float | None

    @classmethod
    def of(cls, is_so: IsSo) -> "Share":
        """The share of pairs for which the array holds."""
        count, num_pairs = int(np.count_nonzero(is_so)), len(is_so)
        if num_pairs == 0:
            return cls(count=0, num_pairs=0, share=None, standard_error=None)
        share = count / num_pairs
        error = math.sqrt(share * (1 - share) / num_pairs)
        return cls(count=count, num_pairs=num_pairs, share=share, standard_error=error)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """How many values are at least `low` and below `high`. None stands for an end that is open."""

    low: float | None
    high: float | None
    count: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The distribution of finite values, of which there is at least one. `standard_error` is that of the mean, and None
    of one value. `quantiles` are by their share (0.5 is the median), between two values by their distance (linear)."""

    num_values: int
    mean: float
    standard_error: float | None
    least: float
    most: float
    quantiles: dict[float, float]
    histogram: tuple[Bin, ...]

    @classmethod
    def of(cls, values: Values) -> "Spread | None":
        """The distribution of these values; None of no values."""
        if len(values) == 0:
            return None
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(
            num_values=len(values),
            mean=float(values.mean()),
            standard_error=error,
            least=float(values.min()),
            most=float(values.max()),
            quantiles=dict(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True)),
            histogram=histogram(values, min(NUM_BINS, max(_LEAST_BINS, 2 * math.ceil(math.sqrt(len(values)))))),
        )


def histogram(values: Values, num_bins: int = NUM_BINS) -> tuple[Bin, ...]:
    """The values in at most about `num_bins` bins of one width, which is 1, 2 or 5 times a power of ten. Zero is the
    border of two bins where it is among them. What lies far outside is in the first and the last one, which then are
    open."""
    low = float(np.quantile(values, _SHOWN[0], method="lower"))
    high = float(np.quantile(values, _SHOWN[1], method="higher"))
    step = _round_step((high - low) / num_bins, (abs(low) + abs(high)) * 1e-9)
    first, last = math.floor(low / step), math.floor(high / step)
    borders = [_round(number * step, step) for number in range(first, last + 2)]
    numbers = (np.searchsorted(borders, values, side="right") - 1).clip(0, last - first)
    counts = np.bincount(numbers, minlength=last - first + 1).tolist()
    lows: list[float | None] = [*borders[:-1]]
    highs: list[float | None] = [*borders[1:]]
    if values.min() < borders[0]:
        lows[0] = None
    if values.max() >= borders[-1]:
        highs[-1] = None
    return tuple(Bin(low=low, high=high, count=count) for low, high, count in zip(lows, highs, counts, strict=True))


def _round_step(width: float, least: float) -> float:
    """The first of 1, 2 or 5 times a power of ten that is at least this width."""
    width = max(width, least, 1e-9)
    power = 10.0 ** math.floor(math.log10(width))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= width * (1 - 1e-12))


def _round(value: float, step: float) -> float:
    """A border of bins, without the digits that the product with the step adds."""
    return round(value, max(0, 2 - math.floor(math.log10(step))))


def correlation(first: Values, second: Values) -> float | None:
    """Pearson's correlation of two numbers of each pair. None where one of them is the same for all pairs."""
    if _is_constant(first) or _is_constant(second):
        return None
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(first @ first)) * math.sqrt(float(second @ second))
    return float(np.clip(float(first @ second) / norm, -1.0, 1.0))


def rank_correlation(first: Values, second: Values) -> float | None:
    """Spearman's correlation: Pearson's of the ranks, in which equal values share their mean rank."""
    return correlation(_ranks(first), _ranks(second))


def _ranks(values: Values) -> Values:
    _, number_of, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[number_of.reshape(-1)]


def slope(of: Values, by: Values) -> float | None:
    """By how much the first number rises where the second is one higher (least squares). None where the second is the
    same for all pairs."""
    if _is_constant(by):
        return None
    by = by - by.mean()
    return float(by @ (of - of.mean())) / float(by @ by)


def _is_constant(values: Values) -> bool:
    return len(values) == 0 or bool(values.min() == values.max())
