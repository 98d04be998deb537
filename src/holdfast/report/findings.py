"""What is to be said of a run: where it leaves a healthy range, and what several numbers say together.

Each finding is a sentence with the numbers it rests on, and what to do. It is shown beside the curve it is about, and
the first ones at the top of the report.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import final

import numpy as np

from holdfast.report.changes import changes
from holdfast.report.healthy import FEWEST_LOGS, HEALTHY, healthy_range, judged, recent
from holdfast.report.run import Run
from holdfast.report.units import percent

PAPERS = "Razin et al. 2024, arXiv:2410.08847; Ren and Sutherland 2024, arXiv:2407.10490"
_GAP_OF_ACCURACIES = 0.15
_RISE_OF_LOSS = 0.02
_SHARE_LEFT_OUT = 0.1
_SHARE_OF_REFERENCE = 0.3
_AHEAD = ("PrecomputedReference", "WindowedReference", "GivenReference")
"""The kinds of a reference whose log-probs are known ahead."""
_NOTHING = 0.01
"""A mean margin below this, in rewards, is nothing learnt."""


class Kind(StrEnum):
    """How much a finding matters."""

    GOOD = "good"
    NOTE = "note"
    WARNING = "warn"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A sentence about a run, and the metric it is about ("" for none)."""

    kind: Kind
    metric: str
    text: str


def findings(run: Run) -> tuple[Finding, ...]:
    """What is to be said of a run, warnings first."""
    found = [
        *_squeeze(run), *_outside(run), *_memorised(run), *_overfitted(run), *_nothing_learnt(run), *_left_out(run),
        *_waiting_for_reference(run), *_alarms(run), *_damage(run),
    ]  # fmt: skip
    order = [Kind.WARNING, Kind.NOTE, Kind.GOOD]
    return tuple(sorted(found, key=lambda finding: order.index(finding.kind)))


def _outside(run: Run) -> Iterator[Finding]:
    """Metrics that have left their healthy range, those of evaluations beside those of training."""
    for healthy in HEALTHY:
        names = [prefix + healthy.metric for prefix in ("", *run.evaluations)]
        found = {name: value for name in names if healthy_range(run, name) and (value := judged(run, name)) is not None}
        outside = {name: each for name, each in found.items() if each.since is not None}
        if not outside:
            continue
        (metric, first), *others = outside.items()
        beside = f" (and {', '.join(f'{name} {each.value:.4g}' for name, each in others)})" if others else ""
        text = (
            f"{metric} is {first.value:.4g} over the last logs{beside}, outside its healthy range ({healthy.words}) "
            f"since step {first.since:,}: {healthy.otherwise}."
        )
        yield Finding(kind=Kind.WARNING, metric=metric, text=text)


def _squeeze(run: Run) -> Iterator[Finding]:
    found = changes(run)
    if found is None or not found.has_chosen_fallen:
        return
    both = f"chosen {found.chosen:+.3g} nats, rejected {found.rejected:+.3g}"
    metric = "reference/kl_chosen" if found.is_against_reference else "logps/chosen"
    if found.has_order_grown and found.has_rejected_fallen:
        text = (
            f"Both fall: the usual squeeze ({both}), see {PAPERS}. The loss asks for their difference alone, and that "
            "has grown. Whether the completions are still good is told by samples and held-out pairs."
        )
        yield Finding(kind=Kind.NOTE, metric=metric, text=text)
    elif not found.has_order_grown:
        text = (
            f"The chosen completions fall and do not gain on the rejected ones ({both}): the run loses text without "
            "learning the order. Lower the learning rate, and look whether chosen and rejected are swapped."
        )
        yield Finding(kind=Kind.WARNING, metric=metric, text=text)


def _memorised(run: Run) -> Iterator[Finding]:
    name = "rewards/accuracies"
    _, of_training = run.series(name)
    for prefix in run.evaluations:
        held_out = run.last(prefix + name)
        if held_out is None or len(of_training) < FEWEST_LOGS:
            continue
        of_pairs = float(recent(of_training).mean())
        if of_pairs - held_out > _GAP_OF_ACCURACIES:
            text = (
                f"{prefix}{name} is {held_out:.3g}, and {of_pairs:.3g} in training: the pairs are being learnt by "
                "heart. Fewer epochs, more pairs, or a lower learning rate."
            )
            yield Finding(kind=Kind.WARNING, metric=prefix + name, text=text)


