"""Lines over a common axis: several series with bands around them, healthy ranges, levels and marks of events.

A series of more points than a screen can show is drawn by its first, least, greatest and last value of each column, so
no peak is lost. A value that is missing or not finite breaks the line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np

from holdfast.pages.charts.axis import Axis, axis_of
from holdfast.pages.charts.frame import Entry, Frame, color_class, dash_of, figure, number
from holdfast.pages.markup import Html, element, joined

_NUM_COLUMNS = 200
_MOST_TARGETS = 120
_MOST_LONG_MARKS = 12


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line: its name and its points, in order of `x`. `low` and `high` are a band around it, such as quantiles.
    Colour and pattern are those of its place among the series where they are None."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: int | None = None
    dash: int | None = None
    has_dots: bool = False
    is_faint: bool = False
    """Drawn behind the others, and not in the legend."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The values that are healthy: from `low` to `high`, None being without end."""

    low: float | None = None
    high: float | None = None
    text: str = "healthy"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A value that curves are compared with, such as ln 2."""

    y: float
    text: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened at `x`."""

    x: float
    text: str
    kind: str = "mark"


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str = "step", y_label: str = "", ranges: Sequence[Range] = (),
    levels: Sequence[Level] = (), marks: Sequence[Mark] = (), is_log_x: bool = False, is_log_y: bool = False,
    includes: Sequence[float] = (), note: str = "",
) -> Html:  # fmt: skip
    """The chart. The vertical axis shows every finite value of the series and of `includes`, levels that are near them,
    and as much of the ranges as falls within."""
    series = [_filled(each, place) for place, each in enumerate(series)]
    frame = _frame(series, levels, marks, includes, is_log_x, is_log_y)
    layers = [
        *(_range(frame, each) for each in ranges),
        *(_level(frame, each) for each in levels),
        _marks(frame, marks),
    ]
    layers += [_series(frame, each) for each in sorted(series, key=lambda each: not each.is_faint)]
    legend = [
        Entry(name=each.name, value=_last(each), color=each.color or 0, dash=each.dash, kind="series")
        for each in series
        if not each.is_faint
    ]
    legend += [Entry(name=each.text, dash=None, kind="range") for each in ranges]
    legend += [Entry(name=each.text, kind="level") for each in levels]
    legend += [Entry(name=text, kind="mark") for text in sorted({each.kind for each in marks} - {"mark"})]
    return figure(
        frame, layers, title=title, description=_description(series, marks), x_label=x_label, y_label=y_label,
        legend=legend, note=note,
    )  # fmt: skip


def thinned(x: np.ndarray, y: np.ndarray, num_columns: int = _NUM_COLUMNS) -> np.ndarray:
    """The places of the points to draw, in order: all, or of each of `num_columns` columns of equal width in `x` the
    first, the least, the greatest, the last, and the first that is not finite."""
    if len(x) <= 4 * num_columns:
        return np.arange(len(x))
    edges = np.linspace(x[0], x[-1], num_columns + 1)[1:-1]
    starts = np.unique(np.concatenate([[0], np.searchsorted(x, edges), [len(x)]]))
    places: set[int] = set()
    for start, stop in pairwise(starts.tolist()):
        part = y[start:stop]
        is_finite = np.isfinite(part)
        places |= {start, stop - 1}
        if is_finite.any():
            least, greatest = np.where(is_finite, part, np.inf), np.where(is_finite, part, -np.inf)
            places |= {start + int(least.argmin()), start + int(greatest.argmax())}
        if not is_finite.all():
            places.add(start + int(is_finite.argmin()))
    return np.array(sorted(places))


def _filled(series: Series, place: int) -> Series:
    """The series with a colour and a pattern, its points in float64."""
    color = place if series.color is None else series.color
    return Series(
        name=series.name,
        x=np.asarray(series.x, dtype=np.float64).tolist(),
        y=_floats(series.y),
        low=None if series.low is None else _floats(series.low),
        high=None if series.high is None else _floats(series.high),
        color=color,
        dash=color if series.dash is None else series.dash,
        has_dots=series.has_dots,
        is_faint=series.is_faint,
    )


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def _frame(
    series: Sequence[Series], levels: Sequence[Level], marks: Sequence[Mark], includes: Sequence[float],
    is_log_x: bool, is_log_y: bool,
) -> Frame:  # fmt: skip
    xs = np.array([value for each in series for value in each.x] + [mark.x for mark in marks])
    ys = np.array([value for each in series for part in (each.y, each.low or (), each.high or ()) for value in part])
    finite = ys[np.isfinite(ys)]
    if finite.size:
        near = max(float(np.ptp(finite)), abs(float(finite.mean())) * 0.1) or 1.0
        includes = [*includes, *(each.y for each in levels if finite.min() - near <= each.y <= finite.max() + near)]
    is_integer = bool(xs.size) and bool(np.all(xs == np.round(xs)))
    return Frame(
        x=axis_of(xs, is_log=is_log_x, is_tight=True, is_integer=is_integer and not is_log_x),
        y=axis_of(ys, is_log=is_log_y, includes=includes),
    )


