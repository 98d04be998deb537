"""What modifies a loss from outside: f-divergences, LD-DPO, WPO.

None of them is part of a loss. An f-divergence turns a log ratio into a score (`f_divergence_score`). LD-DPO changes
how the log-probs of tokens are summed for a pair (`pair_logps`). WPO multiplies the loss of each pair (`wpo_weights`).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.losses.options import BetaOptions, Options, Rule, choice, is_finite_number, number, option, require_known
from holdfast.losses.table import PairLogps

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
MAX_EXPONENT = 80.0
"""exp(88) is about the largest power of e in fp32. Beyond this exponent a score stays constant."""


@dataclass(kw_only=True)
class DivergenceOptions(BetaOptions):
    """The options of a loss that sees log ratios through an f-divergence."""

    # A divergence says which policy is optimal, so all losses of a sum must share it.
    f_divergence_type: Annotated[str, choice(F_DIVERGENCES, concerns_all_losses=True)] = option(
        "reverse_kl", "Divergence from the reference: reverse_kl, forward_kl, js_divergence or alpha_divergence."
    )
    f_alpha_divergence_coef: Annotated[
        float,
        number(
            "",
            lambda value: True,
            "Choose one between 0 (forward_kl) and 1 (reverse_kl).",
            read_under=("f_divergence_type", "alpha_divergence"),
            other_defaults=(1.0,),
        ),
    ] = option(0.5, "alpha of the alpha-divergence.")


@dataclass(kw_only=True)
class ModifierOptions(Options):
    """The options of modifiers that act before or after the losses."""

    ld_alpha: Annotated[
        float | None,
        Rule(
            allows=lambda value: value is None or (is_finite_number(value) and 0 <= value <= 1),
            demand="must lie in [0, 1]",
            remedy="Use None (or 1) to count all tokens alike.",
        ),
    ] = option(None, "LD-DPO's alpha in [0, 1]: weight of tokens past the shared length.")
    use_weighting: bool = option(False, "Weight pairs by the policy's own likelihood of them (WPO).")


def f_divergence_score(log_ratio: Float[Tensor, "P"], options: DivergenceOptions) -> Float[Tensor, "P"]:
    """f'(t) at t = pi_theta / pi_ref, which takes the place of the log ratio (Wang et al. 2023, arXiv:2309.16240).

    reverse_kl: log t;  forward_kl: 1 - 1/t;  js_divergence: log(2t / (1 + t));  alpha_divergence: (t^(a-1) - 1) / (a-1)
    with a = f_alpha_divergence_coef, one minus the paper's alpha: a = 1 is reverse_kl and a = 0 is forward_kl.
    """
    require_known("f_divergence_type", options.f_divergence_type, F_DIVERGENCES)
    if options.f_divergence_type == "js_divergence":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    fixed_powers = {"reverse_kl": 0.0, "forward_kl": -1.0}
    power = fixed_powers.get(options.f_divergence_type, options.f_alpha_divergence_coef - 1.0)
    if abs(power) < 1e-6:  # the limit, before the quotient loses its digits
        return log_ratio
    return torch.expm1((power * log_ratio).clamp(max=MAX_EXPONENT)) / power


def pair_logps(logps: SequenceLogps, batch: PairBatch, ld_alpha: float | None = None) -> PairLogps:
    """Log-probs of the pairs of `batch`, from those of its sequences.

    With `ld_alpha`, LD-DPO (Liu et al. 2024, arXiv:2409.06411): the sum over the first min(|y_w|, |y_l|) tokens, plus
    ld_alpha times the sum over the others. A completion may then count differently in each of its pairs. The caller
    passes the same `ld_alpha` for policy and reference.
    """
    both = torch.cat([batch.chosen, batch.rejected])
    chosen_lengths, rejected_lengths = logps.lengths()[both].chunk(2)
    chosen_likelihood, rejected = logps.sums()[both].chunk(2)
    chosen = chosen_likelihood
    if ld_alpha is not None:
        is_shared = logps.ranks() < torch.minimum(chosen_lengths, rejected_lengths)[:, None]  # [P N]
        weighted = torch.where(is_shared, logps.per_token, ld_alpha * logps.per_token)
        # Masked sums rather than a matrix product, which some devices round to a 10-bit mantissa.
        chosen = torch.where(logps.sequence == batch.chosen[:, None], weighted, 0.0).sum(1)
        rejected = torch.where(logps.sequence == batch.rejected[:, None], weighted, 0.0).sum(1)
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        chosen_likelihood=chosen_likelihood,
    )


def wpo_weights(logps: SequenceLogps, log_sum_sq_probs: Float[Tensor, "N"], batch: PairBatch) -> Float[Tensor, "P"]:
    """The weight of each pair, w(y_w) * w(y_l), without gradient (WPO, Zhou et al. 2024, Eq. 2, arXiv:2406.11827).

    w(y) = exp(mean over tokens of (log pi(token) - log sum_v pi(v)^2)); `log_sum_sq_probs` is that last term per token.
    """
    aligned = (logps.per_token - log_sum_sq_probs).detach()
    means = logps.segment_sum(aligned) / logps.lengths()  # [S]
    return torch.exp(means[batch.chosen] + means[batch.rejected])
