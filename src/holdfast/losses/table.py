"""`LOSSES`: every preference loss by name, with what it reads and where it comes from.

The losses stand in `pairwise` and `reference_free`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from holdfast.losses.options import LossOptions, require_known

LossFunction = Callable[["LossInputs"], Tensor]
LOSSES: dict[str, "Loss"] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """Log-probs (nats, fp32) of the two completions of each pair, in pair order, and how many tokens were scored.

    `chosen` and `rejected` are log pi(y|x) after the LD-DPO modifier, if any; `chosen_likelihood` is without it.
    """

    chosen: Float[Tensor, "P"]
    rejected: Float[Tensor, "P"]
    chosen_lengths: Int[Tensor, "P"]
    rejected_lengths: Int[Tensor, "P"]
    chosen_likelihood: Float[Tensor, "P"]

    def means(self) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """Log-probs per token, nats: chosen, rejected."""
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss reads. `reference` is None only where no loss of the run needs one."""

    policy: PairLogps
    reference: PairLogps | None
    options: LossOptions

    def log_ratios(self) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """log pi_theta(y|x) - log pi_ref(y|x), nats: chosen, rejected."""
        assert self.reference is not None
        return self.policy.chosen - self.reference.chosen, self.policy.rejected - self.reference.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss, where it comes from, and what matters for combining it. Every loss reads beta, except `sft`."""

    function: LossFunction
    paper: str
    reads: tuple[str, ...] = ()  # the other options that change its value
    needs_reference: bool = True
    is_length_averaged: bool = False  # without a reference, it compares log-probs per token
    sorts_batch: bool = False  # its k-th value belongs to rank k, not to pair k


def loss(
    paper: str,
    *reads: str,
    needs_reference: bool = True,
    is_length_averaged: bool = False,
    sorts_batch: bool = False,
) -> Callable[[LossFunction], LossFunction]:
    """A decorator that enters a function into `LOSSES`, under its own name."""

    def enter(function: LossFunction) -> LossFunction:
        LOSSES[function.__name__] = Loss(
            function=function,
            paper=paper,
            reads=reads,
            needs_reference=needs_reference,
            is_length_averaged=is_length_averaged,
            sorts_batch=sorts_batch,
        )
        return function

    return enter


def require_reference(loss_types: Sequence[str], reference: PairLogps | None) -> None:
    """ValueError where one of the losses is unknown, or needs a reference that is None."""
    for name in loss_types:
        require_known("loss_type", name, LOSSES)
        if LOSSES[name].needs_reference and reference is None:
            free = ", ".join(name for name, loss in LOSSES.items() if not loss.needs_reference)
            raise ValueError(f"{name} compares with a reference, but got None. Pass its log-probs, or use {free}.")
