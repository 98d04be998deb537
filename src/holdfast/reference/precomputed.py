"""Log-probs computed ahead: the datasets are scored before training, and the reference need not be in memory after.

Wraps the reference that does the scoring. Values are kept per completion, by content (token ids of prompt and
completion after truncation), per token: a completion of many pairs is scored once, and every loss and modifier can
be computed from what is kept. Costs host memory: 4 bytes per completion token.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.reference.adapter import null_ref_context
from holdfast.reference.base import PER_BATCH, FixedReference, Reference

ContentId = tuple[int, int]


@final
class PrecomputedReference(FixedReference):
    """The log-probs of `inner`, kept.

    `park` turns `inner` into what is kept of it once the datasets are scored, None for nothing. `gather` turns this
    process's list of (content id, log-probs) into that of all processes; the identity where there is one process.
    `is_quiet` hides the progress bar.
    """

    def __init__(
        self,
        inner: Reference,
        *,
        park: Callable[[Reference], Reference | None],
        gather: Callable[[list[Any]], list[Any]] = list,
        is_quiet: bool = False,
    ) -> None:
        super().__init__()
        self._inner: Reference | None = inner
        self._source = inner.describe("asked ahead")
        self._park = park
        self._gather = gather
        self._fingerprint: str | None = None
        self._is_quiet = is_quiet
        self._kept: dict[ContentId, Tensor] = {}

    def held(self) -> AbstractContextManager[None]:
        """That of the reference that does the scoring."""
        return self._inner.held() if self._inner is not None else contextlib.nullcontext()

    def prepare(self, datasets: Mapping[str, Iterable[PairBatch]]) -> None:
        """Score every completion of the datasets that is not kept yet, and let go of the inner reference's memory.
        ValueError where the log-probs are not finite."""
        if self._fingerprint is None and self._inner is not None:
            self._fingerprint = self._inner.fingerprint()
        with self.held():
            for name, batches in datasets.items():
                scored: dict[ContentId, Tensor] = {}
                for batch in tqdm(batches, desc=f"Reference log-probs ({name})", unit="batch", disable=self._is_quiet):
                    scored |= self._score(batch, scored)
                for shard in self._gather([scored]):
                    self._kept |= shard
        if self._inner is not None:
            self._inner = self._park(self._inner)

    def _score(self, batch: PairBatch, scored: Mapping[ContentId, Tensor]) -> dict[ContentId, Tensor]:
        ids = content_ids(batch)
        if all(key in self._kept or key in scored for key in ids):
            return {}
        if self._inner is None:
            raise ValueError(
                "Log-probs of completions that were not precomputed were asked for, and the reference "
                f"({self._source}) is no longer in memory. Hand every dataset to the trainer when it is made "
                "(`eval_dataset` may be a dict of several), or use reference='model'."
            )
        logps = self._inner.logps(batch)
        per_token = logps.per_token.cpu()
        if not bool(per_token.isfinite().all()):
            row = int(batch.sequence[int((~per_token.isfinite()).nonzero()[0])])
            raise ValueError(
                f"The reference ({self._source}) gave a log-prob of {float(per_token[~per_token.isfinite()][0])} in "
                f"completion {row} of a batch. Check its weights for NaN and its dtype for overflow (fp16)."
            )
        # Clones: a view would take its whole batch along when it is sent to the other processes.
        parts = (part.clone() for part in per_token.split(logps.lengths().tolist()))
        return dict(zip(ids, parts, strict=True))

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`; looked up. A batch that was not prepared is scored by the inner reference where that
        is still there, else ValueError."""
        known = self._kept | self._score(batch, {})
        kept = [known[key] for key in content_ids(batch)]
        per_token = torch.cat(kept) if kept else torch.zeros(0)
        return SequenceLogps(
            per_token=per_token.to(batch.source.device), sequence=batch.sequence, num_sequences=batch.num_sequences
        )

    def release(self) -> None:
        """Tells the inner reference, where it is still there."""
        if self._inner is not None:
            self._inner.release()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The kept log-probs, and what an inner reference without a module of its own still holds."""
        for (high, low), logps in self._kept.items():
            yield f"{high:x}.{low:x}", logps
        if self._inner is not None:
            yield from self._inner.tensors()

    def fingerprint(self) -> str:
        """That of the reference that did the scoring."""
        assert self._fingerprint is not None, "nothing was prepared"
        return self._fingerprint

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        return f"{self._source}; its log-probs of {len(self._kept)} completions kept in host memory"

    def null_ref_context(self) -> AbstractContextManager[None]:
        """That of the inner reference, where it is still there."""
        return null_ref_context(self._inner)

    @property
    def module(self) -> nn.Module | None:
        """None: no module is kept."""
        return None


def content_ids(batch: PairBatch) -> list[ContentId]:
    """The content id of each of the batch's sequences."""
    return [(high, low) for high, low in batch.content.tolist()]
