"""Losses without a reference."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from holdfast.losses.table import LossInputs, loss


@loss("Wang et al. 2024, arXiv:2411.10442", needs_reference=False)
def sft(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-(sum of the log-probs of all chosen tokens of the batch) / (their number), the same for every pair."""
    mean = inputs.policy.chosen_likelihood.sum() / inputs.policy.chosen_lengths.sum()
    return -mean.expand_as(inputs.policy.chosen)


@loss("Meng et al. 2024, Eq. 6, arXiv:2405.14734", "simpo_gamma", needs_reference=False, is_length_averaged=True)
def simpo(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta (log pi_theta(y_w|x) / |y_w| - log pi_theta(y_l|x) / |y_l|) - simpo_gamma)."""
    chosen, rejected = inputs.policy.means()
    return -F.logsigmoid(inputs.options.beta * (chosen - rejected) - inputs.options.simpo_gamma)


@loss("Hong et al. 2024, Eqs. 6 and 7, arXiv:2403.07691", needs_reference=False, is_length_averaged=True)
def orpo(inputs: LossInputs) -> Float[Tensor, "P"]:
    """nll - beta log sigma(log odds_w - log odds_l), odds = p / (1 - p), log p = log pi_theta(y|x) / |y|; nll is `sft`
    and the paper's lambda is beta. log p stops one fp32 step short of 0, where the odds would be infinite."""
    log_p = (mean.clamp(max=-torch.finfo(mean.dtype).eps) for mean in inputs.policy.means())
    chosen, rejected = (value - torch.log(-torch.expm1(value)) for value in log_p)
    return sft(inputs) - inputs.options.beta * F.logsigmoid(chosen - rejected)


@loss("Xu et al. 2024, arXiv:2401.08417", "cpo_alpha", needs_reference=False)
def cpo(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta (log pi_theta(y_w|x) - log pi_theta(y_l|x))) + cpo_alpha * nll, where nll is `sft`."""
    preference = -F.logsigmoid(inputs.options.beta * (inputs.policy.chosen - inputs.policy.rejected))
    return preference + inputs.options.cpo_alpha * sft(inputs)
