"""Batches whose log-probs are not read yet: while a device scores one, the next is laid out and started.

Reading a log-prob waits for the device. If each batch were read before the next one is made, the device would have
nothing to do meanwhile. So the log-probs of a batch are copied into pinned memory behind its forward pass, and read
once the next batch is started. On a CPU a forward pass has ended when it returns; there nothing is in flight.

What is in flight is finished before a block of the store is, before the process waits for others, where it was asked
to end, and where an error ends the work. Given up: up to one batch of log-probs where the process is killed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from holdfast.batch import ContentId, PairBatch, SequenceLogps

MOST_IN_FLIGHT = 1
"""Batches that are started and not read while the next one is made."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A batch whose forward pass was started. `values` are its log-probs and its number of tokens, and `state_sums` the
    sums of its hidden states if there are any. They are in host memory once `event` has come; with None they are."""

    batch: PairBatch
    values: tuple[Tensor, Tensor]
    event: Any
    state_sums: Tensor | None = None

    @classmethod
    def of(cls, batch: PairBatch, logps: SequenceLogps) -> "Started":
        """The batch that is scored as `logps`."""
        values = logps.per_token.detach(), batch.inputs["attention_mask"].count_nonzero()
        device, sums = values[0].device, logps.state_sums
        if device.type == "cpu" and values[1].device.type == "cpu":
            return cls(batch=batch, values=values, event=None, state_sums=sums)
        sums = None if sums is None else _on_its_way(sums)
        values = _on_its_way(values[0]), _on_its_way(values[1])
        return cls(batch=batch, values=values, event=_event_on(device), state_sums=sums)

    def read(self) -> tuple[Tensor, int]:
        """The log-probs `[N]` in host memory, and the number of tokens that a model reads of the batch. Waits for
        them."""
        if self.event is not None:
            self.event.synchronize()
        per_token, num_tokens = self.values
        return per_token, int(num_tokens)


@final
class InFlight:
    """The batches that are in flight. `finish` reads and keeps one; what it returns is what it did."""

    def __init__(self, finish: Callable[[Started], tuple[int, int]]) -> None:
        self._finish = finish
        self._started: deque[Started] = deque()
        self._finished: deque[tuple[int, int]] = deque()

    def start(self, batch: PairBatch, logps: SequenceLogps) -> None:
        """Adds a batch that is being scored."""
        self._started.append(Started.of(batch, logps))

    def finish_early(self, *, is_asked: bool) -> Iterator[tuple[int, int]]:
        """Finishes what must not wait for another batch; all where the process is asked to end. Gives what each one
        did, also of those that were finished since."""
        while self._started and (is_asked or self._started[0].event is None or len(self._started) > MOST_IN_FLIGHT):
            self._finish_first()
        while self._finished:
            yield self._finished.popleft()

    def finish_all(self) -> None:
        """Finishes all batches."""
        while self._started:
            self._finish_first()

    def finished_before_next(self, blocks: Iterable[Sequence[ContentId]]) -> Iterator[Sequence[ContentId]]:
        """The `blocks`; all batches are finished before the next one is asked for."""
        for block in blocks:
            yield block
            self.finish_all()

    def content_ids(self) -> set[ContentId]:
        """The content ids of the completions that are in flight."""
        return {content_id for started in self._started for content_id in started.batch.content_ids()}

    def _finish_first(self) -> None:
        self._finished.append(self._finish(self._started.popleft()))


def _on_its_way(value: Tensor) -> Tensor:
    """A copy in host memory that is complete when the device has done what it was asked for."""
    if value.device.type == "cpu":
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def _event_on(device: torch.device) -> Any:
    return torch.accelerator.current_stream(device).record_event()
