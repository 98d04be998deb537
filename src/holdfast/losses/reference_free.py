"""Losses that read the policy's log-probs alone: no reference is built or read.

`sft`, the likelihood term, is a loss of its own and a term of `orpo` and `cpo`. See `table` for the notation.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from holdfast.losses.options import BetaOptions, Options, number, option
from holdfast.losses.table import LossInputs, loss


@loss("Wang et al. 2024, arXiv:2411.10442", Options, needs_reference=False, couples_pairs=True)
def sft(inputs: LossInputs[Options]) -> Float[Tensor, "P"]:
    """-(sum of the log-probs of all chosen tokens of the batch) / (their number), the same for every pair."""
    mean = inputs.policy.chosen_likelihood.sum() / inputs.policy.chosen_lengths.sum()
    return -mean.expand_as(inputs.policy.chosen)


@dataclass(kw_only=True)
class SimpoOptions(BetaOptions):
    """The options of `simpo`."""

    simpo_gamma: Annotated[float, number("of at least 0", lambda value: value >= 0, "Use 0 for no target margin.")] = (
        option(0.5, "Target margin of the SimPO loss.")
    )


@loss(
    "Meng et al. 2024, Eq. 6, arXiv:2405.14734",
    SimpoOptions,
    needs_reference=False,
    is_length_averaged=True,
    reads_margins=True,
)
def simpo(inputs: LossInputs[SimpoOptions]) -> Float[Tensor, "P"]:
    """-log sigma(beta (log pi_theta(y_w|x) / |y_w| - log pi_theta(y_l|x) / |y_l|) - simpo_gamma)."""
    chosen, rejected = inputs.policy.means()
    margin = inputs.options.beta * (chosen - rejected) - inputs.options.simpo_gamma
    return -F.logsigmoid(inputs.beyond_margin(margin))


@loss(
    "Hong et al. 2024, Eqs. 6 and 7, arXiv:2403.07691",
    BetaOptions,
    needs_reference=False,
    is_length_averaged=True,
    couples_pairs=True,
)
def orpo(inputs: LossInputs[BetaOptions]) -> Float[Tensor, "P"]:
    """nll - beta log sigma(log odds_w - log odds_l), odds = p / (1 - p), log p = log pi_theta(y|x) / |y|; nll is `sft`
    and the paper's lambda is beta. log p stops one fp32 step short of 0, where the odds would be infinite."""
    log_p = (mean.clamp(max=-torch.finfo(mean.dtype).eps) for mean in inputs.policy.means())
    chosen, rejected = (value - torch.log(-torch.expm1(value)) for value in log_p)
    return sft(inputs) - inputs.options.beta * F.logsigmoid(chosen - rejected)


@dataclass(kw_only=True)
class CpoOptions(BetaOptions):
    """The options of `cpo`."""

    cpo_alpha: Annotated[float, number("of at least 0", lambda value: value >= 0, "Use 0 for no likelihood term.")] = (
        option(1.0, "Weight of the likelihood term in the CPO loss.")
    )


@loss("Xu et al. 2024, arXiv:2401.08417", CpoOptions, needs_reference=False, couples_pairs=True)
def cpo(inputs: LossInputs[CpoOptions]) -> Float[Tensor, "P"]:
    """-log sigma(beta (log pi_theta(y_w|x) - log pi_theta(y_l|x))) + cpo_alpha * nll, where nll is `sft`."""
    preference = -F.logsigmoid(inputs.options.beta * (inputs.policy.chosen - inputs.policy.rejected))
    return preference + inputs.options.cpo_alpha * sft(inputs)


@dataclass(kw_only=True)
class ReferenceFreeOptions(SimpoOptions, CpoOptions):
    """The options of all losses of this file."""
