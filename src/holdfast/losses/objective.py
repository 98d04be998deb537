"""What a run minimises, from the names and weights of its losses, and the implicit rewards of its policy.

`LossOptions` is defined here, since it needs the options of every loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.losses.moments import MarginMoments
from holdfast.losses.pairwise import PairwiseOptions
from holdfast.losses.reference_free import ReferenceFreeOptions
from holdfast.losses.reference_margin import ReferenceMarginOptions
from holdfast.losses.table import LOSSES, LossInputs, PairLogps, require_reference


@dataclass(kw_only=True)
class LossOptions(PairwiseOptions, ReferenceMarginOptions, ReferenceFreeOptions):
    """The options of all losses. `DPOConfig` inherits them."""


def preference_loss(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    options: LossOptions,
    pair_weights: Float[Tensor, "P"] | None = None,
    moments: Mapping[str, MarginMoments] | None = None,
    margins: Float[Tensor, "P"] | None = None,
) -> Float[Tensor, "P"]:
    """The weighted sum of the named losses per pair: pair_weights[p] * sum_k loss_weights[k] * loss_k[p].

    `pair_weights` are those of `wpo_weights` and of the data, `moments` those of the batches so far (`moments_after`),
    and `margins` those that the data ask of the pairs. ValueError for an unknown name, or a needed reference that is
    None.
    """
    terms = loss_terms(
        policy,
        reference,
        loss_types=loss_types,
        loss_weights=loss_weights,
        options=options,
        moments=moments,
        margins=margins,
    )
    return sum_of_terms(terms, pair_weights)


def loss_terms(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    options: LossOptions,
    moments: Mapping[str, MarginMoments] | None = None,
    margins: Float[Tensor, "P"] | None = None,
) -> Float[Tensor, "K P"]:
    """The terms of that sum, before `pair_weights`: loss_weights[k] * loss_k[p], of each of the K losses named."""
    require_reference(loss_types, reference)
    inputs = LossInputs(policy=policy, reference=reference, options=options, moments=moments or {}, margins=margins)
    return torch.stack(
        [weight * LOSSES[name].function(inputs) for name, weight in zip(loss_types, loss_weights, strict=True)]
    )


def sum_of_terms(terms: Float[Tensor, "K P"], pair_weights: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
    """What `preference_loss` returns, of `loss_terms`."""
    total = terms.sum(0)  # [P]
    return total if pair_weights is None else pair_weights * total


def moments_after(
    moments: Mapping[str, MarginMoments],
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    loss_types: Sequence[str],
    options: LossOptions,
) -> dict[str, MarginMoments]:
    """The moments with one more batch of training, by the names of the losses that read them."""
    after: dict[str, MarginMoments] = {}
    for name in loss_types:
        if (gap := LOSSES[name].gap) is not None:
            gaps = gap(LossInputs(policy=policy, reference=reference, options=options))
            after[name] = moments[name].after(gaps) if name in moments else MarginMoments.of(gaps)
    return after


def implicit_rewards(
    policy: PairLogps, reference: PairLogps | None, loss_types: Sequence[str], options: LossOptions
) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """The policy's implicit rewards of the chosen and the rejected completions, without gradient.

    beta * (log pi_theta(y|x) - log pi_ref(y|x)) (Rafailov et al. 2023, arXiv:2305.18290). Where no loss needs a
    reference: beta * log pi_theta(y|x) / |y| if `simpo` or `orpo` is among them, else beta * log pi_theta(y|x).
    """
    require_reference(loss_types, reference)
    if any(LOSSES[name].needs_reference for name in loss_types):
        chosen, rejected = LossInputs(policy=policy, reference=reference, options=options).log_ratios()
    elif any(LOSSES[name].is_length_averaged for name in loss_types):
        chosen, rejected = policy.means()
    else:
        chosen, rejected = policy.chosen, policy.rejected
    return options.beta * chosen.detach(), options.beta * rejected.detach()
