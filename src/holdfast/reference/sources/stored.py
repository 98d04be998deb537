"""Log-probs in the store, computed ahead: before training, or window by window.

Log-probs are stored per token and per completion, under the completion's content id (its prompt's and its own token ids
after truncation). So a completion of many pairs is scored once, log-probs of an earlier run are found, and every loss
and modifier can be computed from them. A moving reference has a store for each of its versions. Given up: 4 bytes of
disk per completion token.
"""

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from holdfast.agreement import any_of_all, num_processes, of_all, process, raised_together
from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.completions import NO_DEAL, Completions, CompletionsToScore, Deal
from holdfast.interruption import Interrupted, asked_signal, interruption_behind, is_asked, waiting
from holdfast.peers.guard import is_of_communication
from holdfast.peers.phase import doing
from holdfast.progress import Bar, bar
from holdfast.reference.identity.identity import Identity
from holdfast.reference.sources.filling import by_content, filled_by_claims, filled_in_lockstep, filled_pairs
from holdfast.reference.sources.pairing import pairing
from holdfast.store.pair_table import PairIds, PairTable
from holdfast.store.store import LogpStore

logger = logging.getLogger(__name__)


@final
class PrecomputedReference:
    """The source of log-probs that are in a store.

    `open_store` returns the store for a reference's identity and version (None for a fixed reference). Stores of past
    versions are removed unless `keeps_versions`. `wait_for_all` is a barrier over all processes, `is_main` says that
    this process reports, and `is_quiet` hides the progress bar. `in_lockstep` says that all processes make every
    forward pass together (see `holdfast.agreement`): then they also open, add and fill together.
    """

    kind: ClassVar[str] = "PrecomputedReference"

    def __init__(
        self,
        open_store: Callable[[Identity, int | None], LogpStore],
        *,
        keeps_versions: bool = False,
        is_quiet: bool = False,
        is_main: bool = True,
        wait_for_all: Callable[[], object] = lambda: None,
        in_lockstep: bool = False,
    ) -> None:
        self._open_store = open_store
        self._keeps_versions = keeps_versions
        self._is_quiet = is_quiet
        self._is_main = is_main
        self._wait_for_all = wait_for_all
        self._in_lockstep = in_lockstep
        self._identity: Identity | None = None
        self._store: LogpStore | None = None
        self._has_warned = False

    @property
    def is_open(self) -> bool:
        """Whether a store is open."""
        return self._store is not None

    @property
    def store(self) -> LogpStore:
        """The store of the current version."""
        assert self._store is not None, "nothing was prepared"
        return self._store

    @property
    def identity(self) -> Identity:
        """The reference's identity from when the first store was opened."""
        assert self._identity is not None, "nothing was prepared"
        return self._identity

    def open(self, identity: Identity, version: int | None) -> None:
        """Opens the store for a reference of this identity and version."""
        self._identity = self._identity or identity
        with raised_together(where=self._in_lockstep):
            self._store = self._open_store(identity, version)
        weakref.finalize(self, _flush, self._store)

    def close_version(self) -> None:
        """Removes the store of the version that a sync has ended, or flushes it where versions are kept."""
        if self._store is None:
            return
        if self._keeps_versions:
            self._store.flush()
        else:
            self._store.drop()

    def flush(self) -> None:
        """Writes log-probs that are not on disk yet. A store that cannot be written is no error here."""
        if self._store is not None:
            _flush(self._store)

    def find(self, batch: PairBatch) -> SequenceLogps | None:
        """The batch's log-probs; None where one of its completions is not stored. ValueError where content ids do not
        cover an input of the batch."""
        batch.check_identified()
        stored = self.store.get(batch.content_ids(), batch.lengths())
        return _of_batch(batch, stored) if stored.keys() >= set(batch.content_ids()) else None

    def add(self, batch: PairBatch, logps: SequenceLogps, scorer: str) -> SequenceLogps:
        """Stores the batch's log-probs and returns them. A completion that was stored before has its stored values.

        `scorer` says in words what computed them. ValueError where a log-prob is not finite. Where the store cannot be
        written, a warning says so once, and training goes on with the computed log-probs.
        """
        with raised_together(where=self._in_lockstep):
            new = by_content(batch, logps.per_token.cpu(), scorer)
        stored = self.store.get(batch.content_ids(), batch.lengths())
        try:
            self.store.add(new)
        except ValueError as error:
            if not self._has_warned and self._is_main:
                logger.warning("%s Training goes on; log-probs are not stored.", error)
            self._has_warned = True
        return _of_batch(batch, new | stored)

    def fill(
        self,
        name: str,
        data: CompletionsToScore,
        score: Callable[[PairBatch], SequenceLogps],
        scorer: str,
        whose: str = "Reference",
    ) -> None:
        """Scores every completion of the dataset `name` that is not stored yet. Where both completions of a pair are
        scored, the products of their hidden states are stored beside the log-probs. Messages say `whose` log-probs they
        are. ValueError where a log-prob is not finite, or the store cannot be written."""
        store, begin, num_scored, num_tokens = self.store, time.monotonic(), 0, 0
        description = f"{whose} log-probs ({name})"
        with (
            doing(f"scoring the {whose.lower()}'s log-probs ({name})"),
            contextlib.ExitStack() as waits,
            store,
            pairing(store, data.pairs) as collect,
            _kept_when_interrupted(store, name, data) as check,
            bar(data.num_completions(), description, "completions", is_shown=not self._is_quiet) as shown,
        ):
            on_wait = partial(_show_waiting, shown, check, waits)
            work = partial(filled_in_lockstep if self._in_lockstep else filled_by_claims, store, data)
            for num_new, num_read in work(partial(_scored, score, waits), scorer, on_wait, check, collect):
                num_scored += num_new
                num_tokens += num_read
                rate = num_tokens / max(time.monotonic() - begin, 1e-9)
                shown.note(f"{rate:,.0f} tokens/s")
                shown.update(num_new)
            waits.close()
            shown.update(max(0, data.num_completions() - num_scored))
            store.flush()
            self._wait_for_all()  # after it, the other processes' blocks are on disk
        store.refresh()
        if self._is_main:
            num_found = max(0, data.num_completions() - num_scored)
            logger.warning(
                "%s log-probs (%s): %d of %d completions found in the store, %d scored. The store %s holds %d "
                "completions, %s bytes.",
                whose, name, num_found, data.num_completions(), num_scored, store.folder, store.num_completions,
                f"{store.num_bytes:,}",
            )  # fmt: skip

    def holds(self, data: CompletionsToScore) -> bool:
        """Whether all log-probs of a dataset are known to be stored; False as well where its completions cannot be
        listed."""
        if not isinstance(data, Completions):
            return False
        content = data.content()
        sides = ((content.content[:, :2], content.lengths[:, 0]), (content.content[:, 2:], content.lengths[:, 1]))
        with raised_together(where=self._in_lockstep):
            is_missing = any(bool(np.isnan(self.store.sums(*side)).any()) for side in sides)
        return not (any_of_all(is_missing) if self._in_lockstep else is_missing)

    def fill_pairs(self, name: str, data: CompletionsToScore, score: Callable[[PairBatch], SequenceLogps]) -> None:
        """Scores the pairs of the dataset `name` again whose products of hidden states are not beside the store's
        shards, and puts them there. Does nothing under a data collator of the user's own. ValueError where they cannot
        be written."""
        if not isinstance(data, Completions):
            return
        pairs, store = self._open_pairs(data), self.store
        deal = Deal(process=process(), num_processes=num_processes()) if self._in_lockstep else NO_DEAL
        description = f"Hidden states ({name})"
        if any_of_all(bool(pairs)) if self._in_lockstep else pairs:
            with (
                doing(f"scoring pairs for their hidden states ({name})"),
                pairing(store, lambda: pairs) as collect,
                _kept_when_interrupted(store, name, data) as check,
                bar(len({*chain(*pairs)}), description, "completions", is_shown=not self._is_quiet) as shown,
            ):
                batches = data.batches_of_pairs(pairs, deal)
                summed = partial(_scored, score, contextlib.ExitStack())
                for number in filled_pairs(store, batches, summed, check, collect, in_lockstep=self._in_lockstep):
                    shown.update(number)
        self._wait_for_all()

    def _open_pairs(self, data: Completions) -> list[PairIds]:
        """The pairs whose products are not known; of these, this process's share where each process scores alone."""
        pairs, content = data.pairs(), data.content()
        with raised_together(where=self._in_lockstep):
            products = PairTable.open(self.store).find(content.content, content.lengths)
        is_open = np.isnan(products[:, 0])
        if self._in_lockstep:
            is_open = of_all(is_open)[0]
        else:
            is_open &= np.arange(len(pairs)) % num_processes() == process()
        is_open &= (content.content[:, :2] != content.content[:, 2:]).any(1)
        return [pairs[row] for row in np.flatnonzero(is_open)]


