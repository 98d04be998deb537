"""How a dataset's completions come into the store: by claims, each process at its own speed, or in lockstep.

By claims, processes share the work by blocks that each of them claims. In lockstep all processes score together, since
the weights are spread over them. A process is then idle only in the last round of a block, where it scores a batch of
another's once more. The numbers in the store are the same.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from holdfast.agreement import any_of_all, num_processes, of_all, process, raised_together
from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.completions import Completions, CompletionsToScore, Deal
from holdfast.interruption import asked_signal, is_asked
from holdfast.reference.sources.in_flight import InFlight, Started
from holdfast.reference.sources.lockstep import agreed_blocks, complete_copies, heed_signals, is_writer, received, sent
from holdfast.reference.sources.pairing import Collect, Summed
from holdfast.store.store import LogpStore
from holdfast.store.work_sharing import claimed_blocks

Score = Callable[[PairBatch], SequenceLogps]


def _uncollected(summed: Summed) -> None:
    """Collects nothing."""


def filled_by_claims(
    store: LogpStore,
    data: CompletionsToScore,
    score: Score,
    scorer: str,
    on_wait: Callable[[int], None],
    check: Callable[[], None],
    collect: Collect = _uncollected,
) -> Iterator[tuple[int, int]]:
    """Scores what is missing from `store` and no other process has claimed; after each batch, gives the numbers of its
    completions and of its tokens. `scorer` says in words what scores. `on_wait` is that of `claimed_blocks`, and
    `check` is called after each batch. `collect` is called with the sums of each batch's hidden states. Where an error
    ends it, what was scored before is kept."""

    def finish(started: Started) -> tuple[int, int]:
        per_token, tokens = started.read()
        logps = by_content(started.batch, per_token, scorer)
        store.add(logps)
        if started.state_sums is not None:
            collect(Summed.of(started.batch, started.state_sums))
        return len(logps), tokens

    def blocks(ids: Sequence[ContentId]) -> Iterator[Sequence[ContentId]]:
        return flight.finished_before_next(claimed_blocks(store, ids, on_wait=on_wait))

    flight = InFlight(finish)
    try:
        for batch in data.batches(blocks, partial(_missing, store, flight)):
            flight.start(batch, score(batch))
            for numbers in flight.finish_early(is_asked=is_asked()):
                yield numbers
                check()
        flight.finish_all()
        yield from flight.finish_early(is_asked=True)
        check()
    except Exception:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            flight.finish_all()
        raise


def filled_in_lockstep(
    store: LogpStore,
    data: CompletionsToScore,
    score: Score,
    scorer: str,
    on_wait: Callable[[int], None],
    check: Callable[[], None],
    collect: Collect = _uncollected,
) -> Iterator[tuple[int, int]]:
    """The same where all processes score together; the numbers are those of all of them. An error of one process is
    raised by all, and `check` is called by all where one was asked to end. Collective."""
    writes = is_writer(store)
    ids = [*data.ids()] if isinstance(data, Completions) else []
    complete_copies(store, ids, is_writer=writes)
    asked: list[int | None] = []

    def finish(started: Started) -> tuple[int, int]:
        with raised_together():
            per_token, tokens = started.read()
            own = by_content(started.batch, per_token, scorer)
            sums = None if started.state_sums is None else Summed.of(started.batch, started.state_sums)
        told = of_all((sent(own), tokens, asked_signal(), sums))
        together = received(found for found, _, _, _ in told)
        with raised_together():
            if writes:
                store.add(together)
                for summed in filter(None, (summed for _, _, _, summed in told)):
                    collect(summed)
        asked.extend(signal for _, _, signal, _ in told)
        return len(together), sum(tokens for _, tokens, _, _ in told)

    def blocks(ids: Sequence[ContentId]) -> Iterator[Sequence[ContentId]]:
        return flight.finished_before_next(agreed_blocks(store, ids, on_wait=on_wait, check=check))

    def missing(own: Sequence[ContentId]) -> Sequence[ContentId]:
        return own if any_of_all(bool(_missing(store, flight, own))) else []

    flight = InFlight(finish)
    deal = Deal(process=process(), num_processes=num_processes())
    for batch in data.batches(blocks, missing, deal):
        flight.start(batch, score(batch))
        yield from flight.finish_early(is_asked=False)
        if any(asked):  # on all processes
            yield from flight.finish_early(is_asked=True)
        heed_signals(asked, check)
        asked.clear()
    flight.finish_all()
    yield from flight.finish_early(is_asked=True)
    heed_signals(asked, check)
    with raised_together():
        store.flush()
    complete_copies(store, ids, is_writer=writes)


def filled_pairs(
    store: LogpStore,
    batches: Iterable[PairBatch],
    score: Score,
    check: Callable[[], None],
    collect: Collect,
    *,
    in_lockstep: bool,
) -> Iterator[int]:
    """Scores the batches for the sums of their hidden states alone; after each, gives the number of its completions.
    `check` and `collect` are those of `filled_by_claims`. Collective where it is in lockstep."""
    writes = is_writer(store) if in_lockstep else True
    asked: list[int | None] = []

    def finish(started: Started) -> tuple[int, int]:
        started.read()
        sums = None if started.state_sums is None else Summed.of(started.batch, started.state_sums)
        told = of_all((sums, asked_signal())) if in_lockstep else [(sums, asked_signal())]
        with raised_together(where=in_lockstep):
            for summed in filter(None, (summed for summed, _ in told) if writes else ()):
                collect(summed)
        asked.extend(signal for _, signal in told)
        return sum(len(summed.ids) for summed, _ in told if summed is not None), 0

    flight = InFlight(finish)
    for batch in batches:
        flight.start(batch, score(batch))
        for number, _ in flight.finish_early(is_asked=not in_lockstep and is_asked()):
            yield number
        heed_signals(asked, check)
        asked.clear()
    flight.finish_all()
    for number, _ in flight.finish_early(is_asked=True):
        yield number
    heed_signals(asked, check)


def _missing(store: LogpStore, flight: InFlight, ids: Sequence[ContentId]) -> list[ContentId]:
    """Those of `ids` that are neither stored nor on their way into the store."""
    started = flight.content_ids()
    return [content_id for content_id in store.missing(ids) if content_id not in started]


def by_content(batch: PairBatch, per_token: Tensor, scorer: str) -> dict[ContentId, Tensor]:
    """The log-probs `per_token`, which are in host memory, of each of the batch's completions by content id. ValueError
    where one is not finite; it names `scorer`."""
    if not bool(per_token.isfinite().all()):
        row = int(batch.sequence[int((~per_token.isfinite()).nonzero()[0])])
        raise ValueError(
            f"The reference ({scorer}) gave a log-prob of {float(per_token[~per_token.isfinite()][0])} in "
            f"completion {row} of a batch. Check its weights for NaN and its dtype for overflow (fp16)."
        )
    return dict(zip(batch.content_ids(), per_token.split(batch.lengths()), strict=True))
