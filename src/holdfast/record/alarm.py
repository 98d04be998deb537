"""When to sound the alarm: log-probs of chosen completions fall while margins rise.

The loss of DPO asks for a difference alone, so it also falls where both completions become less likely, the rejected
one faster. What the policy then writes instead is in no pair (likelihood displacement: Razin et al. 2024,
arXiv:2410.08847; Pal et al. 2024, arXiv:2402.13228). A single log is noisy. So a straight line is fitted to the last
logs, 4 to 64 of them, and both slopes must be beyond what noise does in one of 1000 such windows. It is said once per
onset: again only after half of the fall was made good.

All of this is a function of logged numbers, so a report finds the same alarms, and a resumed run repeats none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from holdfast.record.entries import Log

LEAST_FALL_NATS = 1.0
"""A fall of the mean log-prob of a completion by less than this is none."""

_BEYOND_NOISE = {4: 22.3, 5: 10.2, 6: 7.17, 8: 5.21, 12: 4.14, 16: 3.79, 24: 3.50, 32: 3.39, 48: 3.28, 64: 3.23}
"""By the number of logs in a window: the t of a slope that noise exceeds in one of 1000 (n - 2 degrees of freedom)."""

AGAINST_REFERENCE, OF_POLICY = "reference/kl_chosen", "logps/chosen"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Chosen completions fell while margins rose, from `since` to `step`. The values are those of the fitted lines.

    `chosen` is `log pi_theta - log pi_ref` of a chosen completion in nats (`is_against_reference`), or
    `log pi_theta`; `margin` is in beta * nats.
    """

    step: int
    since: int
    chosen_before: float
    chosen_now: float
    margin_before: float
    margin_now: float
    is_against_reference: bool

    def sentence(self, loss_types: Sequence[str], *, learning_rate: float, beta: float) -> str:
        """What is said: what happens, why, and what to do."""
        against = " against the reference" if self.is_against_reference else ""
        likelihood = (
            "give `sft` more weight (loss_weights)"
            if "sft" in loss_types
            else f"add the likelihood of the chosen (loss_type: [{', '.join([*loss_types, 'sft'])}])"
        )
        return (
            f"Step {self.step}: log-probs of chosen completions fall ({self.chosen_before:.3g} to "
            f"{self.chosen_now:.3g} nats{against} since step {self.since}) while margins rise "
            f"({self.margin_before:.3g} to {self.margin_now:.3g}). Pairs are told apart by making both completions "
            "less likely; what the policy writes instead is in no pair. If its samples get worse: lower the learning "
            f"rate (now {learning_rate:g}), raise beta (now {beta:g}), or {likelihood}. See "
            '"Both fall" in docs/metrics.md.'
        )

    def numbers(self) -> dict[str, float]:
        """The numbers of its event."""
        return {
            "since_step": self.since,
            "chosen_before": self.chosen_before,
            "chosen_now": self.chosen_now,
            "margin_before": self.margin_before,
            "margin_now": self.margin_now,
        }


@final
class Alarms:
    """The alarms of a run, log by log. `history` are those that were logged before, of which nothing is said again."""

    def __init__(self, history: Iterable[Log] = ()) -> None:
        self._logs: list[Log] = []
        self._last: Alarm | None = None
        for log in history:
            self.add(log)

    def add(self, log: Log) -> Alarm | None:
        """The alarm that this log of training sets off, if it does."""
        self._logs = [*self._logs, log][-max(_BEYOND_NOISE) :]
        if self._last is not None:
            chosen = chosen_of(log, is_against_reference=self._last.is_against_reference)
            half = (self._last.chosen_before + self._last.chosen_now) / 2
            if chosen is not None and chosen < half:
                return None
            self._last, self._logs = None, [log]
            return None
        self._last = falling(self._logs)
        return self._last


def alarms(logs: Iterable[Log]) -> list[Alarm]:
    """The alarms of a run, from its logs of training."""
    state = Alarms()
    return [alarm for log in logs if (alarm := state.add(log)) is not None]


