"""Log-prob sums that the user gives in a dataset's columns, as the common trainer writes them.

A column does not say from which weights, truncation and numerics its sums came. So the run's reference scores a sample,
and the two are compared: the longest completions, where another truncation shows, and as many at random. A sum is found
by its completion's content id.

Only sums are meaningful: a sum is put on the completion's first token. So LD-DPO and the audit, which read single
tokens, must not use them. Given up: finding a few wrong rows among right ones, since only the sample is compared.
"""

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.columns import REFERENCE_COLUMNS
from holdfast.data.completions import NO_DEAL, ChooseBlocks, CompletionsToScore, Deal, FindMissing, UserLogp
from holdfast.reference.sources.stored import on_device_of

logger = logging.getLogger(__name__)

NUM_LONGEST, NUM_RANDOM = 8, 8
"""Numbers of completions of a dataset that are compared: its longest ones, and others at random."""

LEAST_NATS = 1e-2
"""The gap between two sums that is always accepted, in nats."""

NATS_PER_ROOT_TOKEN, NATS_PER_ROOT_TOKEN_HALF = 1e-3, 0.1
"""Accepted gap divided by the root of the number of tokens, in fp32 and in half precision. The root is there because
rounding errors differ in sign from token to token. In bf16 and fp16 another batch shape moves single tokens by 0.1."""

Sums = dict[ContentId, UserLogp]


