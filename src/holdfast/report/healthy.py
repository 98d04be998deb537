"""`HEALTHY`: which values of a metric are healthy, and what it means where they are not. `docs/metrics.md` has the same
table, and the report draws each range beside its curve.

The ranges are wide: what leaves them needs a look, and is no proof of a fault. They hold for a mean over the last fifth
of the logs, so that a single log decides nothing, and are not asked of the first tenth of a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from holdfast.report.run import Run

FIRST_SHARE, LAST_SHARE = 0.1, 0.2
"""The share of a run's steps of which nothing is asked, and the share of its logs that is judged."""
FEWEST_LOGS = 3
LN_2 = math.log(2)
REFERENCE_FREE = frozenset({"sft", "simpo", "orpo", "cpo"})
"""The losses that compare with no reference."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Healthy:
    """The healthy values of a metric, from `low` to `high` (None: without end), in words, and what to think and do
    where they are left. `of_losses`: only where these are the run's losses; `compares`: only where the losses compare
    with a reference. With `share_of_first`, `low` is that share of the metric's first values."""

    metric: str
    low: float | None = None
    high: float | None = None
    words: str
    otherwise: str
    of_losses: tuple[str, ...] | None = None
    compares: bool = False
    share_of_first: float | None = None


SQUEEZE = (
    "both completions are pushed away, the usual squeeze: the loss only asks for their difference. Add `sft` to "
    "`loss_type`, raise `beta`, or lower the learning rate"
)
HEALTHY = (
    Healthy(
        metric="loss", high=round(LN_2, 4), of_losses=("sigmoid",),
        words="below ln 2 = 0.6931, its value where policy and reference are the same (`loss_type: sigmoid`)",
        otherwise="the policy orders the pairs less well than the reference: the learning rate is too high, or these "
        "pairs are new to it and those of training were learnt by heart",
    ),
    Healthy(
        metric="rewards/margins", low=0.0, words="above 0",
        otherwise="the policy prefers the rejected completions more than the reference does: the learning rate is too "
        "high, or chosen and rejected are swapped",
    ),
    Healthy(
        metric="rewards/accuracies", low=0.5, words="above 0.5, which is chance",
        otherwise="the policy has not learnt which completion is chosen: the learning rate is too low or far too high, "
        "or the pairs have no signal",
    ),
    Healthy(metric="rewards/chosen", low=-3.0, compares=True, words="above -3", otherwise=SQUEEZE),
    Healthy(
        metric="reference/kl_chosen", low=-100.0, high=100.0, words="within 100 nats",
        otherwise="the policy is leaving the text it was anchored to. Raise `beta`, or lower the learning rate",
    ),
    Healthy(
        metric="reference/kl_rejected", low=-200.0, high=100.0, words="from -200 to 100 nats",
        otherwise="the policy is leaving the text it was anchored to. Raise `beta`, or lower the learning rate",
    ),
    Healthy(
        metric="entropy", share_of_first=0.5, words="above half of its first value",
        otherwise="the policy puts its probability on ever fewer tokens. Lower the learning rate, raise `beta`, or "
        "train for fewer epochs",
    ),
    Healthy(
        metric="win_rate", low=0.5, words="above 0.5, where policy and reference win equally often",
        otherwise="the judge prefers the reference's completions: the policy has lost more than it has learnt",
    ),
)  # fmt: skip
BY_METRIC = {each.metric: each for each in HEALTHY}


def healthy_range(run: Run, metric: str) -> Healthy | None:
    """The healthy values of a metric in this run, also of its evaluations, with the ends of their range; None where
    none are known."""
    prefix = max((each for each in run.evaluations if metric.startswith(each)), key=len, default="")
    found = BY_METRIC.get(metric.removeprefix(prefix))
    if found is None or (found.compares and not compares_with_reference(run)):
        return None
    if found.share_of_first is not None:
        first = run.series(metric)[1][:FEWEST_LOGS]
        return replace(found, low=found.share_of_first * float(first.mean())) if first.size else None
    losses = None if run.facts is None else run.facts.loss_types
    return found if found.of_losses is None or losses == found.of_losses else None


def compares_with_reference(run: Run) -> bool:
    """Whether the rewards of a run are of a policy against a reference, rather than of the policy alone."""
    if run.facts is None:
        return any(metric.endswith("reference/kl_chosen") for metric in run.metrics)
    return not set(run.facts.loss_types) <= REFERENCE_FREE


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The recent mean of a metric, and since which step each log was outside of its range; None where it is within."""

    value: float
    since: int | None


def judged(run: Run, metric: str) -> Judged | None:
    """The recent mean of a metric, held against its range. None where there is no range, or too little was logged."""
    healthy = healthy_range(run, metric)
    steps, values = after_the_start(run, metric)
    if healthy is None or not values.size:
        return None
    value = float(recent(values).mean())
    if _is_within(healthy, value):
        return Judged(value=value, since=None)
    is_outside = np.array([not _is_within(healthy, each) for each in values])
    within = np.flatnonzero(~is_outside)
    first = int(within[-1]) + 1 if within.size and within[-1] + 1 < len(values) else int(np.argmax(is_outside))
    return Judged(value=value, since=int(steps[first]))


def recent(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The last fifth of the values, at least one."""
    return np.asarray(values)[-max(1, math.ceil(len(values) * LAST_SHARE)) :]


def after_the_start(run: Run, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric after the first tenth of the run. Nothing of a metric of training that was logged
    less than three times there."""
    steps, values = run.series(metric)
    length = run.last_step if run.facts is None or run.facts.max_steps < 1 else run.facts.max_steps
    is_late = steps > FIRST_SHARE * length
    is_enough = is_late.sum() >= FEWEST_LOGS or metric.startswith("eval_") or metric == "win_rate"
    return (steps[is_late], values[is_late]) if is_enough else (steps[:0], values[:0])


def _is_within(healthy: Healthy, value: float) -> bool:
    return (healthy.low is None or value >= healthy.low) and (healthy.high is None or value <= healthy.high)
