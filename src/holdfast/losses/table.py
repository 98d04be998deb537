"""`LOSSES`: every preference loss by name, with its paper, its options, and what matters for combining it.

A loss is a pure function from `LossInputs` to one value per pair, a few lines beside its equation, so that it can be
compared with numbers worked by hand. The decorator `loss` enters it into the table. `LossInputs` is generic in the
options, so that a type checker finds a loss that reads an option which it has not declared. Given up: a mean inside
the loss (the caller weights and reduces), and a check of the options on every step (`checks` is for configuration).

Notation in this package: P pairs, N completion tokens, S sequences; w chosen, l rejected;
r = log pi_theta - log pi_ref (nats), score = r seen through the f-divergence, m = beta (score_w - score_l),
eps = label_smoothing, sigma the logistic function.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from holdfast.losses.moments import MarginMoments
from holdfast.losses.options import Options, option_names, rules
from holdfast.losses.other_names import require_loss

OptionsT = TypeVar("OptionsT", bound=Options)
OptionsT_co = TypeVar("OptionsT_co", bound=Options, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """Log-probs (nats, fp32) of the two completions of each pair, and their numbers of scored tokens, in pair order.

    `chosen` and `rejected` are log pi(y|x) after LD-DPO, if it is on; `chosen_likelihood` is log pi(y_w|x) without it.
    """

    chosen: Float[Tensor, "P"]
    rejected: Float[Tensor, "P"]
    chosen_lengths: Int[Tensor, "P"]
    rejected_lengths: Int[Tensor, "P"]
    chosen_likelihood: Float[Tensor, "P"]

    def means(self) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """Log-probs per token, nats: chosen, rejected."""
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths

    def of_pairs(self, pairs: Int[Tensor, "Q"]) -> "PairLogps":
        """The log-probs of these pairs alone."""
        return PairLogps(
            chosen=self.chosen[pairs],
            rejected=self.rejected[pairs],
            chosen_lengths=self.chosen_lengths[pairs],
            rejected_lengths=self.rejected_lengths[pairs],
            chosen_likelihood=self.chosen_likelihood[pairs],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs(Generic[OptionsT_co]):
    """What a loss reads. `reference` is None only where no loss of the run needs one. `moments` are by the loss's name,
    of those losses that compare a pair with the batches before. `margins` are those that the data ask of each pair
    (beta * nats), if they do."""

    policy: PairLogps
    reference: PairLogps | None
    options: OptionsT_co
    moments: Mapping[str, MarginMoments] = field(default_factory=dict[str, MarginMoments])
    margins: Float[Tensor, "P"] | None = None

    def log_ratios(self) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """log pi_theta(y|x) - log pi_ref(y|x), nats: chosen, rejected."""
        assert self.reference is not None
        return self.policy.chosen - self.reference.chosen, self.policy.rejected - self.reference.rejected

    def beyond_margin(self, margin: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """`margin` less what the data ask of each pair (Amini et al. 2024, arXiv:2402.10571)."""
        return margin if self.margins is None else margin - self.margins

    def moments_of(self, name: str, gaps: Float[Tensor, "P"]) -> MarginMoments:
        """The moments of the loss `name`; those of these gaps alone before any batch was trained on."""
        return self.moments[name] if name in self.moments else MarginMoments.of(gaps)


LossFunction = Callable[[LossInputs[OptionsT]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss, its paper, and what matters for combining it."""

    function: LossFunction[Any]
    paper: str
    options: type[Options]
    needs_reference: bool = True
    is_length_averaged: bool = False
    """Whether a loss without a reference compares log-probs per token."""
    sorts_batch: bool = False
    """Whether it sorts the batch, so that its k-th value belongs to rank k and not to pair k."""
    couples_pairs: bool = False
    """Whether a value depends on other pairs of the batch too. Several processes then gather the pairs of all."""
    reads_margins: bool = False
    """Whether it asks the margins of each pair that the data bring along."""
    least_pairs: int = 1
    """The fewest pairs of a batch that it can compare."""
    gap: Callable[[LossInputs[Any]], Tensor] | None = None
    """The margin per pair whose `MarginMoments` it reads; None for a loss that knows no other batches."""
    objection: Callable[[Any], str | None] | None = None
    """Why the loss cannot be computed with these options although each is in its range; None where it can."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The options that change its value, except for beta and for those that are read only under another option."""
        apart = {"beta", *(name for name, rule in rules(self.options).items() if rule.read_under is not None)}
        return tuple(name for name in option_names(self.options) if name not in apart)


LOSSES: dict[str, Loss] = {}


def loss(
    paper: str,
    options: type[OptionsT],
    *,
    needs_reference: bool = True,
    is_length_averaged: bool = False,
    sorts_batch: bool = False,
    couples_pairs: bool = False,
    reads_margins: bool = False,
    least_pairs: int = 1,
    gap: Callable[[LossInputs[OptionsT]], Tensor] | None = None,
    objection: Callable[[OptionsT], str | None] | None = None,
) -> Callable[[LossFunction[OptionsT]], LossFunction[OptionsT]]:
    """A decorator that enters a function into `LOSSES` under its own name; the arguments are as in `Loss`."""

    def enter(function: LossFunction[OptionsT]) -> LossFunction[OptionsT]:
        LOSSES[function.__name__] = Loss(
            function=function,
            paper=paper,
            options=options,
            needs_reference=needs_reference,
            is_length_averaged=is_length_averaged,
            sorts_batch=sorts_batch,
            couples_pairs=couples_pairs or sorts_batch,
            reads_margins=reads_margins,
            least_pairs=least_pairs,
            gap=gap,
            objection=objection,
        )
        return function

    return enter


def require_reference(loss_types: Sequence[str], reference: PairLogps | None) -> None:
    """ValueError where one of the losses is unknown, or needs a reference that is None."""
    for name in loss_types:
        require_loss(name, LOSSES)
        if LOSSES[name].needs_reference and reference is None:
            free = ", ".join(name for name, loss in LOSSES.items() if not loss.needs_reference)
            raise ValueError(f"{name} compares with a reference, but got None. Pass its log-probs, or use {free}.")
