"""Histograms: how many values fall into each of some bins of equal width, for one group of values or several."""

from collections.abc import Mapping, Sequence

import numpy as np

from holdfast.pages.charts.axis import axis_of
from holdfast.pages.charts.frame import Entry, Frame, color_class, figure, number
from holdfast.pages.charts.lines import Level
from holdfast.pages.markup import Html, element

_SHOWN = 0.995
"""So many of the values decide how far the axis goes: a single one far out would squeeze all others into one bar."""


def edges_of(values: np.ndarray, num_bins: int = 40, includes: Sequence[float] = ()) -> np.ndarray:
    """The edges of `num_bins` bins that hold all but the half percent of values farthest out at each side, and
    `includes`. A zero within is an edge, so that no bar holds values of both signs."""
    values = np.asarray(values, dtype=np.float64)
    values = np.concatenate([values[np.isfinite(values)], np.asarray(includes, dtype=np.float64)])
    if not values.size:
        return np.linspace(0.0, 1.0, num_bins + 1)
    low, high = np.quantile(values, [1 - _SHOWN, _SHOWN])
    low, high = min([low, *includes]), max([high, *includes])
    if low == high:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / num_bins
    if low < 0 < high:
        return np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width
    return np.linspace(low, high, num_bins + 1)


def histogram(
    groups: Mapping[str, np.ndarray | Sequence[float]], *, title: str, x_label: str = "", y_label: str = "pairs",
    num_bins: int = 40, marks: Sequence[Level] = (), edges: np.ndarray | None = None, is_share: bool = False,
) -> Html:  # fmt: skip
    """The chart: bars for one group, outlines for several. Values beyond the outermost edges are counted in the bars at
    the ends; values that are not finite are left out, and both are said below. `marks` are vertical lines (their `y` is
    a value of the horizontal axis). With `is_share`, heights are shares of each group in percent."""
    arrays = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in groups.items()}
    finite = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    whole = np.concatenate([*finite.values(), np.empty(0)])
    edges = edges_of(whole, num_bins, [mark.y for mark in marks]) if edges is None else edges
    counts = {name: np.histogram(values.clip(edges[0], edges[-1]), edges)[0] for name, values in finite.items()}
    heights = {
        name: 100 * count / max(1, count.sum()) if is_share else count.astype(np.float64)
        for name, count in counts.items()
    }
    highest = max([1e-9 if is_share else 1.0, *(float(each.max()) for each in heights.values() if each.size)])
    frame = Frame(
        x=axis_of(edges, is_tight=True),
        y=axis_of([0, highest * 1.05], is_tight=True, is_integer=not is_share),
    )
    is_filled = len(groups) == 1
    layers = [
        _bars(frame, edges, counts[name], heights[name], place, is_filled) for place, name in enumerate(finite)
    ] + [_mark(frame, mark) for mark in marks]
    legend = [] if is_filled else [
        Entry(name=name, value=f"{len(values):,}", color=place, dash=place)
        for place, (name, values) in enumerate(finite.items())
    ]  # fmt: skip
    legend += [Entry(name=mark.text, kind="level") for mark in marks]
    return figure(
        frame, layers, title=title, description=_description(finite), x_label=x_label,
        y_label=f"% of {y_label}" if is_share else y_label, legend=legend, note=_note(arrays, finite, edges, y_label),
    )  # fmt: skip


def _bars(
    frame: Frame, edges: np.ndarray, counts: np.ndarray, heights: np.ndarray, place: int, is_filled: bool
) -> Html:
    across, down, ground = frame.across(edges), frame.down(heights), frame.bottom
    if not is_filled:
        words = [f"M{number(across[0])} {ground}"]
        words += [f"V{number(top)}H{number(right)}" for top, right in zip(down, across[1:], strict=True)]
        path = element("path", d=f"{''.join(words)}V{ground}", kind="series")
        return element("g", path, kind=color_class(place))
    bars = [
        element(
            "rect",
            element("title", f"{edges[bin_]:.4g} to {edges[bin_ + 1]:.4g}: {counts[bin_]:,}"),
            x=number(across[bin_]), y=number(down[bin_]), width=number(across[bin_ + 1] - across[bin_]),
            height=number(ground - down[bin_]), kind="fill",
        )
        for bin_ in np.flatnonzero(counts)
    ]  # fmt: skip
    return element("g", *bars, kind=color_class(place))


def _mark(frame: Frame, mark: Level) -> Html:
    at = number(frame.across(mark.y).item())
    return element("line", element("title", mark.text), x1=at, x2=at, y1=frame.top, y2=frame.bottom, kind="level")


def _note(arrays: Mapping[str, np.ndarray], finite: Mapping[str, np.ndarray], edges: np.ndarray, what: str) -> str:
    left_out = sum(len(values) for values in arrays.values()) - sum(len(values) for values in finite.values())
    beyond = sum(int(((values < edges[0]) | (values > edges[-1])).sum()) for values in finite.values())
    words = [f"{beyond:,} {what} beyond the ends are in the outermost bars."] if beyond else []
    words += [f"{left_out:,} {what} without a number are left out."] if left_out else []
    return " ".join(words)


def _description(finite: Mapping[str, np.ndarray]) -> str:
    words = [
        f"{name}: {len(values):,} values from {values.min():.4g} to {values.max():.4g}, median {np.median(values):.4g}"
        if len(values)
        else f"{name}: no values"
        for name, values in finite.items()
    ]
    return "; ".join(words)
