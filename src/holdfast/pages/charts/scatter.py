"""Points over two axes, for one group or several. Of very many, a part is drawn that is the same each time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.pages.charts.axis import axis_of
from holdfast.pages.charts.frame import Entry, Frame, color_class, figure, number
from holdfast.pages.charts.lines import Level
from holdfast.pages.markup import Html, element

_SEED = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """A group of points. `texts` are what a pointer shows, one for each point; without them, its two numbers."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    texts: Sequence[str] | None = None
    color: int | None = None


def scatter(
    groups: Sequence[Points], *, title: str, x_label: str = "", y_label: str = "", levels: Sequence[Level] = (),
    has_diagonal: bool = False, is_log_x: bool = False, is_log_y: bool = False, most_points: int = 1500,
) -> Html:  # fmt: skip
    """The chart. Of a group at most its part of `most_points` is drawn, chosen at random with the same seed each time,
    and how many are not drawn is said. Points without finite numbers are left out. `levels` are horizontal lines, the
    diagonal is where both numbers are equal."""
    arrays = [np.stack([np.asarray(each.x, dtype=np.float64), np.asarray(each.y, dtype=np.float64)]) for each in groups]
    finite = [np.flatnonzero(np.isfinite(each).all(axis=0)) for each in arrays]
    num_finite = sum(map(len, finite))
    shown = [_part(places, most_points, num_finite) for places in finite]
    xs, ys = (np.concatenate([each[line] for each in arrays] or [np.empty(0)]) for line in (0, 1))
    frame = Frame(x=axis_of(xs, is_log=is_log_x), y=axis_of(ys, is_log=is_log_y, includes=[each.y for each in levels]))
    layers = [*(_level(frame, each) for each in levels), *([_diagonal(frame)] if has_diagonal else [])]
    layers += [
        _points(frame, group, array, places, place)
        for place, (group, array, places) in enumerate(zip(groups, arrays, shown, strict=True))
    ]
    num_drawn, num_all = sum(map(len, shown)), sum(each.shape[1] for each in arrays)
    legend = [
        Entry(name=group.name, value=f"{len(places):,}", color=_color(group, place), dash=None, kind="dot")
        for place, (group, places) in enumerate(zip(groups, finite, strict=True))
    ]
    legend += [Entry(name=each.text, kind="level") for each in levels]
    note = f"{num_drawn:,} of {num_all:,} points are drawn." if num_drawn < num_all else ""
    return figure(
        frame, layers, title=title, description=f"{num_all:,} points", x_label=x_label, y_label=y_label,
        legend=legend, note=note,
    )  # fmt: skip


def _part(places: np.ndarray, most_points: int, num_all: int) -> np.ndarray:
    most = -(-most_points * len(places) // max(1, num_all))
    if num_all <= most_points:
        return places
    return np.sort(np.random.default_rng(_SEED).choice(places, min(most, len(places)), replace=False))


def _points(frame: Frame, group: Points, array: np.ndarray, places: np.ndarray, place: int) -> Html:
    across, down = frame.across(array[0]).tolist(), frame.down(array[1]).tolist()
    dots = []
    for each in places.tolist():
        if np.isfinite(across[each]) and np.isfinite(down[each]):
            numbers = f"{array[0, each]:.4g}, {array[1, each]:.4g}"
            text = element("title", numbers if group.texts is None else f"{group.texts[each]} ({numbers})")
            dots.append(element("circle", text, cx=number(across[each]), cy=number(down[each]), r=2.2, kind="point"))
    return element("g", *dots, kind=color_class(_color(group, place)))


def _color(group: Points, place: int) -> int:
    return place if group.color is None else group.color


def _level(frame: Frame, level: Level) -> Html:
    at = number(frame.down(level.y).item())
    return element("line", element("title", level.text), x1=frame.left, x2=frame.right, y1=at, y2=at, kind="level")


def _diagonal(frame: Frame) -> Html:
    low, high = max(frame.x.low, frame.y.low), min(frame.x.high, frame.y.high)
    if low >= high:
        return Html("")
    (x1, x2), (y1, y2) = frame.across([low, high]), frame.down([low, high])
    return element("line", x1=number(x1), x2=number(x2), y1=number(y1), y2=number(y2), kind="level")
