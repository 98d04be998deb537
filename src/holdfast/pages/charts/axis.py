"""An axis: from where to where, and which values are written at it. The ticks are those of `matplotlib.ticker`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

_ROUNDING = 1e-9
"""Values that differ by less than this share of themselves are one value."""
_STEPS = [1, 2, 2.5, 5, 10]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis from `low` to `high`, with ticks between. `names` is the text of the ticks where they are no numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False
    names: tuple[str, ...] = ()

    def share(self, values: np.ndarray) -> np.ndarray:
        """Where the values are: 0 at the low end, 1 at the high one, NaN where an axis of logarithms has no place."""
        if not self.is_log:
            return (np.asarray(values, dtype=np.float64) - self.low) / (self.high - self.low)
        logs = np.log(np.where(np.asarray(values) > 0, values, np.nan))
        return (logs - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    @property
    def labels(self) -> tuple[str, ...]:
        """The ticks as text."""
        if self.names:
            return self.names
        spacing = min(np.diff(self.ticks)) if len(self.ticks) > 1 and not self.is_log else None
        return tuple(tick_label(tick, spacing) for tick in self.ticks)


def axis_of(
    values: np.ndarray | Sequence[float], *, is_log: bool = False, num_ticks: int = 5, is_tight: bool = False,
    is_integer: bool = False, includes: Sequence[float] = (),
) -> Axis:  # fmt: skip
    """The axis that shows all finite values, and `includes`. A tight one ends at them, others a twentieth beyond. On an
    axis of logarithms, values that are not positive have no place."""
    numbers = np.concatenate([np.asarray(values, dtype=np.float64).ravel(), np.asarray(includes, dtype=np.float64)])
    numbers = numbers[np.isfinite(numbers) & ((numbers > 0) | (not is_log))]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (1.0, 10.0) if is_log else (0.0, 1.0)
    if is_log:
        return _log_axis(low, high, num_ticks)
    if high - low <= _ROUNDING * max(abs(low), abs(high)):
        beyond = 1.0 if is_integer else max(abs(low) * 0.05, 1e-12 if low else 1.0)
        low, high = low - beyond, high + beyond
    elif not is_tight:
        beyond = (high - low) * 0.05
        low, high = low - beyond, high + beyond
    ticks = MaxNLocator(num_ticks, steps=_STEPS, integer=is_integer).tick_values(low, high)
    return Axis(low=low, high=high, ticks=_within(ticks, low, high))


def axis_of_names(names: Sequence[str], most_letters: int = 22) -> Axis:
    """An axis upwards with a place for each name, the first at the top: the `n`-th is at `-n`. Long names are cut."""
    shown = tuple(name if len(name) <= most_letters else name[: most_letters - 3] + "..." for name in names)
    return Axis(low=0.5 - max(1, len(names)), high=0.5, ticks=tuple(-float(n) for n in range(len(names))), names=shown)


def tick_label(value: float, spacing: float | None = None) -> str:
    """A value with as many decimals as the spacing of its ticks needs, or in scientific notation where it is tiny or
    huge."""
    if value == 0 or (spacing is not None and abs(value) < spacing * 1e-9):
        return "0"
    size = max(abs(value), spacing or 0)
    if not 1e-3 <= size < 1e7:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if spacing is None:
        return f"{value:,.7g}"
    decimals = next((number for number in range(7) if math.isclose(round(spacing, number), spacing)), 7)
    return f"{value:,.{decimals}f}"


def _log_axis(low: float, high: float, num_ticks: int) -> Axis:
    low, high = (low / 1.1, high * 1.1)
    ticks = np.array([])
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        locator = LogLocator(subs=steps, numticks=num_ticks + 2)
        ticks = np.array(_within(locator.tick_values(low, high), low, high))
        if len(ticks) >= min(3, num_ticks):
            break
    if len(ticks) < 2:
        ticks = np.array(_within(MaxNLocator(num_ticks, steps=_STEPS).tick_values(low, high), low, high))
    return Axis(low=low, high=high, ticks=tuple(ticks.tolist()), is_log=True)


def _within(ticks: Sequence[float] | np.ndarray, low: float, high: float) -> tuple[float, ...]:
    edge = 1e-9 * (high - low)
    return tuple(float(tick) for tick in ticks if low - edge <= tick <= high + edge)
