"""The batch that a loss is a function of: the pairs of all processes, where the mathematics asks for them.

A loss that is a number per pair is averaged over processes, as its gradients are. Two kinds of terms are no such means.
A loss that couples pairs (`Loss.couples_pairs`) sorts the batch, or divides by its tokens; and the load-balancing loss
of experts is a product of two means over tokens. For the first kind the log-probs of all pairs are gathered, a few
numbers per pair. For the second the sums behind both means are. Every process then computes the same loss.

Gradients flow to a process's own numbers only, and are multiplied by the number of processes: DDP, FSDP and ZeRO divide
by it. So backward passes have no exchange of their own. All processes gather in the same order, whether or not they
have pairs. Given up: the batch of an optimizer step; with gradient accumulation it is that of one micro-batch.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.batch import PairBatch
from holdfast.config import DPOConfig
from holdfast.data.loader.fillers import mean_over_processes
from holdfast.data.loader.token_weights import token_weights
from holdfast.data.mixing.source_column import NO_SOURCE
from holdfast.losses import LOSSES, MarginMoments, PairLogps, loss_terms, moments_after, preference_loss, sum_of_terms
from holdfast.options.metric_names import LOSS_TERM
from holdfast.scoring.router import balance_loss
from holdfast.scoring.score import Scores

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPairs:
    """What the losses of a batch read of its pairs: this process's own, or those of all processes in their order.

    `own` are this process's pairs among them; None where there are no others. `moments` are by loss those of all
    batches of training so far, this one included. `margins` are those that the data ask of the pairs.
    """

    policy: PairLogps
    reference: PairLogps | None
    weights: Float[Tensor, "P"] | None
    margins: Float[Tensor, "P"] | None = None
    own: slice | None = None
    moments: Mapping[str, MarginMoments] = field(default_factory=dict[str, MarginMoments])

    def terms(self, args: DPOConfig) -> Float[Tensor, "K P"]:
        """The terms of the losses of all pairs; see `losses.loss_terms`."""
        return loss_terms(
            self.policy,
            self.reference,
            loss_types=args.loss_types,
            loss_weights=args.loss_weights or [1.0] * len(args.loss_types),
            options=args.loss_options,
            moments=self.moments,
            margins=self.margins,
        )

    def losses_of(self, terms: Float[Tensor, "K P"]) -> Float[Tensor, "P"]:
        """The losses of all pairs, which these are the terms of."""
        return sum_of_terms(terms, self.weights)

    def terms_by_name(
        self, args: DPOConfig, terms: Float[Tensor, "K P"], router: Float[Tensor, ""] | None
    ) -> dict[str, Float[Tensor, "Q"]]:
        """The terms of the losses of this process's pairs, by the metric that says them; their sum is the loss.
        `router` is that of the router. None where there is only one term."""
        if len(terms) + (router is not None) < 2:
            return {}
        terms = terms.detach() if self.weights is None else self.weights * terms.detach()
        named = zip(args.loss_types, terms, strict=True)
        found = {f"{LOSS_TERM}{name}": self.of_this_process(of_loss) for name, of_loss in named}
        if router is not None:
            found[f"{LOSS_TERM}aux_loss"] = router.detach().expand_as(self.of_this_process(terms[0]))
        return found

    def losses(self, args: DPOConfig, pairs: Int[Tensor, "Q"]) -> Float[Tensor, "Q"]:
        """The losses of these pairs, as if there were no others."""
        return preference_loss(
            self.policy.of_pairs(pairs),
            None if self.reference is None else self.reference.of_pairs(pairs),
            loss_types=args.loss_types,
            loss_weights=args.loss_weights or [1.0] * len(args.loss_types),
            options=args.loss_options,
            pair_weights=None if self.weights is None else self.weights[pairs],
            moments=self.moments,
            margins=None if self.margins is None else self.margins[pairs],
        )

    def of_this_process(self, values: Float[Tensor, "P"]) -> Float[Tensor, "Q"]:
        """The values of this process's own pairs, of one value for each pair."""
        return values if self.own is None else values[self.own]


