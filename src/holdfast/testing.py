"""A reference for tests: its log-probs come from a table, so an expected loss can be worked out by hand.

No model is asked, so a test of a loss, a metric or a callback needs no second one and knows every number. Where a
completion's log-probs are missing, or are too few or too many, the reference says so rather than give others.

    table = TableReference({content_id(prompt_ids, completion_ids): [-1.5, -0.25], ...})
    trainer.reference = Reference(Roles(scorer=table))

`content_id` is that of `holdfast.data.tokenize`. `Reference` and `Roles` are those of `holdfast.reference.reference`.
Given up: the table says nothing about the policy, so the check that a run begins with the policy as its own reference
fails. Train with `reference_audit=False`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor

from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.reference.base import Scorer, Share
from holdfast.reference.identity.identity import Identity


@final
class TableReference(Scorer):
    """A scorer that looks log-probs up: by a completion's content id, nats, one for each of its tokens."""

    kind = "TableReference"
    sums_states = False

    def __init__(self, logps: Mapping[ContentId, Sequence[float]]) -> None:
        self._table = {content_id: torch.tensor(values, dtype=torch.float32) for content_id, values in logps.items()}

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`. ValueError where a completion is not in the table, or has another number of tokens."""
        found = [
            self._of(content_id, length, sequence)
            for sequence, (content_id, length) in enumerate(zip(batch.content_ids(), batch.lengths(), strict=True))
        ]
        per_token = torch.cat(found).to(batch.source.device)
        return SequenceLogps(per_token=per_token, sequence=batch.sequence, num_sequences=batch.num_sequences)

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`: a table always is."""
        return contextlib.nullcontext()

    def models(self) -> Sequence[Share]:
        """See `Scorer.models`: none."""
        return []

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: the table, by content id."""
        return ((f"{high}.{low}", values) for (high, low), values in self._table.items())

    def identity(self) -> Identity:
        """See `Scorer.identity`: the numbers themselves."""
        settings = {name: values.tolist() for name, values in self.tensors()}
        return Identity(tensors={}, settings=settings, attention="", dtype="torch.float32", description="a table")

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return f"a table of the log-probs of {len(self._table)} completions, {when}, fixed"

    def _of(self, content_id: ContentId, length: int, sequence: int) -> Tensor:
        if content_id not in self._table:
            raise ValueError(
                f"The log-probs of sequence {sequence} of a batch were asked for: its content id is {content_id}, and "
                f"it has {length} completion tokens. The table has {len(self._table)} completions, and not this one. "
                "Add it under `content_id(prompt_ids, completion_ids)`, with the ids as they are after truncation."
            )
        values = self._table[content_id]
        if len(values) != length:
            raise ValueError(
                f"The log-probs of {length} tokens were asked for, of the completion with content id {content_id}. The "
                f"table has {len(values)} for it. Give one for each completion token that is scored."
            )
        return values
