"""The frame of a chart: two axes with their ticks, a title, a legend, and the layers that are drawn within."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.pages.charts.axis import Axis
from holdfast.pages.markup import Html, element, joined

NUM_COLORS = 8
DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 3", "1 2", "6 2 1 2", "4 4")
"""The pattern of each series, so that they differ without colour as well."""
_RIGHT, _TOP, _BOTTOM = 20, 22, 38


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A rectangle of so many units, and the axes of the plot within it."""

    x: Axis
    y: Axis
    width: int = 420
    height: int = 240
    left: int = 54
    """Where the plot begins; to its left are the names of ticks."""

    def across(self, values: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """The horizontal places of values, in units from the left."""
        share = self.x.share(np.asarray(values, dtype=np.float64))
        return self.left + share * (self.right - self.left)

    def down(self, values: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """The vertical places of values, in units from the top."""
        share = self.y.share(np.asarray(values, dtype=np.float64))
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    @property
    def right(self) -> int:
        """Where the plot ends."""
        return self.width - _RIGHT

    @property
    def top(self) -> int:
        """The upper end of the plot."""
        return _TOP

    @property
    def bottom(self) -> int:
        """The lower end of the plot."""
        return self.height - _BOTTOM


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of a legend: how a series is drawn, its name, and a value of it."""

    name: str
    value: str = ""
    color: int = 0
    dash: int | None = 0
    """None: a filled shape."""
    kind: str = "series"


def figure(
    frame: Frame, layers: Sequence[Html], *, title: str, description: str, x_label: str = "", y_label: str = "",
    legend: Sequence[Entry] = (), note: str = "",
) -> Html:  # fmt: skip
    """The chart as a `figure`. `description` is what is read aloud in its place; `note` a sentence below it."""
    drawing = element(
        "svg",
        element("title", title),
        _axes(frame, x_label, y_label),
        *layers,
        viewBox=f"0 0 {frame.width} {frame.height}",
        role="img",
        aria_label=f"{title}. {description}",
    )
    entries = element("div", *map(_entry, legend), kind="legend") if legend else Html("")
    below = element("div", note, kind="faint") if note else Html("")
    return element("figure", element("figcaption", title), drawing, entries, below, kind="chart")


def color_class(number: int) -> str:
    """The class that gives a shape the colour of that number; they begin anew after the last."""
    return f"c{number % NUM_COLORS}"


def dash_of(number: int) -> str | None:
    """The pattern of a line, None for a whole one."""
    return DASHES[number % len(DASHES)] or None


def number(value: float | np.floating) -> str:
    """A place in the drawing, to a tenth of a unit."""
    return f"{float(value):.1f}".removesuffix(".0")


def _axes(frame: Frame, x_label: str, y_label: str) -> Html:
    parts: list[Html] = []
    for place, label in zip(frame.down(frame.y.ticks), frame.y.labels, strict=True):
        at = number(place)
        parts.append(element("line", x1=frame.left, x2=frame.right, y1=at, y2=at, kind="grid"))
        parts.append(element("text", label, x=frame.left - 5, y=number(place + 4), text_anchor="end"))
    for place, label in zip(frame.across(frame.x.ticks), frame.x.labels, strict=True):
        at = number(place)
        parts.append(element("line", x1=at, x2=at, y1=frame.bottom, y2=frame.bottom + 4, kind="frame"))
        anchor = "middle" if place < frame.right - 12 else "end"
        x = at if anchor == "middle" else frame.width - 2
        parts.append(element("text", label, x=x, y=frame.bottom + 17, text_anchor=anchor))
    parts.append(element("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, kind="frame"))
    middle = (frame.left + frame.right) // 2
    parts.append(element("text", x_label, x=middle, y=frame.height - 4, text_anchor="middle"))
    parts.append(element("text", y_label, x=2, y=12))
    return joined(parts)


def _entry(entry: Entry) -> Html:
    if entry.dash is None:
        sample = element("rect", x=3, y=0, width=20, height=10, kind=entry.kind)
    else:
        dashes = dash_of(entry.dash) if entry.kind == "series" else None
        sample = element("line", x1=1, x2=25, y1=5, y2=5, kind=entry.kind, stroke_dasharray=dashes)
    drawing = element("svg", sample, viewBox="0 0 26 10", aria_hidden="true", kind=color_class(entry.color))
    value = element("b", f" {entry.value}") if entry.value else Html("")
    return element("span", drawing, entry.name, value)
