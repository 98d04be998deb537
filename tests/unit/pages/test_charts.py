"""Charts: shapes stand where the numbers say, compared with places worked out by hand, and no number is lost."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from holdfast.pages.charts.axis import Axis, axis_of, axis_of_names, tick_label
from holdfast.pages.charts.bars import Spread, bars, quantile_bars, stacked_bars
from holdfast.pages.charts.frame import Frame
from holdfast.pages.charts.histogram import edges_of, histogram
from holdfast.pages.charts.lines import Level, Mark, Range, Series, line_chart, thinned
from holdfast.pages.charts.scatter import Points, scatter
from holdfast.pages.markup import Html

TEN = Axis(low=0, high=10, ticks=(0, 5, 10))


def shapes(chart: Html, tag: str, kind: str) -> list[dict[str, str]]:
    """The attributes of the elements of that tag and class within the chart's drawing; `title` is what a pointer
    shows."""
    drawing = ElementTree.fromstring(str(chart)).find("svg")
    assert drawing is not None
    found = [each for each in drawing.iter(tag) if each.get("class") == kind]
    return [dict(each.attrib) | {"title": each.findtext("title") or ""} for each in found]


# Axes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "ends", "ticks"),
    [
        ([0, 100], {"is_tight": True}, (0, 100), (0, 20, 40, 60, 80, 100)),
        ([0, 100], {}, (-5, 105), (0, 25, 50, 75, 100)),
        ([1, 2000], {"is_tight": True, "is_integer": True}, (1, 2000), (500, 1000, 1500, 2000)),
        ([7], {"is_integer": True, "is_tight": True}, (6, 8), (6, 7, 8)),
        ([math.nan, math.inf, 3, 5], {"is_tight": True}, (3, 5), (3, 3.5, 4, 4.5, 5)),
        ([], {"is_tight": True}, (0, 1), (0, 0.2, 0.4, 0.6, 0.8, 1)),
        ([], {"is_log": True}, (1 / 1.1, 11), (1, 3, 10)),
        ([-4, 0, 10, 1000], {"is_log": True}, (10 / 1.1, 1100), (10, 100, 1000)),
    ],
)
def test_an_axis_shows_all_finite_values(values, options, ends, ticks):
    axis = axis_of(values, **options)
    assert (axis.low, axis.high) == pytest.approx(ends)
    assert axis.ticks == pytest.approx(ticks)


def test_a_share_of_an_axis():
    """Half way of 0 to 10 is 5, and half way of 1 to 100 in logarithms is 10."""
    assert TEN.share(np.array([0, 5, 10])).tolist() == [0, 0.5, 1]
    logs = Axis(low=1, high=100, ticks=(), is_log=True).share(np.array([1, 10, 100, 0, -1]))
    assert logs == pytest.approx([0, 0.5, 1, math.nan, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("value", "spacing", "text"),
    [
        (0, 0.5, "0"), (0.5, 0.25, "0.50"), (2.5e-6, 2.5e-6, "2.5e-6"), (1500, 500, "1,500"), (1e-17, 0.1, "0"),
        (-0.2, 0.1, "-0.2"), (2e7, 1e7, "2e7"), (10, None, "10"), (2.2, None, "2.2"), (100, 20, "100"),
    ],
)  # fmt: skip
def test_the_label_of_a_tick(value, spacing, text):
    assert tick_label(value, spacing) == text


def test_names_stand_from_the_top_down():
    axis = axis_of_names(["a", "b", "x" * 40])
    assert (axis.ticks, axis.labels) == ((0, -1, -2), ("a", "b", "x" * 19 + "..."))
    assert axis.share(np.array([0, -2])).tolist() == pytest.approx([2.5 / 3, 0.5 / 3])


def test_places_in_a_frame():
    """The plot is 100 units wide from 54 on, and 100 high between 22 and 122."""
    frame = Frame(x=TEN, y=TEN, width=174, height=160)
    assert frame.across([0, 5, 10]).tolist() == [54, 104, 154]
    assert frame.down([0, 5, 10]).tolist() == [122, 72, 22]


# Lines ---------------------------------------------------------------------------------------------------------------


def test_a_line_goes_through_its_points():
    """From 0 to 10 on a plot of 346 x 180 units; the axis goes a twentieth beyond: 10 / 1.1 of it is 163.6 units."""
    chart = line_chart([Series(name="loss", x=[0, 5, 10], y=[0, 10, 5])], title="t")
    (path,) = shapes(chart, "path", "series")
    assert re.findall(r"[\d.]+", path["d"]) == ["54", "193.8", "227", "30.2", "400", "112"]
    assert [each["title"] for each in shapes(chart, "circle", "target")] == ["loss, 0: 0", "loss, 5: 10", "loss, 10: 5"]


@pytest.mark.parametrize(
    ("y", "num_runs", "num_dots"),
    [
        ([1, 2, 3, 4, 5], 1, 0), ([1, 2, math.nan, 4, 5], 2, 0), ([1, math.nan, 3, math.inf, 5], 3, 3),
        ([math.nan] * 5, 0, 0), ([None, None, 3, 4, None], 1, 0),
    ],
)  # fmt: skip
def test_what_is_not_finite_breaks_a_line(y, num_runs, num_dots):
    chart = line_chart([Series(name="a", x=[1, 2, 3, 4, 5], y=y)], title="t")
    assert sum(path["d"].count("M") for path in shapes(chart, "path", "series")) == num_runs
    assert len(shapes(chart, "circle", "dot")) == num_dots
    assert "nan" not in str(chart)
    assert "inf" not in str(chart)


@pytest.mark.parametrize("peak", [0, 1, 4_321, 99_999])
def test_no_peak_of_a_long_series_is_lost(peak):
    x = np.arange(100_000.0)
    y = np.sin(x / 1000)
    y[peak] = 7
    y[50_000] = math.nan
    places = thinned(x, y)
    assert len(places) <= 1000
    assert {0, peak, 50_000, 99_999} <= set(places.tolist())
    assert (np.diff(places) > 0).all()
    assert places[y[places] <= np.nanmin(y)].size


def test_ranges_levels_and_marks():
    """The axis goes from 0 to 10, half a unit beyond. 5 of it is at 112; below 5 is healthy: the lower 90 units."""
    chart = line_chart(
        [Series(name="a", x=[0, 10], y=[0, 10])], title="t", ranges=[Range(high=5, text="healthy")],
        levels=[Level(y=2.5, text="quarter"), Level(y=1e6, text="far")], marks=[Mark(x=5, text="sync 1", kind="sync")],
    )  # fmt: skip
    (area,) = shapes(chart, "rect", "range")
    assert (area["y"], area["height"], area["title"]) == ("112", "90", "healthy")
    assert [(each["y1"], each["title"]) for each in shapes(chart, "line", "level")] == [("152.9", "quarter")]
    assert [(each["x1"], each["title"]) for each in shapes(chart, "line", "mark")] == [("227", "sync 1")]
    assert len(shapes(chart, "line", "edge")) == 1
    many = line_chart(
        [Series(name="a", x=[0, 99], y=[0, 1])], title="t", marks=[Mark(x=x, text="s") for x in range(99)]
    )
    assert len(shapes(many, "line", "short")) == 99
    assert not shapes(many, "line", "mark")


def test_a_band_is_drawn_where_both_ends_are_numbers():
    chart = line_chart([Series(name="a", x=[0, 5, 10], y=[4, 5, 6], low=[0, math.nan, 2], high=[8, 9, 10])], title="t")
    (area,) = shapes(chart, "path", "spread")
    assert len(re.findall(r"[\d.]+ [\d.]+", area["d"])) == 4


def test_two_axes_of_logarithms():
    chart = line_chart([Series(name="a", x=[1, 10, 100], y=[1, 10, 100])], title="t", is_log_x=True, is_log_y=True)
    (path,) = shapes(chart, "path", "series")
    numbers = [float(each) for each in re.findall(r"[\d.]+", path["d"])]
    assert numbers[2] - numbers[0] == pytest.approx(numbers[4] - numbers[2], abs=0.2)
    assert numbers[1] - numbers[3] == pytest.approx(numbers[3] - numbers[5], abs=0.2)


# Histograms ----------------------------------------------------------------------------------------------------------


def test_a_histogram_counts_every_value():
    """Edges 0, 1, 2, 3: one value below and two above are in the bars at the ends; a NaN is left out."""
    values = [-5, 0.5, 1.5, 1.6, 2.5, 7, 8, math.nan]
    chart = histogram({"a": values}, title="t", edges=np.array([0.0, 1, 2, 3]))
    titles = [each["title"] for each in shapes(chart, "rect", "fill")]
    assert titles == ["0 to 1: 2", "1 to 2: 2", "2 to 3: 3"]
    assert "3 pairs beyond the ends are in the outermost bars. 1 pairs without a number are left out." in chart
    heights = [float(each["height"]) for each in shapes(chart, "rect", "fill")]
    assert heights[0] == heights[1] == pytest.approx(heights[2] * 2 / 3, abs=0.1)


def test_the_edges_of_bins():
    edges = edges_of(np.linspace(-10, 20, 1001), 30)
    assert 0 in np.round(edges, 9)
    assert np.allclose(np.diff(edges), edges[1] - edges[0])
    assert edges[0] <= -9.8
    assert edges[-1] >= 19.8
    assert edges_of(np.array([3.0, 3.0]), 4).tolist() == [2.5, 2.75, 3, 3.25, 3.5]
    assert edges_of(np.array([]), 2).tolist() == [0, 0.5, 1]


def test_several_groups_are_outlines_in_shares():
    chart = histogram({"a": [0.5] * 10, "b": [1.5]}, title="t", edges=np.array([0.0, 1, 2]), is_share=True)
    first, second = (re.findall(r"V([\d.]+)", each["d"]) for each in shapes(chart, "path", "series"))
    assert first[0] == second[1] != second[0] == first[1]


# Points and bars -----------------------------------------------------------------------------------------------------


def test_points_of_a_scatter():
    chart = scatter([Points(name="p", x=[0, 10, math.nan], y=[0, 10, 1], texts=["a", "<b>", "c"])], title="t")
    assert [each["title"] for each in shapes(chart, "circle", "point")] == ["a (0, 0)", "<b> (10, 10)"]
    assert "2 of 3 points are drawn." in chart


def test_a_part_of_very_many_points_is_the_same_each_time():
    x = np.random.default_rng(0).normal(size=(2, 5000))
    charts = [scatter([Points(name="p", x=x[0], y=x[1])], title="t", most_points=300) for _ in range(2)]
    assert charts[0] == charts[1]
    assert len(shapes(charts[0], "circle", "point")) == 300
    assert "300 of 5,000 points are drawn." in charts[0]


def test_bars_are_as_long_as_their_values():
    chart = bars({"a": 4, "b": -2, "c": math.nan}, title="t", texts={"a": "four"})
    widths = [float(each["width"]) for each in shapes(chart, "rect", "fill")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert [each["title"] for each in shapes(chart, "rect", "fill")] == ["a: four", "b: -2"]


def test_parts_stand_end_to_end():
    chart = stacked_bars({"one": {"x": 1, "y": 3}, "two": {"y": 2}}, title="t")
    first, second, third = shapes(chart, "rect", "fill")
    assert float(first["x"]) + float(first["width"]) == pytest.approx(float(second["x"]), abs=0.11)
    assert float(second["width"]) == pytest.approx(1.5 * float(third["width"]), abs=0.2)
    assert [each["title"] for each in (first, second, third)] == ["one, x: 1", "one, y: 3", "two, y: 2"]


def test_quantiles_of_a_spread():
    spread = Spread(lowest=0, low=1, middle=2, high=3, highest=4)
    chart = quantile_bars({"a": spread, "b": Spread(lowest=math.nan, low=1, middle=2, high=3, highest=4)}, title="t")
    (whisker,) = shapes(chart, "line", "series")
    (box,) = shapes(chart, "rect", "fill")
    assert float(box["width"]) == pytest.approx((float(whisker["x2"]) - float(whisker["x1"])) / 2, abs=0.2)


EMPTY = [
    line_chart([], title="t"),
    line_chart([Series(name="a", x=[], y=[])], title="t", is_log_y=True),
    line_chart([Series(name="a", x=[3], y=[0])], title="t"),
    histogram({}, title="t"), histogram({"a": []}, title="t", is_share=True),
    scatter([], title="t"), scatter([Points(name="a", x=[], y=[])], title="t"),
    bars({}, title="t"), stacked_bars({}, title="t"), stacked_bars({"a": {}}, title="t"), quantile_bars({}, title="t"),
]  # fmt: skip


@pytest.mark.parametrize("chart", EMPTY)
def test_a_chart_of_nothing_is_a_chart(chart):
    assert ElementTree.fromstring(str(chart)).find("svg") is not None
    assert "nan" not in str(chart)