@final
class UserLogps:
    """The source of log-prob sums from the datasets' columns.

    `is_half` says that weights or autocast are not fp32, and `is_main` that this process reports.
    """

    kind: ClassVar[str] = "GivenReference"

    def __init__(self, *, is_half: bool = False, is_main: bool = True) -> None:
        self._is_half = is_half
        self._is_main = is_main
        self._sums: Sums = {}

    def find(self, batch: PairBatch) -> SequenceLogps | None:
        """The batch's sums, each on its completion's first token, with 0 on the other tokens. None where one of the
        completions has no sum."""
        entries = [self._sums.get(key) for key in batch.content_ids()]
        values = [entry.value for entry in entries if entry is not None]
        if len(values) < len(entries):
            return None
        sums = on_device_of(batch, [torch.tensor(values, dtype=torch.float32)])
        zeros = torch.zeros(len(batch.sequence), device=batch.source.device)
        logps = SequenceLogps(per_token=zeros, sequence=batch.sequence, num_sequences=batch.num_sequences)
        per_token = torch.where(logps.ranks() == 0, sums[batch.sequence], zeros)
        return SequenceLogps(per_token=per_token, sequence=batch.sequence, num_sequences=batch.num_sequences)

    def samples(self, datasets: Mapping[str, CompletionsToScore]) -> "dict[str, Sample]":
        """A sample to compare of each dataset that has sums. ValueError where a value is not a finite number, or where
        one completion has two different sums."""
        sums = {name: self._read(name, data) for name, data in datasets.items()}
        return {name: Sample(data=data, sums=sums[name]) for name, data in datasets.items() if sums[name]}

    def accept(self, name: str, sample: "Sample", logps: Callable[[PairBatch], SequenceLogps], reference: str) -> None:
        """Accepts the sums of the dataset `name`. ValueError with the gap where those of its sample are not what
        `logps` computes. `logps` are the log-probs of the run's reference, and `reference` says in words which one it
        is."""
        self._compare(name, sample, logps, reference)
        self._sums |= sample.sums

    def describe(self, computed: str) -> str:
        """One line for these sums. `computed` is that of the reference with which they were compared."""
        return f"{len(self._sums)} log-prob sums that came with the data, compared with {computed}"

    def _read(self, name: str, data: CompletionsToScore) -> Sums:
        """The sums of a dataset by content id. Where a completion has several sums, the first is taken."""
        sums: Sums = {}
        for new in data.user_logps():
            if not isinstance(new.value, int | float) or not math.isfinite(new.value):
                raise ValueError(
                    f"the {name} dataset brings reference log-probs along, which must be one finite number per "
                    f"completion; found {new.value!r} in {new.where}. Drop the columns {list(REFERENCE_COLUMNS)}, so "
                    "that the log-probs are computed, or correct the row."
                )
            old = sums.get(new.content) or self._sums.get(new.content)
            if old is not None and abs(old.value - new.value) > self._tolerance(new.num_tokens):
                raise ValueError(
                    f"the {name} dataset brings reference log-probs along, which must be alike wherever a completion "
                    f"is; found {old.value:.6g} in {old.where} and {new.value:.6g} in {new.where} for the same token "
                    f"ids. Drop the columns {list(REFERENCE_COLUMNS)}, so that the log-probs are computed."
                )
            sums.setdefault(new.content, new)
        return sums

    def _tolerance(self, num_tokens: int) -> float:
        """The largest gap (nats) between two sums over `num_tokens` tokens that rounding explains."""
        per_root = NATS_PER_ROOT_TOKEN_HALF if self._is_half else NATS_PER_ROOT_TOKEN
        return max(LEAST_NATS, per_root * math.sqrt(num_tokens))

    def _compare(
        self, name: str, sample: "Sample", logps: Callable[[PairBatch], SequenceLogps], reference: str
    ) -> None:
        """Logs the gap on the sample. ValueError where rounding does not explain it."""
        gaps: list[float] = []
        worst: tuple[float, UserLogp, float] | None = None
        for batch in sample.batches(lambda ids: [ids], lambda ids: ids):
            for key, computed in zip(batch.content_ids(), logps(batch).sums().tolist(), strict=True):
                gap = abs(sample.sums[key].value - computed)
                gaps.append(gap)
                excess = gap / self._tolerance(sample.sums[key].num_tokens)
                if worst is None or not excess <= worst[0]:  # NaN counts as the largest
                    worst = excess, sample.sums[key], computed
        assert worst is not None, "a dataset has rows"
        excess, row, computed = worst
        summary = f"{sum(gaps) / len(gaps):.3g} nats per completion on average, {max(gaps):.3g} at most"
        if not excess <= 1:
            raise ValueError(
                f"the reference log-probs in the {name} dataset's columns {list(REFERENCE_COLUMNS)} must be those of "
                f"this run's reference ({reference}); on {len(gaps)} completions that it scored the gap "
                f"is {summary}: {row.where} has {row.value:.6g}, the reference gives {computed:.6g} for "
                f"{row.num_tokens} tokens, where rounding explains {self._tolerance(row.num_tokens):.2g}. The "
                "columns are of other weights, another tokenizer, template or truncation, or other numerics. Drop "
                "them: precompute_ref_log_probs=True computes and keeps the right ones."
            )
        if self._is_main:
            logger.warning(
                "Reference log-probs (%s): %d completions have theirs in the dataset's columns. Compared with the "
                "reference on %d of them: the gap is %s.", name, len(sample.sums), len(gaps), summary,
            )  # fmt: skip


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The completions of a dataset that are compared, and the sums of all its completions."""

    data: CompletionsToScore
    sums: Sums

    def num_completions(self) -> int:
        """The number of completions that are compared."""
        return min(self.data.num_completions(), NUM_LONGEST + NUM_RANDOM)

    def batches(self, blocks: ChooseBlocks, missing: FindMissing, deal: Deal = NO_DEAL) -> Iterator[PairBatch]:
        """See `CompletionsToScore.batches`."""
        return self.data.batches(lambda ids: blocks(_spread(ids)), missing, deal)

    def pairs(self) -> tuple[()]:
        """See `CompletionsToScore.pairs`: none, since a sample has few of them."""
        return ()

    def user_logps(self) -> Iterator[UserLogp]:
        """None, since the sample is to be scored."""
        return iter(())


def _spread(ids: Sequence[ContentId]) -> list[ContentId]:
    """The first of `ids`, which are the longest completions, and some others, which depend on `ids` alone."""
    rest = ids[NUM_LONGEST:]
    numbers = sorted(random.Random(0).sample(range(len(rest)), min(NUM_RANDOM, len(rest))))
    return [*ids[:NUM_LONGEST], *(rest[number] for number in numbers)]