def _overfitted(run: Run) -> Iterator[Finding]:
    for prefix in run.evaluations:
        steps, losses = run.series(f"{prefix}loss")
        if len(losses) < FEWEST_LOGS:
            continue
        best = int(np.argmin(losses))
        if best < len(losses) - 1 and losses[-1] > losses[best] + _RISE_OF_LOSS * abs(losses[best]):
            text = (
                f"{prefix}loss was lowest at step {steps[best]:,.0f} ({losses[best]:.4g}) and is {losses[-1]:.4g} now: "
                "what came after does not help held-out pairs. Take that checkpoint (load_best_model_at_end), or train "
                "for fewer epochs."
            )
            yield Finding(kind=Kind.WARNING, metric=f"{prefix}loss", text=text)


def _nothing_learnt(run: Run) -> Iterator[Finding]:
    found = judged(run, "rewards/margins")
    accuracy = run.last("rewards/accuracies")
    is_late = run.is_over and run.last_step > 0
    if found is not None and is_late and accuracy is not None and abs(found.value) < _NOTHING:
        text = (
            f"rewards/margins is {found.value:.2g} at the end: the policy has hardly moved. The learning rate is too "
            "low, the run too short, or too little of the model trains."
        )
        yield Finding(kind=Kind.WARNING, metric="rewards/margins", text=text)


def _left_out(run: Run) -> Iterator[Finding]:
    for name, data in ({} if run.facts is None else run.facts.data).items():
        if not data.left_out or not data.num_rows:
            continue
        num_left_out = sum(data.left_out.values())
        if num_left_out > _SHARE_LEFT_OUT * data.num_rows:
            reason, count = max(data.left_out.items(), key=lambda item: item[1])
            share = percent(num_left_out / data.num_rows)
            text = (
                f"{num_left_out:,} of {data.num_rows:,} rows of the {name} data ({share}) are left out, most of them "
                f"since: {reason} ({count:,}). `holdfast data` shows such rows."
            )
            yield Finding(kind=Kind.WARNING, metric="", text=text)


def _waiting_for_reference(run: Run) -> Iterator[Finding]:
    parts = time_by_part(run)
    whole = sum(parts.values())
    reference = None if run.facts is None else run.facts.reference
    if reference is None or reference.moves or reference.kind in _AHEAD:
        return
    if whole and parts.get("reference", 0.0) > _SHARE_OF_REFERENCE * whole:
        share = percent(parts["reference"] / whole)
        text = (
            f"The reference took {share} of the time. With `precompute_ref_log_probs=True` it is asked once for each "
            "completion, and never again for the same data."
        )
        yield Finding(kind=Kind.NOTE, metric="time/reference", text=text)


def time_by_part(run: Run) -> dict[str, float]:
    """Seconds of the whole run by part (`policy`, `reference`, `data`, `other`): of each log its mean per step times
    the steps since the log before."""
    parts: dict[str, float] = dict.fromkeys(("policy", "reference", "data", "other"), 0.0)
    before = 0
    for log in run.logs:
        found = {part: log.numbers[f"time/{part}"] for part in parts if f"time/{part}" in log.numbers}
        for part, seconds in found.items():
            parts[part] += seconds * (log.step - before)
        before = log.step if found else before
    return {part: seconds for part, seconds in parts.items() if seconds > 0}


def _alarms(run: Run) -> Iterator[Finding]:
    for event in run.events:
        if event.kind == "alarm":
            text = f"Said in the run at step {event.step:,}: {event.text}"
            yield Finding(kind=Kind.NOTE, metric="reference/kl_chosen", text=text)


def _damage(run: Run) -> Iterator[Finding]:
    if run.checkpoint is not None and run.checkpoint.damage:
        text = f"The last checkpoint, {run.checkpoint.folder.name}, is damaged: {run.checkpoint.damage}."
        yield Finding(kind=Kind.WARNING, metric="", text=text)


def of_metric(found: tuple[Finding, ...], metric: str) -> tuple[Finding, ...]:
    """The findings about a metric, or about the same metric of an evaluation."""
    return tuple(each for each in found if each.metric == metric or each.metric.endswith(f"_{metric}"))