@final
class GlobalBatch:
    """Completes what a process knows of its batch with what the others know, for a run of `args`.

    `has_router` says whether the loss has a load-balancing term. All processes must call each method together.
    """

    def __init__(self, args: DPOConfig, accelerator: Accelerator, *, has_router: bool) -> None:
        self._args = args
        self._accelerator = accelerator
        self._sums_router = has_router and accelerator.num_processes > 1
        self._gathers = accelerator.num_processes > 1 and any(LOSSES[name].couples_pairs for name in args.loss_types)
        self._moments: dict[str, MarginMoments] = {}

    def router_weights(self, batch: PairBatch, real: PairBatch) -> Int[Tensor, "R T"] | None:
        """How often each token of the batch counts in the load-balancing loss; None where the model's own loss of the
        batch is the one that is meant. `real` is the batch without its fillers."""
        return token_weights(batch, real) if self._sums_router else None

    def with_aux_loss(self, scores: Scores) -> Scores:
        """`scores` with the load-balancing loss of the tokens of all processes, if there is one."""
        if scores.router_sums is None:
            return scores
        sums = _of_all_processes(scores.router_sums[None], self._accelerator).sum(0)
        return replace(scores, aux_loss=balance_loss(sums))

    def compared(
        self,
        policy: PairLogps,
        reference: PairLogps | None,
        *,
        weights: Sequence[Float[Tensor, "P"] | None],
        margins: Float[Tensor, "P"] | None,
        is_uneven: bool,
        is_training: bool,
    ) -> ComparedPairs:
        """The pairs that a loss compares; the `weights` are multiplied. With `is_uneven` processes may have unlike
        numbers of them. A batch of training joins the moments that later batches are compared with."""
        factors = [each for each in weights if each is not None]
        product = torch.stack(factors).prod(0) if len(factors) > 1 else next(iter(factors), None)
        pairs = ComparedPairs(policy=policy, reference=reference, weights=product, margins=margins)
        if self._gathers:
            pairs = _gathered(pairs, self._accelerator, is_uneven=is_uneven)
        if is_training:
            names, options = self._args.loss_types, self._args.loss_options
            self._moments = moments_after(
                self._moments, pairs.policy, pairs.reference, loss_types=names, options=options
            )
        return replace(pairs, moments=self._moments)

    def moments_record(self) -> dict[str, dict[str, float]]:
        """The moments of all batches of training so far, by loss, as plain numbers. Waits for the device."""
        return {name: moments.record() for name, moments in self._moments.items()}

    def begin(self, moments: Mapping[str, Mapping[str, float]] | None = None, checkpoint: Path | None = None) -> None:
        """Begins a run, with the moments that `moments_record` gave for its batches so far. Warns where those of one of
        its losses are not among the moments of `checkpoint`, which it goes on from."""
        device, recorded = self._accelerator.device, moments or {}
        self._moments = {name: MarginMoments.restored(record, device) for name, record in recorded.items()}
        afresh = [name for name in self._args.loss_types if LOSSES[name].gap is not None and name not in recorded]
        if checkpoint is not None and afresh and self._accelerator.is_main_process:
            logger.warning(
                "%s holds mean and deviation of the margins so far for %s, not for %s, with which loss_type=%s "
                "compares pairs: the run that wrote it had other losses, or was another trainer's. They begin afresh "
                "with the next batch, so the run is not what one with these losses from the start would be.",
                checkpoint, ", ".join(recorded) or "no loss", ", ".join(dict.fromkeys(afresh)),
                ",".join(self._args.loss_types),
            )  # fmt: skip

    def mean(
        self, pairs: ComparedPairs, losses: Float[Tensor, "P"], term: Float[Tensor, ""] | None, *, is_uneven: bool
    ) -> Float[Tensor, ""]:
        """The loss to minimise: the mean of the `losses` of `pairs`, plus a `term` that is the same for all of them.
        Its gradients, averaged over the processes, are those of the mean over all their pairs."""
        if is_uneven and pairs.own is None:
            mean = mean_over_processes(losses, self._accelerator)
            return mean if term is None else mean + term
        return (losses if term is None else losses + term).mean()

    def losses_by_source(self, batch: PairBatch, pairs: ComparedPairs) -> Float[Tensor, "P"]:
        """The losses of this process's pairs, computed for the pairs of each source alone; zeros without sources."""
        losses = torch.zeros_like(pairs.policy.chosen)
        for of_source in self._pairs_of_sources(batch, pairs):
            if len(of_source) > 0:
                losses = losses.index_copy(0, of_source, pairs.losses(self._args, of_source).detach())
        return pairs.of_this_process(losses)

    def _pairs_of_sources(self, batch: PairBatch, pairs: ComparedPairs) -> Sequence[Int[Tensor, "Q"]]:
        """The indices of the pairs of each source. A stream may have rows with a source on some processes only."""
        sources, places = batch.host_sources, batch.pair_sources
        if pairs.own is None:
            return [] if sources is None or places is None else places.argsort(stable=True).split(sources.counts())
        own = [NO_SOURCE] * batch.num_pairs if sources is None else [sources.names[place] for place in sources.places]
        of_processes: list[str] = gather_object(own)
        return [
            torch.tensor([pair for pair, other in enumerate(of_processes) if other == name], device=batch.chosen.device)
            for name in sorted({*of_processes})
        ]


def _gathered(own: ComparedPairs, accelerator: Accelerator, *, is_uneven: bool) -> ComparedPairs:
    """The pairs of all processes, in one exchange of a few numbers per pair."""
    columns = [getattr(logps, name) for logps in (own.policy, own.reference) if logps is not None for name in _NAMES]
    columns += [column for column in (own.weights, own.margins) if column is not None]
    table = torch.stack([column.float() for column in columns], 1)
    num_own, index = len(table), accelerator.process_index
    counts = [num_own] * accelerator.num_processes
    if is_uneven:
        every: Any = accelerator.gather(torch.tensor([num_own], device=table.device))
        counts = every.tolist()
        table = torch.cat([table, table.new_zeros(max(counts) - num_own, table.shape[1])])
    parts = _of_all_processes(table, accelerator).split(len(table))
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).unbind(1)
    start = sum(counts[:index])
    return ComparedPairs(
        policy=_logps(gathered[: len(_NAMES)], own.policy),
        reference=None if own.reference is None else _logps(gathered[len(_NAMES) :], own.reference),
        weights=None if own.weights is None else gathered[-1 if own.margins is None else -2],
        margins=None if own.margins is None else gathered[-1],
        own=slice(start, start + num_own),
    )


_NAMES = tuple(field.name for field in fields(PairLogps))


def _logps(columns: Sequence[Tensor], like: PairLogps) -> PairLogps:
    """The log-probs that the first of `columns` hold, each as the field of `like` that it comes from."""
    named = {name: column.to(getattr(like, name).dtype) for name, column in zip(_NAMES, columns, strict=False)}
    return PairLogps(**named)


def _of_all_processes(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes, in their order; each must have as many. Gradients are as the module says."""
    return _Gather.apply(values, accelerator)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, accelerator: Accelerator) -> Any:
        ctx.num_rows, ctx.accelerator = len(values), accelerator
        return accelerator.gather(values.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        start = ctx.accelerator.process_index * ctx.num_rows
        return gradients[0][start : start + ctx.num_rows] * ctx.accelerator.num_processes, None
