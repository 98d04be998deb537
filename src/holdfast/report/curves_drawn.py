"""A panel as a chart of the page: the curves of one run by their metrics, or those of several runs by run.

Many logs are drawn as their running mean, with the logs themselves faint behind it.
"""

from collections.abc import Sequence

import numpy as np

from holdfast.pages.charts.lines import Level, Mark, Range, Series, line_chart
from holdfast.pages.markup import Html
from holdfast.report.healthy import LN_2, compares_with_reference
from holdfast.report.panels import Curve, Panel, curves_of, ranges_of
from holdfast.report.run import Run

_MANY = 60
_MOST_SYNCS = 150
_LEVELS = {
    "loss": Level(y=LN_2, text="ln 2: policy and reference are the same"),
    "rewards/accuracies": Level(y=0.5, text="chance"),
    "rewards/chosen": Level(y=0.0, text="the reference"),
    "reference/kl_chosen": Level(y=0.0, text="the reference"),
    "rewards/margins": Level(y=0.0, text="no preference"),
    "win_rate": Level(y=0.5, text="as often as the reference"),
}
_OF_SIGMOID = "loss"


def chart(runs: Sequence[Run], panel: Panel) -> Html:
    """The chart of a panel for one run, or for several of them over each other."""
    series: list[Series] = []
    for place, run in enumerate(runs):
        for curve in curves_of(run, panel):
            series += _series_of(curve, place if len(runs) > 1 else None, len(panel.metrics), runs)
    metric = next(iter(panel.metrics))
    levels = [_LEVELS[metric]] if metric in _LEVELS and _has_level(runs, metric) else []
    ranges = [
        Range(low=each.low, high=each.high, text=f"healthy: {_plain(each.words)}") for each in ranges_of(runs, panel)
    ]
    return line_chart(
        series, title=panel.title, y_label=panel.unit, ranges=ranges, levels=levels,
        marks=_marks(runs[0]) if len(runs) == 1 else [],
    )  # fmt: skip


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value with those up to `width // 2` places before and behind it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts = np.maximum(places - width // 2, 0)
    ends = np.minimum(places + width // 2 + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _series_of(curve: Curve, run_place: int | None, num_metrics: int, runs: Sequence[Run]) -> list[Series]:
    """The lines of a curve. Of one run, each metric has a colour; of several, each run has one, and metrics differ by
    their pattern."""
    evaluation = [*dict.fromkeys(each for run in runs for each in ("", *run.evaluations))].index(curve.evaluation)
    color = curve.place if run_place is None else run_place
    dash = evaluation if run_place is None else evaluation * num_metrics + curve.place
    name = curve.label if run_place is None else f"{curve.run.name}: {curve.label}"
    is_sparse = bool(curve.evaluation)
    x, y = curve.steps.tolist(), curve.values
    low, high = (None if part is None or run_place is not None else part for part in (curve.low, curve.high))
    if len(y) <= _MANY:
        return [
            Series(name=name, x=x, y=y.tolist(), color=color, dash=dash, has_dots=is_sparse or len(y) == 1,
                   low=_listed(low), high=_listed(high))
        ]  # fmt: skip
    width = max(3, len(y) // 30)
    mean = running_mean(y, width)
    bands = [None if part is None else running_mean(part, width).tolist() for part in (low, high)]
    smooth = Series(name=name, x=x, y=mean.tolist(), color=color, dash=dash, low=bands[0], high=bands[1])
    if run_place is not None:
        return [smooth]
    return [Series(name=name, x=x, y=y.tolist(), color=color, dash=0, is_faint=True), smooth]


def _listed(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _has_level(runs: Sequence[Run], metric: str) -> bool:
    if metric.startswith(("rewards/chosen", "reference/")):
        return all(map(compares_with_reference, runs))
    if metric != _OF_SIGMOID:
        return True
    return all(run.facts is not None and run.facts.loss_types == ("sigmoid",) for run in runs)


def _marks(run: Run) -> list[Mark]:
    syncs = run.syncs()
    every = -(-len(syncs) // _MOST_SYNCS)
    kind = "sync of the reference" if every <= 1 else f"every {every}th of {len(syncs):,} syncs of the reference"
    marks = [Mark(x=step, text=text, kind=kind) for step, text in syncs[:: max(1, every)]]
    marks += [Mark(x=event.step, text=event.text, kind="resumed") for event in run.events if event.kind == "resumed"]
    return sorted(marks, key=lambda mark: mark.x)


def _plain(words: str) -> str:
    return words.replace("`", "")
