"""Log-probs a window at a time: the reference is asked for the batches of the next W optimizer steps together.

Where asking has a price of its own (weights that come from host memory or a file), it is so paid once per window. And
between two syncs a moving reference stands still, so log-probs computed ahead are right for it too, on streams as on
finite data. After a hard sync the reference is the policy, which then scores the window itself.

The batches carry their log-probs with them from there on: nothing is looked up, and a run that is resumed inside a
window scores what is left of it, to the same numbers, since each batch is scored by itself however long the window is.
Given up: the memory of the batches that wait, which is bounded by `WAITING_BYTES`.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.reference.adapter import null_ref_context
from holdfast.reference.base import PER_BATCH, Reference
from holdfast.reference.identity import Identity

WAITING_BYTES = 2**28
"""A window ends where its batches hold this much."""

SWAP_SHARE = 0.05
"""A window is so long that putting the reference's weights in place takes this share of the time that scoring takes."""

LONGEST = 256
"""Most optimizer steps of a window whose length was not asked for."""


@final
class WindowedReference(Reference):
    """The log-probs of `inner`, ahead of the batches' turn.

    `steps` is the length of a window in optimizer steps; None measures what an exchange of weights costs and goes by
    it. A window ends at the next of the syncs that come every `sync_steps` steps; None where there are none.
    """

    def __init__(self, inner: Reference, *, steps: int | None, sync_steps: int | None) -> None:
        self.version = inner.version
        self.drift = inner.drift
        self._inner = inner
        self._steps = steps
        self._sync_steps = sync_steps

    @property
    def num_steps(self) -> int:
        """Length of a window in optimizer steps; 1 until it is known."""
        return self._steps or 1

    def next_steps(self, step: int) -> int:
        """The number of optimizer steps of the window that begins after `step` of them."""
        to_sync = self._sync_steps - step % self._sync_steps if self._sync_steps else self.num_steps
        return min(self.num_steps, to_sync)

    def score(self, batches: Iterable[PairBatch], num_steps: float) -> list[Tensor]:
        """The log-probs of each of the batches of `num_steps` optimizer steps, per token `[N]`, with one exchange."""
        begin = time.perf_counter()
        with self._inner.held():
            _wait_for_device(self._steps is None)
            in_place = time.perf_counter()
            scored = [self._inner.logps(batch).per_token for batch in batches]
            _wait_for_device(self._steps is None)
        if self._steps is None:
            scoring = (time.perf_counter() - in_place) / num_steps
            self._steps = max(1, min(LONGEST, math.ceil((in_place - begin) / (SWAP_SHARE * scoring))))
        return scored

    def held(self) -> AbstractContextManager[None]:
        """See `Reference.held`."""
        return self._inner.held()

    def null_ref_context(self) -> AbstractContextManager[None]:
        """That of the inner reference."""
        return null_ref_context(self._inner)

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`: those that the batch carries, else asked for now."""
        if batch.reference is None:
            return self._inner.logps(batch)
        return SequenceLogps(per_token=batch.reference, sequence=batch.sequence, num_sequences=batch.num_sequences)

    def sync(self, mixup_alpha: float) -> None:
        """See `Reference.sync`."""
        self._inner.sync(mixup_alpha)
        self.version, self.drift = self._inner.version, self._inner.drift

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Tells the inner reference."""
        self._inner.prepare(datasets)

    def release(self) -> None:
        """Tells the inner reference."""
        self._inner.release()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the inner reference; waiting log-probs belong to their batches."""
        return self._inner.tensors()

    def identity(self) -> Identity:
        """That of the inner reference."""
        return self._inner.identity()

    def state_dict(self) -> dict[str, Tensor]:
        """That of the inner reference: what is left of a window is scored again."""
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """See `Reference.load_state_dict`."""
        self._inner.load_state_dict(state, version, drift)
        self.version, self.drift = version, drift

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        window = f"{self._steps} optimizer steps" if self._steps else "as many optimizer steps as an exchange is worth"
        return self._inner.describe(f"asked ahead for {window}")

    @property
    def module(self) -> nn.Module | None:
        """That of the inner reference."""
        return self._inner.module


def _wait_for_device(is_measured: bool) -> None:
    if is_measured and torch.cuda.is_available():
        torch.cuda.synchronize()
