"""Log-probs computed ahead: before training, or window by window, and the reference need not be in memory after.

Wraps the reference that does the scoring. What it gives goes into the store (`reference.store`): per completion, by
content (token ids of prompt and completion after truncation), per token. So a completion of many pairs is scored once,
what an earlier run scored is found, and every loss and modifier can be computed from what is kept. Costs disk: 4 bytes
per completion token.

A reference that moves has a store for each of its versions, and leaves the one before behind.
"""

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.reference.adapter import null_ref_context
from holdfast.reference.base import PER_BATCH, Reference
from holdfast.reference.identity import Identity
from holdfast.store.store import LogpStore
from holdfast.store.work_sharing import claimed_blocks

logger = logging.getLogger(__name__)


@final
class PrecomputedReference(Reference):
    """The log-probs of `inner`, stored.

    `open_store` gives the store for a reference of an identity, in a version (None if it never moves).
    With `is_whole` the datasets are scored when they are announced, and `park` then turns `inner` into what is kept of
    it, None for nothing; otherwise batches are scored when they are asked about. `keeps_versions` leaves the stores of
    past versions. `is_quiet` hides the progress bar, `is_main` is the process that reports; `wait_for_all` returns once
    all processes of the run have called it.
    """

    def __init__(
        self,
        inner: Reference,
        *,
        open_store: Callable[[Identity, int | None], LogpStore],
        park: Callable[[Reference], Reference | None],
        is_whole: bool = True,
        moves: bool = False,
        keeps_versions: bool = False,
        is_quiet: bool = False,
        is_main: bool = True,
        wait_for_all: Callable[[], object] = lambda: None,
    ) -> None:
        self.version = inner.version
        self.drift = inner.drift
        self._inner: Reference | None = inner
        self._source = inner.describe
        self._open_store: Callable[[Identity, int | None], LogpStore] | None = open_store
        self._park = park
        self._is_whole = is_whole
        self._moves = moves
        self._keeps_versions = keeps_versions
        self._is_quiet = is_quiet
        self._is_main = is_main
        self._wait_for_all = wait_for_all
        self._identity: Identity | None = None
        self._store: LogpStore | None = None
        self._holding: contextlib.ExitStack | None = None
        self._is_told = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `Reference.held`: the inner reference is held from the first completion on that is not stored."""
        if self._holding is not None:
            yield
            return
        with contextlib.ExitStack() as self._holding:
            try:
                yield
            finally:
                self._holding = None

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Score every completion of the datasets that is not stored yet, and let go of the inner reference's memory,
        where that is how it is used. ValueError where log-probs are not finite or the store cannot be written."""
        if self._store is None:
            self._open()
        assert self._store is not None
        _flushed(self._store)
        if not self._is_whole:
            return
        with self.held():
            for name, data in datasets.items():
                self._fill(self._store, name, data)
        if self._inner is not None:
            self._inner = self._park(self._inner)
            self._source = self._inner.describe if self._inner is not None else self._source
        self._open_store = None  # it refers to the reference, which may be about to go

    def _open(self) -> None:
        """The store for the reference as it is now."""
        assert self._inner is not None
        assert self._open_store is not None
        identity = self._inner.identity()
        self._identity = self._identity or identity
        self._store = self._open_store(identity, self.version if self._moves else None)
        weakref.finalize(self, _flushed, self._store)

    def sync(self, mixup_alpha: float) -> None:
        """See `Reference.sync`; from here on there is another store."""
        assert self._inner is not None
        self._inner.sync(mixup_alpha)
        self.version, self.drift = self._inner.version, self._inner.drift
        self._leave()
        self._open()

    def _leave(self) -> None:
        """The store of a version that is over is flushed and, unless versions are kept, removed."""
        if self._store is None:
            return
        if self._keeps_versions:
            self._store.flush()
        else:
            self._store.drop()

    def state_dict(self) -> dict[str, Tensor]:
        """That of the inner reference. What was scored is written, so that a resumed run finds the same numbers."""
        if self._store is not None:
            _flushed(self._store)
        return self._inner.state_dict() if self._inner is not None else {}

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """See `Reference.load_state_dict`."""
        if self._inner is None:
            assert not state
            return
        self._inner.load_state_dict(state, version, drift)
        if version != self.version:
            self.version, self.drift = version, drift
            self._open()

    def _fill(self, store: LogpStore, name: str, data: CompletionsToScore) -> None:
        begin, num_scored, num_tokens = time.monotonic(), 0, 0
        description, unit = f"Reference log-probs ({name})", "completions"
        with store, tqdm(total=data.num_completions(), desc=description, unit=unit, disable=self._is_quiet) as bar:
            blocks = partial(claimed_blocks, store, on_wait=partial(_say_what_is_left, bar))
            for batch in data.batches(blocks, store.missing):
                scored = self._scored(batch)
                store.add(scored)
                num_scored += len(scored)
                num_tokens += int(batch.inputs["attention_mask"].count_nonzero())
                rate = num_tokens / max(time.monotonic() - begin, 1e-9)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(len(scored))
            bar.update(bar.total - bar.n)
        self._wait_for_all()  # others have written their parts by then
        store.refresh()
        if self._is_main:
            num_found = max(0, data.num_completions() - num_scored)
            logger.warning(
                "Reference log-probs (%s): %d of %d completions found in the store, %d scored. The store %s holds %d "
                "completions, %s bytes.",
                name, num_found, data.num_completions(), num_scored, store.folder, store.num_completions,
                f"{store.num_bytes:,}",
            )  # fmt: skip

    def _scored(self, batch: PairBatch) -> dict[ContentId, Tensor]:
        """The log-probs of each of the batch's sequences, from the inner reference."""
        if self._inner is None:
            raise ValueError(
                "Log-probs of completions that were not precomputed were asked for, and the reference "
                f"({self._source()}) is no longer in memory. Hand every dataset to the trainer when it is made "
                "(`eval_dataset` may be a dict of several), or use reference='model'."
            )
        if self._holding is not None:
            self._holding.enter_context(self._inner.held())
        logps = self._inner.logps(batch)
        per_token = logps.per_token.cpu()
        if not bool(per_token.isfinite().all()):
            row = int(batch.sequence[int((~per_token.isfinite()).nonzero()[0])])
            raise ValueError(
                f"The reference ({self._source()}) gave a log-prob of {float(per_token[~per_token.isfinite()][0])} in "
                f"completion {row} of a batch. Check its weights for NaN and its dtype for overflow (fp16)."
            )
        return dict(zip(batch.content_ids(), per_token.split(batch.lengths()), strict=True))

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`; looked up. A batch of which something is not stored is scored by the inner reference
        where that is still there, else ValueError; what is stored stays as it is, in whatever batch it was scored."""
        assert self._store is not None, "nothing was prepared"
        batch.check_identified()
        ids = batch.content_ids()
        known = self._store.get(ids, batch.lengths())
        if any(key not in known for key in ids):
            scored = self._scored(batch)
            self._add(scored)
            known = scored | known
        per_token = torch.cat([known[key] for key in ids]) if ids else torch.zeros(0)
        return SequenceLogps(
            per_token=beside_tokens(per_token, batch), sequence=batch.sequence, num_sequences=batch.num_sequences
        )

    def _add(self, scored: Mapping[ContentId, Tensor]) -> None:
        """Stores what was scored while training, which goes on where there is no room: the numbers are at hand."""
        assert self._store is not None
        try:
            self._store.add(scored)
        except ValueError as error:
            if not self._is_told and self._is_main:
                logger.warning("%s Training goes on; log-probs are not stored.", error)
            self._is_told = True

    def release(self) -> None:
        """Tells the inner reference, where it is still there."""
        if self._inner is not None:
            self._inner.release()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What an inner reference still holds in memory; log-probs are on disk."""
        if self._inner is not None:
            yield from self._inner.tensors()

    def identity(self) -> Identity:
        """That of the reference that did the scoring."""
        assert self._identity is not None, "nothing was prepared"
        return self._identity

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        where = f" in {self._store.folder}" if self._store is not None else ""
        when = "asked ahead" if asked == PER_BATCH else asked
        return f"{self._source(when)}; its log-probs stored{where}"

    def null_ref_context(self) -> AbstractContextManager[None]:
        """That of the inner reference, where it is still there."""
        return null_ref_context(self._inner)

    @property
    def store(self) -> LogpStore:
        """Where its log-probs are, once it was told of the datasets."""
        assert self._store is not None, "nothing was prepared"
        return self._store

    @property
    def module(self) -> nn.Module | None:
        """None: no module is kept."""
        return None


def _say_what_is_left(bar: Any, num_blocks: int) -> None:
    """In the progress bar, while other processes work."""
    bar.set_postfix_str(f"waiting for {num_blocks} block{'s' if num_blocks > 1 else ''} of other processes")


def _flushed(store: LogpStore) -> None:
    """What was added is written, where it can be."""
    with contextlib.suppress(ValueError):
        store.flush()


def beside_tokens(values: Tensor, batch: PairBatch) -> Tensor:
    """`values` of host memory on the device of the batch, which is not waited for: a copy from pinned memory."""
    device = batch.sequence.device
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
