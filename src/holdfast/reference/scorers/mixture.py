"""Several references as one: the log-linear mixture of their log-probs.

    log pi_ref(y|x) = sum_i w_i log pi_i(y|x) - log Z(x),    w_i > 0,  sum_i w_i = 1

This is the reference that maximising a reward under a weighted sum of reverse KL divergences, one to each pi_i, comes
down to: their escort distribution (Aminian et al. 2025, arXiv:2502.01203). MRPO (Le et al. 2024, arXiv:2405.16388) is
something else: a surrogate of that objective with an aggregated reference of its own, clipped around the first.

`Z(x)` sums over all completions, so nobody knows it. It cancels where a loss reads the two completions of a prompt only
by the difference of their log ratios; every other use of a mixture is refused, since its numbers would be silently
wrong. Given up: those losses, and the level of the logged rewards, which lies the same `-beta log Z(x) >= 0` too high
for both completions (margins and accuracies are exact). Costs what the references cost together.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.losses import LOSSES, LossInputs, LossOptions, PairLogps
from holdfast.reference.base import Scorer
from holdfast.reference.identity.identity import Identity


@final
class MixtureReference(Scorer):
    """The mixture of `references`, each with its share (see `mixture_shares`); fixed.

    At most one of them may be inside the policy: two would take turns in the same module.
    """

    kind = "MixtureReference"

    def __init__(self, references: Sequence[Scorer], shares: Sequence[float]) -> None:
        self.references = tuple(references)
        self.shares = tuple(mixture_shares(shares, len(self.references)))
        self.comes_from_afar = any(reference.comes_from_afar for reference in self.references)

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`; up to the constant `-log Z(x)` of each prompt."""
        per_token = torch.zeros_like(batch.target, dtype=torch.float32)
        for share, reference in zip(self.shares, self.references, strict=True):
            per_token = per_token + share * reference.logps(batch).per_token
        return SequenceLogps(per_token=per_token, sequence=batch.sequence, num_sequences=batch.num_sequences)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """See `Scorer.in_place`: all of them."""
        with contextlib.ExitStack() as stack:
            for reference in self.references:
                stack.enter_context(reference.in_place())
            yield

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of reference i under `<i>.<name>`."""
        for number, reference in enumerate(self.references):
            yield from ((f"{number}.{name}", tensor) for name, tensor in reference.tensors())

    def identity(self) -> Identity:
        """That of all of them, with their shares, in order."""
        return Identity.mixture([reference.identity() for reference in self.references], self.shares)

    def describe(self, when: str) -> str:
        """See `Scorer.describe`; each with its share."""
        parts = (
            f"{share:g} * ({reference.describe(when)})"
            for share, reference in zip(self.shares, self.references, strict=True)
        )
        return f"the log-linear mixture {' + '.join(parts)}"


def mixture_shares(weights: Sequence[float] | None, num_references: int) -> list[float]:
    """One weight per reference: `weights`, or equal ones where that is None. ValueError where they are not as many, or
    not positive, or do not sum to 1 (to 1e-5)."""
    if weights is None:
        return [1 / num_references] * num_references
    check_weights(weights)
    if len(weights) != num_references:
        raise ValueError(
            f"ref_model_weights={list(weights)} was asked for: {len(weights)} weights, but `ref_model` names "
            f"{num_references} references. Give one weight for each of them, in order."
        )
    return list(weights)


def check_weights(weights: Sequence[float]) -> None:
    """ValueError where `weights` are not positive, or do not sum to 1 (to 1e-5)."""
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(
            f"ref_model_weights={list(weights)} was asked for; the weights of a mixture are positive numbers. Leave a "
            "reference that should not count out of `ref_model`."
        )
    total = math.fsum(weights)
    if abs(total - 1) > 1e-5:
        rescaled = [round(weight / total, 6) for weight in weights]
        raise ValueError(
            f"ref_model_weights={list(weights)} was asked for, which sum to {total:g}: the mixture would be sharper or "
            f"flatter than the references themselves. Use {rescaled}; beta is the strength of the pull."
        )


def check_mixture(loss_types: Sequence[str], options: LossOptions, ld_alpha: float | None) -> None:
    """ValueError where a loss is not the same for all values of `Z(x)`, so that a mixture of references, which is known
    up to that, would give it wrong numbers. LD-DPO is refused as well: of a mixture only whole completions are known,
    not how their log-prob is made up of tokens."""
    fit = [name for name, loss in LOSSES.items() if loss.needs_reference and is_normaliser_free(name, LossOptions())]
    for name in loss_types:
        if not is_normaliser_free(name, options):
            how = f" with f_divergence_type={options.f_divergence_type!r}" if name in fit else ""
            raise ValueError(
                f"Several references were given as `ref_model` together with loss_type {name!r}{how}. The log-prob of "
                "their mixture is known up to a constant per prompt, which does not cancel there. Use a loss that "
                f"reads the difference of the two log ratios only ({', '.join(fit)}, with reverse_kl), or a single "
                "`ref_model`."
            )
    if ld_alpha is not None:
        raise ValueError(
            f"Several references were given as `ref_model` together with ld_alpha={ld_alpha}, which weights the tokens "
            "of a completion apart; of their mixture only the log-prob of a whole completion is known, up to a "
            "constant. Set ld_alpha=None, or use a single `ref_model`."
        )


def is_normaliser_free(name: str, options: LossOptions) -> bool:
    """Whether the loss stays the same when a constant per prompt is added to the reference's log-probs of both
    completions, under the f-divergence of `options`. Found by trying: no list of losses to keep up to date."""
    options = replace(
        LossOptions(beta=0.3, label_smoothing=0.1),
        f_divergence_type=options.f_divergence_type,
        f_alpha_divergence_coef=options.f_alpha_divergence_coef,
    )
    constant = torch.tensor([0.5, -1.0, 2.0, 0.01], dtype=torch.float64)
    policy = _probe([-5.0, -9.0, -4.0, -7.0], [-6.0, -5.0, -8.0, -7.5])
    plain = _probe([-5.5, -8.0, -6.0, -7.01], [-6.5, -6.0, -7.0, -7.52])
    shifted = replace(plain, chosen=plain.chosen + constant, rejected=plain.rejected + constant)
    before, after = (
        LOSSES[name].function(LossInputs(policy=policy, reference=reference, options=options))
        for reference in (plain, shifted)
    )
    return torch.allclose(before, after, rtol=1e-9, atol=1e-12)


def _probe(chosen: list[float], rejected: list[float]) -> PairLogps:
    """Pairs of completions of unlike lengths, in fp64."""
    return PairLogps(
        chosen=torch.tensor(chosen, dtype=torch.float64),
        rejected=torch.tensor(rejected, dtype=torch.float64),
        chosen_lengths=torch.tensor([3, 5, 2, 4]),
        rejected_lengths=torch.tensor([4, 3, 6, 5]),
        chosen_likelihood=torch.tensor(chosen, dtype=torch.float64),
    )
