"""Numbers over seeds: means, their errors, and whether a difference is one.

All differences are paired: two runs of a seed share world, start policy, pairs and their order, so most of what differs
between seeds drops out. The rule for verdicts stands here and was there before any result: see `verdict`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean of one number per seed, its standard error, and the ends of Student's interval at `CONFIDENCE`."""

    values: tuple[float, ...]
    mean: float
    error: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """`mean +- t s / sqrt(n)`, where `s` is the sample standard deviation and t has n - 1 degrees of freedom.

        One value has no error: its interval is all numbers.
        """
        count = len(values)
        if count == 0:
            raise ValueError("a mean of no values was asked for. Give the number of at least one seed.")
        mean = math.fsum(values) / count
        if count == 1:
            return cls(values=tuple(values), mean=mean, error=math.inf, low=-math.inf, high=math.inf)
        error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
        half = student_quantile(count - 1) * error
        return cls(values=tuple(values), mean=mean, error=error, low=mean - half, high=mean + half)


def paired(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Of `first - second`, seed by seed."""
    return Mean.of([a - b for a, b in zip(first, second, strict=True)])


def verdict(difference: Mean) -> str:
    """The rule for all claims, where `difference` is positive if the claim holds.

    "reproduced": the interval lies wholly above 0. "opposite": wholly below. "not seen": 0 is in it.
    """
    if difference.low > 0:
        return "reproduced"
    if difference.high < 0:
        return "opposite"
    return "not seen"


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that `|T|` of Student's distribution stays below with probability `confidence`, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _inside(t: float, degrees: int) -> float:
    """`P(|T| < t)` of Student's distribution with whole degrees of freedom: a finite sum in `theta = atan(t /
    sqrt(degrees))` (Abramowitz and Stegun 1964, section 26.7)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    is_odd = degrees % 2 == 1
    term, total = (cosine if is_odd else 1.0), 0.0
    for power in range(2 if is_odd else 1, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (theta + sine * total) if is_odd else sine * total
