"""Horizontal bars, a line for each name: one value each, several parts end to end, or quantiles of a spread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.pages.charts.axis import axis_of, axis_of_names
from holdfast.pages.charts.frame import Entry, Frame, color_class, figure, number
from holdfast.pages.charts.lines import Level
from holdfast.pages.markup import Html, element

_LINE, _EDGES, _NAMES = 22, 60, 150


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Five quantiles of a group, in rising order, such as 5 %, 25 %, 50 %, 75 % and 95 %."""

    lowest: float
    low: float
    middle: float
    high: float
    highest: float


def bars(
    values: Mapping[str, float], *, title: str, x_label: str = "", texts: Mapping[str, str] | None = None,
    marks: Sequence[Level] = (), note: str = "",
) -> Html:  # fmt: skip
    """A bar from 0 to each value; one that is not finite has none. `texts` are written at the bars in place of the
    values. `marks` are vertical lines (their `y` is a value of the horizontal axis)."""
    shown = {name: (texts or {}).get(name, f"{value:.4g}") for name, value in values.items()}
    frame = _frame(list(values), [*values.values(), 0.0, *(mark.y for mark in marks)])
    layers = []
    for line, (name, value) in enumerate(values.items()):
        if np.isfinite(value):
            bar = _bar(frame, line, 0.0, value, f"{name}: {shown[name]}")
            layers.append(element("g", bar, kind=color_class(0)))
        layers.append(_text(frame, line, max(0.0, value if np.isfinite(value) else 0.0), shown[name]))
    layers += [_mark(frame, mark) for mark in marks]
    description = "; ".join(f"{name}: {text}" for name, text in shown.items())
    legend = [Entry(name=mark.text, kind="level") for mark in marks]
    return figure(frame, layers, title=title, description=description, x_label=x_label, legend=legend, note=note)


def stacked_bars(
    lines: Mapping[str, Mapping[str, float]], *, title: str, x_label: str = "", texts: Mapping[str, str] | None = None,
    note: str = "",
) -> Html:  # fmt: skip
    """A bar for each line, whose parts stand end to end; parts of one name have one colour. `texts` are what is said of
    parts in the legend."""
    parts = list(dict.fromkeys(part for line in lines.values() for part in line))
    frame = _frame(list(lines), [0.0, *(sum(line.values()) for line in lines.values())])
    layers = []
    for line, (name, values) in enumerate(lines.items()):
        start = 0.0
        for part, value in values.items():
            bar = _bar(frame, line, start, start + value, f"{name}, {part}: {value:.4g}")
            layers.append(element("g", bar, kind=color_class(parts.index(part))))
            start += value
    legend = [
        Entry(name=part, value=(texts or {}).get(part, ""), color=place, dash=None, kind="fill")
        for place, part in enumerate(parts)
    ]
    description = "; ".join(
        f"{name}: " + ", ".join(f"{part} {value:.4g}" for part, value in values.items())
        for name, values in lines.items()
    )
    return figure(frame, layers, title=title, description=description, x_label=x_label, legend=legend, note=note)


def quantile_bars(
    spreads: Mapping[str, Spread], *, title: str, x_label: str = "", marks: Sequence[Level] = (), note: str = ""
) -> Html:
    """For each name a thin line between the outer quantiles, a bar between the inner ones, a stroke at the middle."""
    values = [value for each in spreads.values() for value in (each.lowest, each.highest)]
    frame = _frame(list(spreads), [*values, *(mark.y for mark in marks)])
    layers = [_mark(frame, mark) for mark in marks]
    for line, (name, each) in enumerate(spreads.items()):
        quantiles = (each.lowest, each.low, each.middle, each.high, each.highest)
        if not np.isfinite(quantiles).all():
            continue
        at = frame.down(-line).item()
        left, _, middle, _, right = (number(place) for place in frame.across(quantiles))
        text = f"{name}: {', '.join(f'{value:.4g}' for value in quantiles)}"
        whisker = element("line", x1=left, x2=right, y1=number(at), y2=number(at), kind="series")
        stroke = element("line", x1=middle, x2=middle, y1=number(at - 8), y2=number(at + 8), kind="short")
        layers.append(element("g", whisker, _bar(frame, line, each.low, each.high, text), stroke, kind=color_class(0)))
    description = "; ".join(f"{name}: median {each.middle:.4g}" for name, each in spreads.items())
    legend = [Entry(name=mark.text, kind="level") for mark in marks]
    return figure(frame, layers, title=title, description=description, x_label=x_label, legend=legend, note=note)


def _frame(names: Sequence[str], values: Sequence[float]) -> Frame:
    axis = axis_of(values, num_ticks=4)
    longest = max(map(len, names), default=0)
    left = min(_NAMES, 16 + 7 * longest)
    return Frame(x=axis, y=axis_of_names(names), height=_EDGES + _LINE * max(1, len(names)), left=left)


def _bar(frame: Frame, line: int, start: float, stop: float, text: str) -> Html:
    left, right = sorted(frame.across([start, stop]).tolist())
    top = frame.down(-line).item() - _LINE * 0.32
    return element(
        "rect", element("title", text), x=number(left), y=number(top), width=number(right - left),
        height=number(_LINE * 0.64), kind="fill",
    )  # fmt: skip


def _text(frame: Frame, line: int, value: float, text: str) -> Html:
    """The value beside the end of its bar, or within it where there is no room."""
    at = frame.across(value).item()
    is_within = at + 7 * len(text) + 4 > frame.width
    x = number(at - 4 if is_within else at + 4)
    anchor = "end" if is_within else "start"
    y = number(frame.down(-line).item() + 4)
    return element("text", text, x=x, y=y, text_anchor=anchor, kind="within" if is_within else "value")


def _mark(frame: Frame, mark: Level) -> Html:
    at = number(frame.across(mark.y).item())
    return element("line", element("title", mark.text), x1=at, x2=at, y1=frame.top, y2=frame.bottom, kind="level")
