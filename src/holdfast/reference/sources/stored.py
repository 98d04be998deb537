"""Log-probs computed ahead, in the store: before training, or window by window.

What the reference's scorer gives is stored per completion, by content (token ids of prompt and completion after
truncation), and per token. So a completion of many pairs is scored once, what an earlier run scored is found, and every
loss and modifier can be computed from it. Costs disk: 4 bytes per completion token.

A reference that moves has a store for each of its versions, and leaves the one before behind.
"""

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.reference.identity.identity import Identity
from holdfast.store.store import LogpStore
from holdfast.store.work_sharing import claimed_blocks

logger = logging.getLogger(__name__)


@final
class PrecomputedReference:
    """A source: the log-probs of a reference's completions that were scored before.

    `open_store` gives the store for a reference of an identity, in a version (None if it never moves).
    `keeps_versions` leaves the stores of versions that are over where they are. `wait_for_all` is a barrier over all
    processes, `is_main` says that this one reports, and `is_quiet` hides the progress bar.
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
    ) -> None:
        self._open_store = open_store
        self._keeps_versions = keeps_versions
        self._is_quiet = is_quiet
        self._is_main = is_main
        self._wait_for_all = wait_for_all
        self._identity: Identity | None = None
        self._store: LogpStore | None = None
        self._is_told = False

    @property
    def is_open(self) -> bool:
        """Whether it has a store yet."""
        return self._store is not None

    @property
    def store(self) -> LogpStore:
        """Where the log-probs are."""
        assert self._store is not None, "nothing was prepared"
        return self._store

    @property
    def identity(self) -> Identity:
        """That of the reference that did the scoring, as it was when the first store was opened."""
        assert self._identity is not None, "nothing was prepared"
        return self._identity

    def open(self, identity: Identity, version: int | None) -> None:
        """Opens the store for the reference as it is now."""
        self._identity = self._identity or identity
        self._store = self._open_store(identity, version)
        weakref.finalize(self, _flushed, self._store)

    def leave(self) -> None:
        """Flushes the store of a version that is over, and removes it unless versions are to stay."""
        if self._store is None:
            return
        if self._keeps_versions:
            self._store.flush()
        else:
            self._store.drop()

    def flush(self) -> None:
        """Writes what was added, where it can be written."""
        if self._store is not None:
            _flushed(self._store)

    def find(self, batch: PairBatch) -> SequenceLogps | None:
        """The batch's log-probs, per token; None where one of its completions is not stored. ValueError where an input
        of the batch is in no content id."""
        batch.check_identified()
        known = self.store.get(batch.content_ids(), batch.lengths())
        return _of_batch(batch, known) if known.keys() >= set(batch.content_ids()) else None

    def add(self, batch: PairBatch, scored: SequenceLogps, scorer: str) -> SequenceLogps:
        """Stores the log-probs that `scorer` (in words) gave the batch; returns the batch's, with those that were
        stored before as they are. ValueError where one is not finite. Without room, nothing is stored and a line says
        so: the numbers are at hand."""
        new = by_content(batch, scored, scorer)
        known = self.store.get(batch.content_ids(), batch.lengths())
        try:
            self.store.add(new)
        except ValueError as error:
            if not self._is_told and self._is_main:
                logger.warning("%s Training goes on; log-probs are not stored.", error)
            self._is_told = True
        return _of_batch(batch, new | known)

    def fill(
        self, name: str, data: CompletionsToScore, score: Callable[[PairBatch], SequenceLogps], scorer: str
    ) -> None:
        """Scores every completion of the dataset `name` that is not stored yet. ValueError where a log-prob is not
        finite, or the store cannot be written."""
        store, begin, num_scored, num_tokens = self.store, time.monotonic(), 0, 0
        description, unit = f"Reference log-probs ({name})", "completions"
        with store, tqdm(total=data.num_completions(), desc=description, unit=unit, disable=self._is_quiet) as bar:
            blocks = partial(claimed_blocks, store, on_wait=partial(_say_what_is_left, bar))
            for batch in data.batches(blocks, store.missing):
                scored = by_content(batch, score(batch), scorer)
                store.add(scored)
                num_scored += len(scored)
                num_tokens += int(batch.inputs["attention_mask"].count_nonzero())
                rate = num_tokens / max(time.monotonic() - begin, 1e-9)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(len(scored))
            bar.update(bar.total - bar.n)
        self._wait_for_all()  # others have written their share by then
        store.refresh()
        if self._is_main:
            num_found = max(0, data.num_completions() - num_scored)
            logger.warning(
                "Reference log-probs (%s): %d of %d completions found in the store, %d scored. The store %s holds %d "
                "completions, %s bytes.",
                name, num_found, data.num_completions(), num_scored, store.folder, store.num_completions,
                f"{store.num_bytes:,}",
            )  # fmt: skip


def by_content(batch: PairBatch, scored: SequenceLogps, scorer: str) -> dict[ContentId, Tensor]:
    """The log-probs of each of the batch's completions, in host memory. ValueError where one is not finite."""
    per_token = scored.per_token.cpu()
    if not bool(per_token.isfinite().all()):
        row = int(batch.sequence[int((~per_token.isfinite()).nonzero()[0])])
        raise ValueError(
            f"The reference ({scorer}) gave a log-prob of {float(per_token[~per_token.isfinite()][0])} in "
            f"completion {row} of a batch. Check its weights for NaN and its dtype for overflow (fp16)."
        )
    return dict(zip(batch.content_ids(), per_token.split(batch.lengths()), strict=True))


def on_device_of(batch: PairBatch, values: Tensor) -> Tensor:
    """`values` of host memory on the batch's device, which is not waited for: a copy from pinned memory."""
    device = batch.sequence.device
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def _of_batch(batch: PairBatch, known: Mapping[ContentId, Tensor]) -> SequenceLogps:
    ids = batch.content_ids()
    per_token = torch.cat([known[key] for key in ids]) if ids else torch.zeros(0)
    return SequenceLogps(
        per_token=on_device_of(batch, per_token), sequence=batch.sequence, num_sequences=batch.num_sequences
    )


def _say_what_is_left(bar: Any, num_blocks: int) -> None:
    """In the progress bar, while other processes work."""
    bar.set_postfix_str(f"waiting for {num_blocks} block{'s' if num_blocks > 1 else ''} of other processes")


def _flushed(store: LogpStore) -> None:
    with contextlib.suppress(ValueError):
        store.flush()
