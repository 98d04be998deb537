"""Fills a store with processes that compute together, since the weights are spread over them.

All processes score the same block of completions, each its own batches of it. The first process claims blocks as any
other job does (`store.work_sharing`), so jobs of every kind may fill one store at the same time. After each batch all
processes tell the others what they computed. One process per store writes it: processes on one machine or with one
network file system have one store in common, others have copies of their own. So each copy becomes whole, and no
completion is scored for a second copy that some process finds in its own.

The processes also tell each other which of them was asked to end, so that all end after the same batch. Given up:
4 bytes per completion token that every process sends to every other.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from holdfast.agreement import is_of_all, num_processes, of_all, process, raise_first, raised_together, reduced
from holdfast.batch import ContentId
from holdfast.interruption import ask, asked_signal
from holdfast.store.processes import machine
from holdfast.store.store import SHARD_COMPLETIONS, LogpStore
from holdfast.store.work_sharing import claimed_blocks

_COMPLETIONS_AT_A_TIME = 4_096
"""How many completions' log-probs are sent from one copy of a store to others at a time."""


Found = tuple[list[ContentId], list[int], NDArray[np.float32]]
"""Log-probs as they are sent: content ids, numbers of tokens, and the values one after the other."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Word:
    """What the first process says of the work: the next block (None where there is none), and how many blocks of other
    jobs it waits for, or that it cannot go on. Others say nothing by it."""

    block: list[ContentId] | None = None
    num_waiting: int = 0
    has_failed: bool = False


def is_writer(store: LogpStore) -> bool:
    """Whether this process is the first of those that have the folder of `store` in common. Collective."""
    places = of_all((machine(), str(store.folder.parent.absolute())))
    if len({*places}) == 1:
        return process() == 0
    mark = f".{of_all(secrets.token_hex(8))[0]}-"
    own = store.folder.parent / f"{mark}{process()}"
    with contextlib.suppress(OSError):
        own.parent.mkdir(parents=True, exist_ok=True)
        own.touch()
    of_all(None)  # all marks are there
    is_seen = any((own.parent / f"{mark}{number}").exists() for number in range(process()))
    of_all(None)  # all have looked
    with contextlib.suppress(OSError):
        os.unlink(own)
    return not is_seen


def agreed_blocks(
    store: LogpStore, ids: Sequence[ContentId], on_wait: Callable[[int], None], check: Callable[[], None]
) -> Iterator[list[ContentId]]:
    """On all processes the blocks of `ids` that the first one has claimed and finds missing, until none is left.

    `on_wait` is called as by `claimed_blocks`, and `check` where any process was asked to end. ValueError on all
    processes where the first one cannot read or write its store.
    """

    def say(word: _Word, error: ValueError | None = None) -> _Word:
        told = of_all((word, asked_signal()))
        heed_signals([signal for _, signal in told], check)
        word, _ = told[0]
        if word.has_failed:
            raise_first(error)
        if word.num_waiting:
            on_wait(word.num_waiting)
        return word

    if process() > 0:
        while (word := say(_Word())).block is not None or word.num_waiting:
            if word.block is not None:
                yield word.block
        return

    def say_waiting(num_blocks: int) -> None:
        say(_Word(num_waiting=num_blocks))

    with contextlib.closing(claimed_blocks(store, ids, SHARD_COMPLETIONS * num_processes(), say_waiting)) as work:
        while True:
            try:
                block = next(work, None)
            except ValueError as error:
                if is_of_all(error):
                    raise
                say(_Word(has_failed=True), error)
                raise
            say(_Word(block=block))
            if block is None:
                return
            yield block


def heed_signals(asked: Iterable[int | None], check: Callable[[], None]) -> None:
    """Calls `check` where one of the processes was asked to end, as if this one had been. `asked` has the signal of
    each."""
    if number := next(filter(None, asked), None):
        ask(number)
        check()


def sent(logps: Mapping[ContentId, Tensor]) -> Found:
    """Log-probs by content id in the form in which they are sent."""
    values = torch.cat([*logps.values()]).numpy() if logps else np.zeros(0, dtype=np.float32)
    return [*logps], [len(value) for value in logps.values()], values


def received(all_found: Iterable[Found]) -> dict[ContentId, Tensor]:
    """Log-probs by content id; the first ones where a completion comes several times."""
    logps: dict[ContentId, Tensor] = {}
    for ids, lengths, values in all_found:
        for content_id, value in zip(ids, torch.from_numpy(values).split(lengths), strict=True):
            logps.setdefault(content_id, value)
    return logps


def complete_copies(store: LogpStore, ids: Sequence[ContentId], *, is_writer: bool) -> None:
    """Writes into every copy of `store` what another copy has of `ids`. ValueError on all processes where one copy
    cannot be written. Collective; all give the same `ids` in the same order."""
    store.refresh()
    rows = {content_id: row for row, content_id in enumerate(ids)}
    owner = torch.full((len(ids),), process(), dtype=torch.int32)  # the first process that has a completion
    owner[[rows[content_id] for content_id in store.missing(ids)]] = num_processes()
    is_lacking = reduced((owner == num_processes()).to(torch.uint8), dist.ReduceOp.MAX).bool()
    owner = reduced(owner, dist.ReduceOp.MIN)
    to_send = (is_lacking & (owner < num_processes())).nonzero().flatten()
    for part in to_send.split(_COMPLETIONS_AT_A_TIME):
        own = [ids[row] for row in part[owner[part] == process()].tolist()]
        values = received(of_all(sent(store.get(own))))
        with raised_together():
            if is_writer:
                store.add(values)
    with raised_together():
        store.flush()
