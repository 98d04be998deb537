"""A window: the next W optimizer steps, whose batches the reference scores together.

Where asking has a price of its own (weights that come from host memory or a file), it is so paid once per window. And
between two syncs a moving reference stands still, so log-probs computed ahead are right for it too, on streams as on
finite data. After a hard sync the reference is the policy, which then scores the window itself.

The batches carry their log-probs with them from there on, and nothing is looked up. A run that is resumed inside a
window scores what is left of it, to the same numbers, since each batch is scored by itself however long the window is.
Given up: the memory of the batches that wait, which `reference.look_ahead` bounds.
"""

import math
from typing import ClassVar, final

from holdfast.batch import PairBatch, SequenceLogps

SWAP_SHARE = 0.05
"""A window is so long that putting the reference's weights in place takes this share of the time that scoring takes."""

LONGEST = 256
"""Most optimizer steps of a window whose length was not asked for."""


@final
class Window:
    """How many optimizer steps are scored together, and a source: the log-probs that a batch carries since.

    `steps` is that number; None until what an exchange of weights costs is measured. A window ends at the next of the
    syncs that come every `sync_steps` steps; None where there are none.
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
        """Length of a window in optimizer steps; 1 until it is known."""
        return self._steps or 1

    def next_steps(self, step: int) -> int:
        """The number of optimizer steps of the window that begins after `step` of them."""
        to_sync = self._sync_steps - step % self._sync_steps if self._sync_steps else self.num_steps
        return min(self.num_steps, to_sync)

    def measure(self, *, exchange_seconds: float, step_seconds: float) -> None:
        """Sets the length by what an exchange of weights took, and what scoring the batches of a step took."""
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
