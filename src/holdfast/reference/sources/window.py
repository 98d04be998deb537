"""A window: the next W optimizer steps, whose batches the reference scores together.

Weights that come from host memory or a file are then put in place once per window. A moving reference stands still
between two syncs, so log-probs computed ahead are right for it as well, on streams and on datasets. After a hard sync
the reference is the policy, and the policy's own weights score the window.

Each batch carries its log-probs from then on, so nothing is looked up. Each batch is scored by itself, so its log-probs
do not depend on the window's length: a run resumed inside a window scores the rest of it to the same numbers. Given up:
memory for the batches that wait, which `reference.look_ahead` bounds.
"""

import math
from typing import ClassVar, final

from holdfast.batch import PairBatch, SequenceLogps

SWAP_SHARE = 0.05
"""Target ratio of two times in a window: putting the reference's weights in place, and scoring."""

LONGEST = 256
"""The longest window, in optimizer steps, where the length is measured."""


@final
class Window:
    """How many optimizer steps are scored together. It is also the source of the log-probs that a batch carries.

    `steps` is the number of steps; None where it is to be measured. `sync_steps` is the number of steps between two
    syncs, at which a window ends; None for a reference that is fixed.
    """

    kind: ClassVar[str] = "WindowedReference"

    def __init__(self, *, steps: int | None, sync_steps: int | None) -> None:
        self._steps = steps
        self._sync_steps = sync_steps

    @property
    def is_measured(self) -> bool:
        """Whether the length is still to be measured."""
        return self._steps is None

    @property
    def num_steps(self) -> int:
        """Length of a window in optimizer steps; 1 until it is measured."""
        return self._steps or 1

    def next_steps(self, step: int) -> int:
        """The number of optimizer steps of the window that begins after `step` of them."""
        to_sync = self._sync_steps - step % self._sync_steps if self._sync_steps else self.num_steps
        return min(self.num_steps, to_sync)

    def measure(self, *, exchange_seconds: float, step_seconds: float) -> None:
        """Sets the length from the time of an exchange of weights, and the time of scoring one step's batches."""
        self._steps = max(1, min(LONGEST, math.ceil(exchange_seconds / (SWAP_SHARE * step_seconds))))

    def find(self, batch: PairBatch) -> SequenceLogps | None:
        """The log-probs that the batch carries; None where it was not scored ahead."""
        if batch.reference_logps is None:
            return None
        return SequenceLogps(
            per_token=batch.reference_logps, sequence=batch.sequence, num_sequences=batch.num_sequences
        )

    def describe(self) -> str:
        """When the reference is asked, in words."""
        length = f"{self._steps} optimizer steps" if self._steps else "as many optimizer steps as an exchange is worth"
        return f"asked ahead for {length}"
