"""How far a run moved the log-probs of both completions, in nats: what the question about falling rewards is about."""

from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.report.healthy import after_the_start, compares_with_reference, recent
from holdfast.report.run import Run

LEAST_NATS, LEAST_SHARE = 0.1, 0.05
"""A change counts from a tenth of a nat, and from a twentieth of the larger of both changes."""
NUM_FIRST = 3


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The mean changes of the chosen and the rejected completions' log-probs, nats per completion, and of the margin
    (the reward's unit), over the last fifth of the logs.

    Against the reference where there is one, else against the run's first logs. `is_held_out`: of an evaluation set.
    """

    chosen: float
    rejected: float
    margin: float | None
    is_held_out: bool
    is_against_reference: bool

    @property
    def _least(self) -> float:
        return max(LEAST_NATS, LEAST_SHARE * max(abs(self.chosen), abs(self.rejected)))

    @property
    def has_chosen_fallen(self) -> bool:
        """Whether the chosen completions are less likely by more than a little."""
        return self.chosen < -self._least

    @property
    def has_chosen_risen(self) -> bool:
        """Whether they are more likely by more than a little."""
        return self.chosen > self._least

    @property
    def has_rejected_fallen(self) -> bool:
        """Whether the rejected completions are less likely by more than a little."""
        return self.rejected < -self._least

    @property
    def has_order_grown(self) -> bool:
        """Whether the chosen completions have gained on the rejected ones."""
        return self.chosen - self.rejected > self._least


def changes(run: Run) -> Changes | None:
    """The changes of a run: of training, or of its first evaluation set where training logged none. None where too
    little was logged."""
    for prefix in ("", *run.evaluations):
        found = _changes(run, prefix)
        if found is not None:
            return found
    return None


def _changes(run: Run, prefix: str) -> Changes | None:
    is_against_reference = f"{prefix}reference/kl_chosen" in run.metrics
    names = (
        ("reference/kl_chosen", "reference/kl_rejected") if is_against_reference else ("logps/chosen", "logps/rejected")
    )
    sides = [_side(run, prefix + name, is_against_reference) for name in names]
    _, margins = after_the_start(run, f"{prefix}rewards/margins")
    if sides[0] is None or sides[1] is None:
        return None
    margin = float(recent(margins).mean()) if margins.size and compares_with_reference(run) else None
    return Changes(
        chosen=sides[0], rejected=sides[1], margin=margin, is_held_out=prefix != "",
        is_against_reference=is_against_reference,
    )  # fmt: skip


def _side(run: Run, metric: str, is_against_reference: bool) -> float | None:
    _, late = after_the_start(run, metric)
    if not late.size:
        return None
    _, values = run.series(metric)
    start = 0.0 if is_against_reference else float(np.mean(values[:NUM_FIRST]))
    return float(recent(late).mean()) - start
