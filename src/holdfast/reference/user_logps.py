"""Log-prob sums that a dataset brings along, in the columns that the common trainer writes, in place of computed ones.

Wraps the reference that would compute them. Whose weights a column came from, how its rows were cut and in which
numerics cannot be seen from it, so a sample is scored by the inner reference and compared: the longest completions,
where another truncation shows, and as many drawn at random. A sum is kept under its completion's content id.

Only sums are meaningful: `logps` puts all of a sum on the completion's first token. Whatever looks at single tokens
(LD-DPO, and the audit, which asks the inner reference) must not read them. Given up: telling a few wrong rows apart
from right ones; what is not in the sample is believed.
"""

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.columns import REFERENCE_COLUMNS
from holdfast.data.completions import ChooseBlocks, CompletionsToScore, FindMissing, UserLogp
from holdfast.reference.adapter import null_ref_context
from holdfast.reference.base import PER_BATCH, Reference
from holdfast.reference.identity import Identity
from holdfast.reference.stored import PrecomputedReference, beside_tokens

logger = logging.getLogger(__name__)

NUM_LONGEST, NUM_RANDOM = 8, 8
"""How many completions of a dataset are compared: the longest ones, and others at random."""

LEAST_NATS = 1e-2
"""A gap of one completion's sum that is always accepted."""

NATS_PER_ROOT_TOKEN, NATS_PER_ROOT_TOKEN_HALF = 1e-3, 0.1
"""Accepted gap over the root of the number of tokens, in fp32 and in less: rounding differs in sign from token to
token, and under bf16 or fp16 the shape of a batch alone moves single tokens by 0.1."""

Known = dict[ContentId, UserLogp]


@final
class GivenReference(Reference):
    """The sums in the datasets' own columns; `inner` for datasets without them, and to compare with.

    `is_half` says that the numbers are not those of plain fp32, `is_main` that this process reports.
    """

    def __init__(self, inner: Reference, *, is_half: bool = False, is_main: bool = True) -> None:
        self.version = inner.version
        self.drift = inner.drift
        self._inner = inner
        self._is_half = is_half
        self._is_main = is_main
        self._known: Known = {}

    @property
    def inner(self) -> Reference:
        """The reference that the sums are to be those of, which has per-token log-probs."""
        return self._inner

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Take over what the datasets bring along, once a sample of it was found right; the inner reference scores the
        sample and the datasets without the columns. ValueError where the sample is not what it gives, with the gap;
        where a value is no finite number, or a completion has two of them."""
        given = {name: self._read(name, data) for name, data in datasets.items()}
        samples = {name: _Sample(data) for name, data in datasets.items() if given[name]}
        self._inner.prepare({**datasets, **samples})
        for name, sample in samples.items():
            self._compare(name, sample, given[name])
            self._known |= given[name]

    def _read(self, name: str, data: CompletionsToScore) -> Known:
        """The sums of a dataset by content id, the first where there are several. ValueError as `prepare`."""
        known: Known = {}
        for new in data.user_logps():
            if not isinstance(new.value, int | float) or not math.isfinite(new.value):
                raise ValueError(
                    f"the {name} dataset brings reference log-probs along, which must be one finite number per "
                    f"completion; found {new.value!r} in {new.where}. Drop the columns {list(REFERENCE_COLUMNS)}, so "
                    "that the log-probs are computed, or correct the row."
                )
            old = known.get(new.content) or self._known.get(new.content)
            if old is not None and abs(old.value - new.value) > self._tolerance(new.num_tokens):
                raise ValueError(
                    f"the {name} dataset brings reference log-probs along, which must be alike wherever a completion "
                    f"is; found {old.value:.6g} in {old.where} and {new.value:.6g} in {new.where} for the same token "
                    f"ids. Drop the columns {list(REFERENCE_COLUMNS)}, so that the log-probs are computed."
                )
            known.setdefault(new.content, new)
        return known

    def _tolerance(self, num_tokens: int) -> float:
        """Largest gap (nats) between two sums over so many tokens that rounding explains."""
        per_root = NATS_PER_ROOT_TOKEN_HALF if self._is_half else NATS_PER_ROOT_TOKEN
        return max(LEAST_NATS, per_root * math.sqrt(num_tokens))

    def _compare(self, name: str, sample: "_Sample", given: Known) -> None:
        """Says what the gap is. ValueError where it is not one that rounding explains."""
        gaps: list[float] = []
        worst: tuple[float, UserLogp, float] | None = None
        for batch in sample.batches(lambda ids: [ids], lambda ids: ids):
            for key, computed in zip(batch.content_ids(), self._inner.logps(batch).sums().tolist(), strict=True):
                gap = abs(given[key].value - computed)
                gaps.append(gap)
                excess = gap / self._tolerance(given[key].num_tokens)
                if worst is None or not excess <= worst[0]:  # NaN is the worst
                    worst = excess, given[key], computed
        assert worst is not None, "a dataset has rows"
        excess, where, computed = worst
        found = f"{sum(gaps) / len(gaps):.3g} nats per completion on average, {max(gaps):.3g} at most"
        if not excess <= 1:
            raise ValueError(
                f"the reference log-probs in the {name} dataset's columns {list(REFERENCE_COLUMNS)} must be those of "
                f"this run's reference ({self._inner.describe()}); on {len(gaps)} completions that it scored the gap "
                f"is {found}: {where.where} has {where.value:.6g}, the reference gives {computed:.6g} for "
                f"{where.num_tokens} tokens, where rounding explains {self._tolerance(where.num_tokens):.2g}. The "
                "columns are of other weights, another tokenizer, template or truncation, or other numerics. Drop "
                "them: precompute_ref_log_probs=True computes and keeps the right ones."
            )
        if self._is_main:
            logger.warning(
                "Reference log-probs (%s): %d completions have theirs in the dataset's columns. Compared with the "
                "reference on %d of them: the gap is %s.", name, len(given), len(gaps), found,
            )  # fmt: skip

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`, but only the sums are meaningful where all of the batch's completions are given: a
        sum stands on the first token, and 0 on the others. Any other batch is the inner reference's."""
        known = [self._known.get(key) for key in batch.content_ids()]
        sums = [entry.value for entry in known if entry is not None]
        if len(sums) < len(known):
            return self._inner.logps(batch)
        values = beside_tokens(torch.tensor(sums, dtype=torch.float32), batch)
        zeros = torch.zeros(len(batch.sequence), device=batch.source.device)
        logps = SequenceLogps(per_token=zeros, sequence=batch.sequence, num_sequences=batch.num_sequences)
        per_token = torch.where(logps.ranks() == 0, values[batch.sequence], zeros)
        return SequenceLogps(per_token=per_token, sequence=batch.sequence, num_sequences=batch.num_sequences)

    def held(self) -> AbstractContextManager[None]:
        """See `Reference.held`."""
        return self._inner.held()

    def null_ref_context(self) -> AbstractContextManager[None]:
        """That of the inner reference."""
        return null_ref_context(self._inner)

    def sync(self, mixup_alpha: float) -> None:
        """ValueError: the sums are those of one set of weights."""
        raise ValueError(
            f"A sync (alpha {mixup_alpha}) was asked of a reference whose log-probs the dataset brings along, which "
            f"are of weights that stay as they are. Drop the columns {list(REFERENCE_COLUMNS)}."
        )

    def release(self) -> None:
        """Tells the inner reference."""
        self._inner.release()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the inner reference."""
        return self._inner.tensors()

    def identity(self) -> Identity:
        """That of the inner reference, whose log-probs the sums were compared with."""
        return self._inner.identity()

    def state_dict(self) -> dict[str, Tensor]:
        """That of the inner reference: the sums are in the datasets."""
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """See `Reference.load_state_dict`."""
        self._inner.load_state_dict(state, version, drift)

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        return f"{len(self._known)} log-prob sums that came with the data, compared with {self._inner.describe(asked)}"

    @property
    def module(self) -> nn.Module | None:
        """That of the inner reference."""
        return self._inner.module


@final
@dataclass(frozen=True, slots=True)
class _Sample:
    """The completions of `data` that are compared."""

    data: CompletionsToScore

    def num_completions(self) -> int:
        """As many as are compared."""
        return min(self.data.num_completions(), NUM_LONGEST + NUM_RANDOM)

    def batches(self, blocks: ChooseBlocks, missing: FindMissing) -> Iterator[PairBatch]:
        """See `CompletionsToScore.batches`."""
        return self.data.batches(lambda ids: blocks(_spread(ids)), missing)

    def user_logps(self) -> Iterator[UserLogp]:
        """None: these are to be scored."""
        return iter(())


def _spread(ids: Sequence[ContentId]) -> list[ContentId]:
    """The first of `ids`, which are the longest, and some of the others, always the same ones of the same `ids`."""
    rest = ids[NUM_LONGEST:]
    places = sorted(random.Random(0).sample(range(len(rest)), min(NUM_RANDOM, len(rest))))
    return [*ids[:NUM_LONGEST], *(rest[place] for place in places)]


class _Options(Protocol):
    """What of a run's options speaks against sums."""

    ld_alpha: float | None
    sync_ref_model: bool