def on_device_of(batch: PairBatch, values: Sequence[Tensor]) -> Tensor:
    """The `values`, which are in host memory, joined and on the batch's device. They are joined in pinned memory, and
    the copy from there is not waited for."""
    device = batch.sequence.device
    num_values, dtype = sum(map(len, values)), values[0].dtype if values else torch.float32
    joined = torch.empty(num_values, dtype=dtype, pin_memory=device.type == "cuda")
    if values:
        torch.cat([*values], out=joined)
    return joined.to(device, non_blocking=True)


def _of_batch(batch: PairBatch, logps: Mapping[ContentId, Tensor]) -> SequenceLogps:
    """The batch's log-probs, from those of its completions by content id."""
    per_token = on_device_of(batch, [logps[key] for key in batch.content_ids()])
    return SequenceLogps(per_token=per_token, sequence=batch.sequence, num_sequences=batch.num_sequences)


@contextlib.contextmanager
def _kept_when_interrupted(store: LogpStore, name: str, data: CompletionsToScore) -> Iterator[Callable[[], None]]:
    """A context in which a signal waits for the batch that is being scored. It gives what is to be called after each
    batch: where a signal has come, all that was scored is written, then `Interrupted` is raised, and says so."""
    try:
        with waiting("the batch is finished, then what was scored is written. A second signal ends it at once.") as end:

            def check() -> None:
                if is_asked():
                    store.flush()  # before the claim is released, so that nobody scores it again
                end()

            yield check
    except BaseException as error:
        interrupted = interruption_behind(error)
        if interrupted is None and (number := asked_signal()) is not None and is_of_communication(error):
            interrupted = Interrupted(number)  # another process has ended by that signal before this one
        if interrupted is None:
            raise
        num_kept, total = store.num_completions, data.num_completions()
        if isinstance(data, Completions):
            num_kept = total - len(store.missing(data.ids()))
        interrupted.done = f"{num_kept} of {total} completions ({name}) are kept in {store.folder}."
        interrupted.advice = "Run it again to go on."
        raise interrupted from None


def _scored(
    score: Callable[[PairBatch], SequenceLogps], waits: contextlib.ExitStack, batch: PairBatch
) -> SequenceLogps:
    """What `score` says of a batch, sums of hidden states included; `waits` is closed before."""
    waits.close()
    return score(replace(batch, sums_states=True))


def _show_waiting(shown: Bar, check: Callable[[], None], waits: contextlib.ExitStack, num_blocks: int) -> None:
    """Says in the progress bar that other processes still score. `waits` is closed when that is over."""
    check()
    waits.close()
    waits.enter_context(doing("waiting for what other processes score", waits=True))
    shown.note(f"waiting for {num_blocks} block{'s' if num_blocks > 1 else ''} of other processes")


def _flush(store: LogpStore) -> None:
    with contextlib.suppress(ValueError):
        store.flush()
