"""How a dataset's completions come into the store: by claims, each process at its own speed, or in lockstep.

By claims, processes share the work by blocks that each of them claims. In lockstep all processes score together, since
the weights are spread over them. A process is then idle only in the last round of a block, where it scores a batch of
another's once more. The numbers in the store are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from holdfast.agreement import any_of_all, num_processes, of_all, process, raised_together
from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.completions import Completions, CompletionsToScore, Deal
from holdfast.interruption import asked_signal
from holdfast.reference.sources.lockstep import agreed_blocks, complete_copies, heed_signals, is_writer, received, sent
from holdfast.store.store import LogpStore
from holdfast.store.work_sharing import claimed_blocks

Score = Callable[[PairBatch], SequenceLogps]


def filled_by_claims(
    store: LogpStore,
    data: CompletionsToScore,
    score: Score,
    scorer: str,
    on_wait: Callable[[int], None],
    check: Callable[[], None],
) -> Iterator[tuple[int, int]]:
    """Scores what is missing from `store` and no other process has claimed; after each batch, gives the numbers of its
    completions and of its tokens. `scorer` says in words what scores. `on_wait` is that of `claimed_blocks`, and
    `check` is called after each batch."""
    for batch in data.batches(partial(claimed_blocks, store, on_wait=on_wait), store.missing):
        logps = by_content(batch, score(batch), scorer)
        store.add(logps)
        yield len(logps), num_tokens(batch)
        check()


def filled_in_lockstep(
    store: LogpStore,
    data: CompletionsToScore,
    score: Score,
    scorer: str,
    on_wait: Callable[[int], None],
    check: Callable[[], None],
) -> Iterator[tuple[int, int]]:
    """The same where all processes score together; the numbers are those of all of them. An error of one process is
    raised by all, and `check` is called by all where one was asked to end. Collective."""
    writes = is_writer(store)
    ids = [*data.ids()] if isinstance(data, Completions) else []
    complete_copies(store, ids, is_writer=writes)

    def missing(own: Sequence[ContentId]) -> Sequence[ContentId]:
        return own if any_of_all(bool(store.missing(own))) else []

    blocks = partial(agreed_blocks, store, on_wait=on_wait, check=check)
    deal = Deal(process=process(), num_processes=num_processes())
    for batch in data.batches(blocks, missing, deal):
        logps = score(batch)
        with raised_together():
            own = by_content(batch, logps, scorer)
        told = of_all((sent(own), num_tokens(batch), asked_signal()))
        together = received(found for found, _, _ in told)
        with raised_together():
            if writes:
                store.add(together)
        yield len(together), sum(tokens for _, tokens, _ in told)
        heed_signals([signal for _, _, signal in told], check)
    with raised_together():
        store.flush()
    complete_copies(store, ids, is_writer=writes)


def num_tokens(batch: PairBatch) -> int:
    """The number of tokens that a model reads of a batch."""
    return int(batch.inputs["attention_mask"].count_nonzero())


def by_content(batch: PairBatch, logps: SequenceLogps, scorer: str) -> dict[ContentId, Tensor]:
    """The log-probs of each of the batch's completions by content id, in host memory. ValueError where one is not
    finite; it names `scorer`."""
    per_token = logps.per_token.cpu()
    if not bool(per_token.isfinite().all()):
        row = int(batch.sequence[int((~per_token.isfinite()).nonzero()[0])])
        raise ValueError(
            f"The reference ({scorer}) gave a log-prob of {float(per_token[~per_token.isfinite()][0])} in "
            f"completion {row} of a batch. Check its weights for NaN and its dtype for overflow (fp16)."
        )
    return dict(zip(batch.content_ids(), per_token.split(batch.lengths()), strict=True))