def all_bring_logps(datasets: Mapping[str, Any]) -> bool:
    """Whether each of the datasets has the reference's log-probs in its columns."""
    return all(set(REFERENCE_COLUMNS) <= set(data.column_names or ()) for data in datasets.values())


def with_given(
    reference: Reference | None,
    datasets: Mapping[str, Any],
    policy: nn.Module,
    options: _Options,
    accelerator: Accelerator,
) -> Reference | None:
    """`reference`, or what takes the sums that one of the datasets brings along in its place.

    ValueError where they could not be used: no log-probs are computed ahead, the reference moves, or LD-DPO needs those
    of single tokens.
    """
    names = [name for name, data in datasets.items() if set(REFERENCE_COLUMNS) & set(data.column_names or ())]
    if not names:
        return reference
    if options.ld_alpha is not None:
        obstacle, way_out = f"ld_alpha={options.ld_alpha} needs the log-prob of every token, and these are sums", ""
    elif options.sync_ref_model:
        obstacle, way_out = "sync_ref_model=True moves the reference, and these are of weights that stay", ""
    elif not isinstance(reference, PrecomputedReference | GivenReference):
        how = "no loss compares with a reference" if reference is None else reference.describe()
        obstacle = f"this run has no log-probs computed ahead ({how}), so these would be ignored"
        way_out = (
            "" if reference is None else ", or set precompute_ref_log_probs=True (on data with an end) to use them"
        )
    else:
        is_half = accelerator.mixed_precision != "no" or any(p.dtype != torch.float32 for p in policy.parameters())
        if isinstance(reference, GivenReference):
            return reference
        return GivenReference(reference, is_half=is_half, is_main=accelerator.is_main_process)
    raise ValueError(
        f"the {names[0]} dataset brings reference log-probs along, in the columns {list(REFERENCE_COLUMNS)}, but "
        f"{obstacle}. Drop the columns{way_out}."
    )


def without_given(tensors: Mapping[str, Any], reference: Reference | None) -> dict[str, Any]:
    """A collated batch less the sums that a collator passes on, where `reference` has them from the dataset."""
    known = REFERENCE_COLUMNS if isinstance(reference, GivenReference) else ()
    return {name: tensor for name, tensor in tensors.items() if name not in known}
