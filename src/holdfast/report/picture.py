"""The main curves of runs as a PNG, by matplotlib: for a slide, a model card or a message."""

import io
import warnings
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from holdfast.report.curves_drawn import running_mean
from holdfast.report.healthy import LN_2
from holdfast.report.panels import Panel, curves_of, panels_of, ranges_of
from holdfast.report.run import Run
from holdfast.visible import visible

COLORS = ("#0072B2", "#D55E00", "#00835F", "#A8457F", "#8A6D00", "#2F8FC4", "#5B4FC0", "#555B61")
_DASHES = ("-", "--", ":", "-.")
_HEALTHY, _FAINT = "#2E9E5B", "#63676C"
_NUM_COLUMNS, _MANY = 3, 60
_MOST_LETTERS, _MOST_SYNCS = 110, 150


def report_png(runs: Sequence[Run], dots_per_inch: int = 110) -> bytes:
    """The picture's file content."""
    panels = [panel for panel in panels_of(runs) if panel.is_main]
    num_lines = max(1, -(-len(panels) // _NUM_COLUMNS))
    figure = Figure(figsize=(14, 0.9 + 3.3 * num_lines), layout="constrained")
    axes = figure.subplots(num_lines, _NUM_COLUMNS, squeeze=False).ravel()
    for place, each in enumerate(axes):
        if place < len(panels):
            _draw(each, runs, panels[place])
        else:
            each.set_visible(False)
    figure.suptitle(_title(runs), fontsize=11, parse_math=False)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a run's name
        figure.savefig(picture, dpi=dots_per_inch, format="png")
    return picture.getvalue()


def _title(runs: Sequence[Run]) -> str:
    names = visible(", ".join(run.name for run in runs))
    facts = runs[0].facts
    reference = facts.reference if facts is not None and len(runs) == 1 else None
    text = names if reference is None else f"{names}\nreference: {visible(reference.description)}"
    return "\n".join(line if len(line) <= _MOST_LETTERS else f"{line[:_MOST_LETTERS]}..." for line in text.split("\n"))


def _draw(axes: Axes, runs: Sequence[Run], panel: Panel) -> None:
    for place, run in enumerate(runs):
        for curve in curves_of(run, panel):
            color = COLORS[(curve.place if len(runs) == 1 else place) % len(COLORS)]
            number = ("", *run.evaluations).index(curve.evaluation)
            dash = number if len(runs) == 1 else number * len(panel.metrics) + curve.place
            label = curve.label if len(runs) == 1 else f"{run.name}: {curve.label}"
            is_many = len(curve.values) > _MANY
            values = running_mean(curve.values, max(3, len(curve.values) // 30)) if is_many else curve.values
            if is_many and len(runs) == 1:
                axes.plot(curve.steps, curve.values, color=color, linewidth=0.6, alpha=0.35)
            if curve.low is not None and curve.high is not None and len(runs) == 1 and not is_many:
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
            axes.plot(
                curve.steps, values, color=color, linewidth=1.5, linestyle=_DASHES[dash % len(_DASHES)],
                marker="o" if curve.evaluation or len(values) == 1 else None, markersize=3, label=visible(label),
            )  # fmt: skip
    _draw_ranges(axes, runs, panel)
    syncs = runs[0].syncs() if len(runs) == 1 else []
    for step, _ in syncs[:: max(1, -(-len(syncs) // _MOST_SYNCS))]:
        axes.axvline(step, color=_FAINT, linewidth=0.6, linestyle=":")
    axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)


def _draw_ranges(axes: Axes, runs: Sequence[Run], panel: Panel) -> None:
    """The healthy range, as far as the axis goes without it."""
    low, high = axes.get_ylim()
    for each in ranges_of(runs, panel):
        bottom = low if each.low is None else max(low, each.low)
        top = high if each.high is None else min(high, each.high)
        if bottom < top:
            axes.axhspan(bottom, top, color=_HEALTHY, alpha=0.07, linewidth=0)
        if each.high is not None and abs(each.high - LN_2) < 1e-3 and low <= LN_2 <= high:
            axes.axhline(LN_2, color=_FAINT, linewidth=0.8, linestyle="--")
    axes.set_ylim(low, high)