def falling(logs: Sequence[Log]) -> Alarm | None:
    """The alarm over the last of these logs of training; None where there is none.

    The chosen log-probs are those against the reference where it is fixed, which texts of other lengths do not move;
    there they must also be below the reference's. Of a moving reference, and of none, they are the policy's own.
    """
    is_against = all("reference/version" not in log.numbers and AGAINST_REFERENCE in log.numbers for log in logs)
    points = [
        (log.step, chosen, margin)
        for log in logs
        if (chosen := chosen_of(log, is_against_reference=is_against)) is not None
        and (margin := _margin(log)) is not None
    ]
    chosen, margins = _Line(), _Line()
    for size, (step, of_chosen, of_margin) in enumerate(reversed(points), 1):
        chosen.add(step, of_chosen)
        margins.add(step, of_margin)
        if (beyond_noise := _BEYOND_NOISE.get(size)) is None:
            continue
        falls = chosen.t() <= -beyond_noise and chosen.first() - chosen.last() >= LEAST_FALL_NATS
        if falls and margins.t() >= beyond_noise and not (is_against and chosen.last() >= 0):
            return Alarm(
                step=points[-1][0],
                since=step,
                chosen_before=chosen.first(),
                chosen_now=chosen.last(),
                margin_before=margins.first(),
                margin_now=margins.last(),
                is_against_reference=is_against,
            )
    return None


def training_logs(entries: Iterable[Mapping[str, Any]]) -> list[Log]:
    """The logs of training among the entries of `log_history`."""
    return [
        Log(step=int(entry["step"]), epoch=None, seconds=None, numbers=entry)
        for entry in entries
        if "loss" in entry and "rewards/margins" in entry
    ]


def chosen_of(log: Log, *, is_against_reference: bool) -> float | None:
    """The log-prob of a chosen completion, against the reference or the policy's own."""
    return log.numbers.get(AGAINST_REFERENCE if is_against_reference else OF_POLICY)


def _margin(log: Log) -> float | None:
    """The margin; of a moving reference, which changes rewards by its syncs, that of the policy's log-probs."""
    if "reference/version" not in log.numbers:
        return log.numbers.get("rewards/margins")
    chosen, rejected = log.numbers.get(OF_POLICY), log.numbers.get("logps/rejected")
    return None if chosen is None or rejected is None else chosen - rejected


@final
class _Line:
    """The least-squares line through points that are added from the last to the first. Sums are of distances from the
    last point, so that large steps and values cost no digits."""

    def __init__(self) -> None:
        self._num = 0
        self._last = self._first = 0.0, 0.0
        self._x = self._y = self._xx = self._xy = self._yy = 0.0

    def add(self, step: float, value: float) -> None:
        """Adds a point before all others."""
        if self._num == 0:
            self._last = step, value
        self._first = step, value
        x, y = step - self._last[0], value - self._last[1]
        self._num += 1
        self._x += x
        self._y += y
        self._xx += x * x
        self._xy += x * y
        self._yy += y * y

    def _spreads(self) -> tuple[float, float, float]:
        """Sums of squares and products about the means."""
        x, y, num = self._x, self._y, self._num
        return self._xx - x * x / num, self._xy - x * y / num, self._yy - y * y / num

    def t(self) -> float:
        """The slope over its standard error; infinite for a line without noise, 0 for a level one."""
        xx, xy, yy = self._spreads()
        if self._num < 3 or xx <= 0 or abs(xy) <= 1e-12 * math.sqrt(xx * max(yy, 0.0)):
            return 0.0
        residual = yy - xy * xy / xx
        if residual <= 1e-12 * yy:
            return math.copysign(math.inf, xy)
        return xy / math.sqrt(residual / (self._num - 2) * xx)

    def first(self) -> float:
        """The line's value at the first point."""
        return self._at(self._first[0] - self._last[0])

    def last(self) -> float:
        """The line's value at the last point."""
        return self._at(0.0)

    def _at(self, x: float) -> float:
        xx, xy, _ = self._spreads()
        slope = xy / xx if xx > 0 else 0.0
        return self._last[1] + self._y / self._num + slope * (x - self._x / self._num)