def _range(frame: Frame, each: Range) -> Html:
    ends = [_end(frame.y, each.low, frame.y.low), _end(frame.y, each.high, frame.y.high)]
    bottom, top = (float(place) for place in frame.down(ends))
    if bottom <= top:
        return Html("")
    width = frame.right - frame.left
    shape = element("rect", element("title", each.text), x=frame.left, y=number(top), width=width,
                    height=number(bottom - top), kind="range")  # fmt: skip
    edges = [
        element("line", x1=frame.left, x2=frame.right, y1=number(place), y2=number(place), kind="edge")
        for value, place in ((each.low, bottom), (each.high, top))
        if value is not None and frame.y.low < value < frame.y.high
    ]
    return joined([shape, *edges])


def _end(axis: Axis, value: float | None, otherwise: float) -> float:
    return otherwise if value is None else min(max(value, axis.low), axis.high)


def _level(frame: Frame, each: Level) -> Html:
    if not frame.y.low <= each.y <= frame.y.high:
        return Html("")
    at = number(frame.down(each.y).item())
    title = element("title", each.text)
    return element("line", title, x1=frame.left, x2=frame.right, y1=at, y2=at, kind="level")


def _marks(frame: Frame, marks: Sequence[Mark]) -> Html:
    """The marks: lines through the plot, or short ones at its lower end where they are many."""
    is_short = len(marks) > _MOST_LONG_MARKS
    start = frame.bottom - 10 if is_short else frame.top
    lines = [
        element("line", element("title", mark.text), x1=at, x2=at, y1=start, y2=frame.bottom,
                kind="short" if is_short else "mark")
        for mark in marks
        for at in [number(frame.across(mark.x).item())]
    ]  # fmt: skip
    return joined(lines)


def _series(frame: Frame, series: Series) -> Html:
    x, y = np.asarray(series.x), np.asarray(series.y)
    places = thinned(x, y).tolist()
    across, down = frame.across(x).tolist(), frame.down(y).tolist()
    parts = [_spread(frame, series, places)] if series.low is not None and series.high is not None else []
    path = _path([(across[place], down[place]) for place in places])
    if path:
        parts.append(element("path", d=path, kind="series", stroke_dasharray=dash_of(series.dash or 0)))
    alone = [place for place in places if _is_alone(down, place)]
    dots = places if series.has_dots and len(places) <= _MOST_TARGETS else alone
    parts += [_circle(across[place], down[place], 2.5, "dot") for place in dots if math.isfinite(down[place])]
    for place in [] if series.is_faint else places[:: max(1, -(-len(places) // _MOST_TARGETS))]:
        if math.isfinite(down[place]):
            text = f"{series.name}, {x[place]:g}: {y[place]:.6g}"
            parts.append(_circle(across[place], down[place], 5, "target", text))
    kinds = f"{color_class(series.color or 0)}{' faint-series' if series.is_faint else ''}"
    return element("g", *parts, kind=kinds)


def _circle(x: float, y: float, radius: float, kind: str, text: str = "") -> Html:
    title = [element("title", text)] if text else []
    return element("circle", *title, cx=number(x), cy=number(y), r=radius, kind=kind)


def _spread(frame: Frame, series: Series, places: Sequence[int]) -> Html:
    across = frame.across(series.x).tolist()
    low, high = frame.down(series.low or ()).tolist(), frame.down(series.high or ()).tolist()
    places = [place for place in places if math.isfinite(low[place]) and math.isfinite(high[place])]
    if len(places) < 2:
        return Html("")
    there = [f"{number(across[place])} {number(high[place])}" for place in places]
    back = [f"{number(across[place])} {number(low[place])}" for place in places[::-1]]
    return element("path", d=f"M{' L'.join([*there, *back])}Z", kind="spread")


def _path(points: Sequence[tuple[float, float]]) -> str:
    """The lines through all runs of finite points."""
    words: list[str] = []
    is_drawing = False
    for across, down in points:
        is_finite = math.isfinite(across) and math.isfinite(down)
        if is_finite:
            words.append(f"{'L' if is_drawing else 'M'}{number(across)} {number(down)}")
        is_drawing = is_finite
    return "".join(words)


def _is_alone(down: Sequence[float], place: int) -> bool:
    """Whether a point has no neighbour to be joined with."""
    neighbours = [each for each in (place - 1, place + 1) if 0 <= each < len(down)]
    return math.isfinite(down[place]) and not any(math.isfinite(down[each]) for each in neighbours)


def _last(series: Series) -> str:
    finite = [value for value in series.y if math.isfinite(value)]
    return f"{finite[-1]:.4g}" if finite else "no numbers"


def _description(series: Sequence[Series], marks: Sequence[Mark]) -> str:
    words = []
    for each in (each for each in series if not each.is_faint):
        finite = [(x, y) for x, y in zip(each.x, each.y, strict=True) if math.isfinite(y)]
        if finite:
            (first_x, first), (last_x, last) = finite[0], finite[-1]
            words.append(f"{each.name}: {first:.4g} at {first_x:g}, {last:.4g} at {last_x:g}")
        else:
            words.append(f"{each.name}: no numbers")
    if marks:
        words.append(f"{len(marks)} marks, the last at {marks[-1].x:g}: {marks[-1].text}")
    return "; ".join(words)
