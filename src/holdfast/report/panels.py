"""Which curves belong together, and what is said beside them. What no panel names gets a panel of its own, so every
number that was logged is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.report.healthy import Healthy, healthy_range
from holdfast.report.run import Run

_HIDDEN = frozenset({"epoch", "num_tokens"})
_BY_SOURCE = "rewards/margins/"
"""How a metric begins that every source of an evaluation has; then comes the source's name."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Curves over the steps: their metrics by what they are called in the legend, the unit, and a sentence about what
    they are. `is_main`: among the first ones, and in the picture."""

    title: str
    metrics: dict[str, str]
    unit: str = ""
    words: str = ""
    is_main: bool = False
    scale: float = 1.0
    """What the numbers are divided by, to be in the unit."""


PANELS = (
    Panel(title="Loss", metrics={"loss": "loss"}, is_main=True, words="Per pair, the weighted sum of all losses."),
    Panel(
        title="Margin", metrics={"rewards/margins": "margin"}, unit="beta * nats", is_main=True,
        words="Chosen reward minus rejected reward; the band holds 80 % of the pairs.",
    ),
    Panel(
        title="Accuracy", metrics={"rewards/accuracies": "accuracy"}, is_main=True,
        words="Share of the pairs whose chosen reward is the higher one.",
    ),
    Panel(
        title="Rewards of both sides", metrics={"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        unit="beta * nats", is_main=True, words="beta * (log-prob of the policy - log-prob of the reference).",
    ),
    Panel(
        title="Distance from the reference (KL)",
        metrics={"reference/kl_chosen": "chosen", "reference/kl_rejected": "rejected"}, unit="nats", is_main=True,
        words="log-prob of the policy - log-prob of the reference, per completion.",
    ),
    Panel(
        title="Log-probs of both sides", metrics={"logps/chosen": "chosen", "logps/rejected": "rejected"}, unit="nats",
        is_main=True, words="Of the policy, summed over a completion's tokens.",
    ),
    Panel(
        title="Win rate", metrics={"win_rate": "win rate", "win_rate_ties": "ties"},
        words="Share of prompts for which the judge prefers the policy's completion to the reference's.",
    ),
    Panel(title="Gradient norm", metrics={"grad_norm": "norm"}, words="Before it is clipped."),
    Panel(title="Learning rate", metrics={"learning_rate": "learning rate"}),
    Panel(title="Entropy", metrics={"entropy": "entropy"}, unit="nats", words="Of the policy's next token."),
    Panel(
        title="First choice", metrics={"mean_token_accuracy": "share"},
        words="Share of chosen tokens that are the policy's first choice.",
    ),
    Panel(
        title="How far the reference moved", metrics={"reference/drift": "drift"},
        words="L2 norm in weight space of its last sync.",
    ),
    Panel(title="Logits", metrics={"logits/chosen": "chosen", "logits/rejected": "rejected"}),
    Panel(
        title="Time of a step",
        metrics={f"time/{part}": part for part in ("policy", "reference", "data", "other")}, unit="seconds",
    ),
    Panel(title="Speed", metrics={"speed/pairs_per_second": "pairs"}, unit="pairs per second"),
    Panel(title="Speed in tokens", metrics={"speed/tokens_per_second": "tokens"}, unit="tokens per second"),
    Panel(title="Memory", metrics={"memory/peak_bytes": "highest"}, unit="GB", scale=1e9),
)  # fmt: skip


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A metric of a run as it is drawn. `place` counts the metrics of the panel, `evaluation` is the prefix of an
    evaluation, "" for training. `low` and `high` are quantiles of pairs."""

    run: Run
    metric: str
    label: str
    place: int
    evaluation: str
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The panels that any of the runs has a curve for: the known ones, then one for each other metric, of which those
    of one loss beside others come first. Metrics by source are no curves."""
    known = {metric for panel in PANELS for metric in panel.metrics} | _HIDDEN
    others: dict[str, None] = {}
    for run in runs:
        plain = [_without_prefix(run, metric) for metric in run.metrics]
        sources = {metric.removeprefix(_BY_SOURCE) for metric in plain if metric.startswith(_BY_SOURCE)}
        others |= dict.fromkeys(
            metric
            for metric in plain
            if metric not in known and not _is_beside_another(metric) and not _is_by_source(metric, sources)
        )
    of_losses = [metric for metric in others if metric.startswith("loss/")]
    rest = [metric for metric in others if metric not in of_losses]
    terms = [Panel(title="Terms of the loss", metrics={each: each.removeprefix("loss/") for each in of_losses})]
    found = [*PANELS, *(terms if of_losses else []), *(Panel(title=each, metrics={each: each}) for each in rest)]
    return [panel for panel in found if any(curves_of(run, panel) for run in runs)]


def curves_of(run: Run, panel: Panel) -> list[Curve]:
    """The curves of one run in a panel: of training, then of each evaluation set."""
    curves = []
    for prefix in ("", *run.evaluations):
        for place, (metric, label) in enumerate(panel.metrics.items()):
            steps, values = run.series(prefix + metric)
            values = values / panel.scale
            if not values.size:
                continue
            name = label if not prefix else f"{label}, {prefix.removeprefix('eval_').removesuffix('_') or 'eval'}"
            has_band = not any(curve.low is not None for curve in curves)
            low, high = (
                _beside(run, f"{prefix}{metric}_{quantile}", len(steps)) if has_band else None
                for quantile in ("p10", "p90")
            )
            curves.append(
                Curve(
                    run=run, metric=prefix + metric, label=name, place=place, evaluation=prefix, steps=steps,
                    values=values, low=low, high=high,
                )
            )  # fmt: skip
    return curves


def ranges_of(runs: Sequence[Run], panel: Panel) -> list[Healthy]:
    """The healthy ranges of a panel's metrics that hold for all the runs; none where they differ between metrics."""
    found = [healthy_range(run, metric) for run in runs for metric in panel.metrics]
    ranges = [each for each in found if each is not None and (len(runs) == 1 or each.share_of_first is None)]
    distinct = {(each.low, each.high): each for each in ranges}
    if len(distinct) == 1 and len(ranges) >= len(runs):
        return [*distinct.values()]
    return [each for each in distinct.values() if each.metric == next(iter(panel.metrics))]


def by_source(run: Run, metric: str = "rewards/accuracies") -> dict[str, float]:
    """The last values of a metric of evaluation by source."""
    found = {}
    for name in run.metrics:
        plain = _without_prefix(run, name)
        if plain.startswith(f"{metric}/") and name != plain:
            value = run.last(name)
            prefix = name[: len(name) - len(plain)].removeprefix("eval_")
            if value is not None:
                found[f"{prefix.removesuffix('_')} {plain.removeprefix(f'{metric}/')}".strip()] = value
    return found


def _beside(run: Run, metric: str, length: int) -> np.ndarray | None:
    values = run.series(metric)[1]
    return values if len(values) == length and length else None


def _without_prefix(run: Run, metric: str) -> str:
    prefix = max((each for each in run.evaluations if metric.startswith(each)), key=len, default="")
    return metric.removeprefix(prefix)


def _is_by_source(metric: str, sources: set[str]) -> bool:
    """Whether a metric is another one with the name of a source behind it."""
    return any(metric.endswith(f"/{source}") for source in sources)


def _is_beside_another(metric: str) -> bool:
    """Whether a metric is a quantile or an error of another, drawn or said with it."""
    return metric.endswith(("_p10", "_p50", "_p90", "_se")) or metric in ("reference/version", "reference/age")
