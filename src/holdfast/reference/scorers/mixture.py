"""Several references as one: the log-linear mixture of their log-probs.

    log pi_ref(y|x) = sum_i w_i log pi_i(y|x) - log Z(x),    w_i > 0,  sum_i w_i = 1

A reward that is maximised under a weighted sum of reverse KL divergences, one to each pi_i, has the same optimum as
under one divergence to this mixture, the escort distribution (Aminian et al. 2025, arXiv:2502.01203). MRPO (Le et al.
2024, arXiv:2405.16388) is another method: a surrogate of that objective, whose aggregated reference is clipped around
the first model.

`Z(x)` is a sum over all completions and is unknown. It cancels where a loss reads the two completions of a prompt only
by the difference of their log ratios. Every other loss is refused, since its numbers would be silently wrong.

Given up: those losses, and the level of the logged rewards. Both completions' rewards are too high by the same
`-beta log Z(x) >= 0`; margins and accuracies are exact. The mixture costs what its references cost together.
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
from holdfast.reference.base import Scorer, Share
from holdfast.reference.identity.identity import Identity


@final
class MixtureReference(Scorer):
    """The mixture of `references`, each with its share (see `mixture_shares`); fixed.

    At most one of them may be inside the policy, since the policy's module computes as one reference at a time.
    """

    kind = "MixtureReference"
    sums_states = False  # several models have as many hidden states

    def __init__(self, references: Sequence[Scorer], shares: Sequence[float]) -> None:
        self.references = self.parts = tuple(references)
        self.shares = tuple(mixture_shares(shares, len(self.references)))
        self.is_off_device = any(reference.is_off_device for reference in self.references)

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`. The constant `-log Z(x)` of each prompt is left out."""
        per_token = torch.zeros_like(batch.target, dtype=torch.float32)
        for share, reference in zip(self.shares, self.references, strict=True):
            per_token = per_token + share * reference.logps(batch).per_token
        return SequenceLogps(per_token=per_token, sequence=batch.sequence, num_sequences=batch.num_sequences)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """See `Scorer.in_place`: the weights of all references are."""
        with contextlib.ExitStack() as stack:
            for reference in self.references:
                stack.enter_context(reference.in_place())
            yield

    def models(self) -> Sequence[Share]:
        """See `Scorer.models`: those of all references."""
        return [
            (share * own, model)
            for share, reference in zip(self.shares, self.references, strict=True)
            for own, model in reference.models()
        ]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: those of reference i, under `<i>.<name>`."""
        for number, reference in enumerate(self.references):
            yield from ((f"{number}.{name}", tensor) for name, tensor in reference.tensors())

    def identity(self) -> Identity:
        """See `Scorer.identity`: the identities of all references with their shares, in order."""
        return Identity.mixture([reference.identity() for reference in self.references], self.shares)

    def describe(self, when: str) -> str:
        """See `Scorer.describe`: each reference with its share."""
        terms = (
            f"{share:g} * ({reference.describe(when)})"
            for share, reference in zip(self.shares, self.references, strict=True)
        )
        return f"the log-linear mixture {' + '.join(terms)}"


def mixture_shares(shares: Sequence[float] | None, num_references: int) -> list[float]:
    """One share per reference: `shares`, or equal ones where that is None. ValueError where there are more or fewer
    than references, where one is not positive, or where they do not sum to 1 (to 1e-5)."""
    if shares is None:
        return [1 / num_references] * num_references
    check_shares(shares)
    if len(shares) != num_references:
        raise ValueError(
            f"ref_model_weights={list(shares)} was asked for: {len(shares)} weights, but `ref_model` names "
            f"{num_references} references. Give one weight for each of them, in order."
        )
    return list(shares)


def check_shares(shares: Sequence[float]) -> None:
    """ValueError where a share is not positive, or where the shares do not sum to 1 (to 1e-5)."""
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares):
        raise ValueError(
            f"ref_model_weights={list(shares)} was asked for; the weights of a mixture are positive numbers. Leave a "
            "reference that should not count out of `ref_model`."
        )
    total = math.fsum(shares)
    if abs(total - 1) > 1e-5:
        rescaled = [round(share / total, 6) for share in shares]
        raise ValueError(
            f"ref_model_weights={list(shares)} was asked for, which sum to {total:g}: the mixture would be sharper or "
            f"flatter than the references themselves. Use {rescaled}; beta is the strength of the pull."
        )


def check_mixture(loss_types: Sequence[str], options: LossOptions, ld_alpha: float | None) -> None:
    """ValueError where the value of a loss depends on `Z(x)`, which is unknown.

    LD-DPO (`ld_alpha`) is refused as well. It weights single tokens, and the mixture is known for whole completions
    only.
    """
    usable = [name for name, loss in LOSSES.items() if loss.needs_reference and is_normaliser_free(name, LossOptions())]
    for name in loss_types:
        if not is_normaliser_free(name, options):
            clause = f" with f_divergence_type={options.f_divergence_type!r}" if name in usable else ""
            raise ValueError(
                f"Several references were given as `ref_model` together with loss_type {name!r}{clause}. The log-prob "
                "of their mixture is known up to a constant per prompt, which does not cancel there. Use a loss that "
                f"reads the difference of the two log ratios only ({', '.join(usable)}, with reverse_kl), or a single "
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
    completions, under the f-divergence of `options`. The loss is computed twice on a few pairs, so that there is no
    list of losses to maintain."""
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
    """Four pairs of completions of different lengths, in fp64."""
    return PairLogps(
        chosen=torch.tensor(chosen, dtype=torch.float64),
        rejected=torch.tensor(rejected, dtype=torch.float64),
        chosen_lengths=torch.tensor([3, 5, 2, 4]),
        rejected_lengths=torch.tensor([4, 3, 6, 5]),
        chosen_likelihood=torch.tensor(chosen, dtype=torch.float64),
    )
