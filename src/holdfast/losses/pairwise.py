"""Losses that compare with a reference."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from holdfast.losses.modifiers import f_divergence_score
from holdfast.losses.table import LossInputs, loss


def rewards_of(inputs: LossInputs) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """beta times the log ratios: chosen, rejected."""
    chosen, rejected = inputs.log_ratios()
    return inputs.options.beta * chosen, inputs.options.beta * rejected


def margin_of(inputs: LossInputs, *, per_token: bool = False) -> Float[Tensor, "P"]:
    """m = beta (score_w - score_l): log ratios seen through the f-divergence, divided by |y| if `per_token`."""
    chosen, rejected = (f_divergence_score(ratio, inputs.options) for ratio in inputs.log_ratios())
    if per_token:
        chosen, rejected = chosen / inputs.policy.chosen_lengths, rejected / inputs.policy.rejected_lengths
    return inputs.options.beta * (chosen - rejected)


def _smoothed_logistic(margin: Tensor, smoothing: float) -> Tensor:
    """-(1 - eps) log sigma(margin) - eps log sigma(-margin)."""
    return -(1.0 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


@loss("Rafailov et al. 2023, Eq. 7, arXiv:2305.18290", "f_divergence_type", "label_smoothing")
def sigmoid(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-(1 - eps) log sigma(m) - eps log sigma(-m). With eps > 0: conservative DPO (Mitchell 2023)."""
    return _smoothed_logistic(margin_of(inputs), inputs.options.label_smoothing)


@loss("Zhao et al. 2023, arXiv:2305.10425; on ratios: Liu et al. 2023, arXiv:2309.06657", "f_divergence_type")
def hinge(inputs: LossInputs) -> Float[Tensor, "P"]:
    """max(0, 1 - m)."""
    return F.relu(1.0 - margin_of(inputs))


@loss("Azar et al. 2023, Eq. 17, arXiv:2310.12036", "f_divergence_type")
def ipo(inputs: LossInputs) -> Float[Tensor, "P"]:
    """(score_w / |y_w| - score_l / |y_l| - 1 / (2 beta))^2. The paper's tau is beta; its Eq. 17 has no lengths."""
    return ((margin_of(inputs, per_token=True) - 0.5) / inputs.options.beta) ** 2


@loss("Ji et al. 2024, Eq. 16, arXiv:2402.00856", "f_divergence_type", "label_smoothing")
def exo_pair(inputs: LossInputs) -> Float[Tensor, "P"]:
    """KL(q || p) of two-way choices, q = (sigma(m), sigma(-m)) and p = (1 - eps, eps), eps > 0."""
    margin, smoothing = margin_of(inputs), inputs.options.label_smoothing
    win = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-smoothing))
    return win + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(smoothing))


@loss("Chen et al. 2024, arXiv:2402.05369")
def nca_pair(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l)) / 2."""
    chosen, rejected = rewards_of(inputs)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@loss("Chowdhury et al. 2024, arXiv:2403.00409", "f_divergence_type", "label_smoothing")
def robust(inputs: LossInputs) -> Float[Tensor, "P"]:
    """(-(1 - eps) log sigma(m) + eps log sigma(-m)) / (1 - 2 eps): unbiased where labels flip with probability eps."""
    margin, smoothing = margin_of(inputs), inputs.options.label_smoothing
    noisy = -(1.0 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)
    return noisy / (1.0 - 2.0 * smoothing)


@loss("Jung et al. 2024, arXiv:2404.04656")
def bco_pair(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta r_w) - log sigma(-beta r_l); the paper's reward shift is left at zero."""
    chosen, rejected = rewards_of(inputs)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@loss("Wu et al. 2024, Eq. 4.7, arXiv:2405.00675")
def sppo_hard(inputs: LossInputs) -> Float[Tensor, "P"]:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: the paper's eta is 1 / beta, its win rates are 1 and 0."""
    chosen, rejected = inputs.log_ratios()
    target = 0.5 / inputs.options.beta
    return (chosen - target) ** 2 + (rejected + target) ** 2


@loss("Melnyk et al. 2024, paired, arXiv:2406.05882", "label_smoothing", sorts_batch=True)
def aot(inputs: LossInputs) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta (sort(g_theta) - sort(g_ref)) within the batch, g = log pi(y_w|x) - log pi(y_l|x)."""
    assert inputs.reference is not None
    policy = (inputs.policy.chosen - inputs.policy.rejected).sort().values
    reference = (inputs.reference.chosen - inputs.reference.rejected).sort().values
    return _smoothed_logistic(inputs.options.beta * (policy - reference), inputs.options.label_smoothing)


@loss("Melnyk et al. 2024, unpaired, arXiv:2406.05882", "label_smoothing", sorts_batch=True)
def aot_unpaired(inputs: LossInputs) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta (sort(r_w) - sort(r_l)), within the batch."""
    chosen, rejected = rewards_of(inputs)
    return _smoothed_logistic(chosen.sort().values - rejected.sort().values, inputs.options.label_smoothing)


@loss("D'Oosterlinck et al. 2024, Eq. 7, arXiv:2408.06266")
def apo_zero(inputs: LossInputs) -> Float[Tensor, "P"]:
    """1 - sigma(beta r_w) + sigma(beta r_l): chosen up, rejected down. The 1 is added so that no loss is negative."""
    chosen, rejected = rewards_of(inputs)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@loss("D'Oosterlinck et al. 2024, Eq. 8, arXiv:2408.06266")
def apo_down(inputs: LossInputs) -> Float[Tensor, "P"]:
    """sigma(beta r_w) + 1 - sigma(beta (r_w - r_l)): both down, rejected further. The 1 as in `apo_zero`."""
    chosen, rejected = rewards_of(inputs)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@loss("Lu et al. 2024, Eq. 5, arXiv:2406.08414", "f_divergence_type", "discopop_tau")
def discopop(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-(1 - s) log sigma(m) + s exp(-m), s = sigma(m / discopop_tau)."""
    margin, tau = margin_of(inputs), inputs.options.discopop_tau
    # s exp(-m) is formed in the exponent: its factors are 0 and infinity at a large negative margin.
    return torch.exp(F.logsigmoid(margin / tau) - margin) - torch.sigmoid(-margin / tau) * F.logsigmoid(margin)


@loss("Lambert et al. 2024, Eq. 6, arXiv:2411.15124", "f_divergence_type")
def sigmoid_norm(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta (score_w / |y_w| - score_l / |y_l|))."""
    return -F.logsigmoid(margin_of(inputs, per_token=True))
