"""Losses that compare the policy with a reference.

Most are functions of the margin m alone. Those without `DivergenceOptions` use the log ratio of each completion by
itself, and their papers define no f-divergence for it. See `table` for the notation.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from holdfast.losses.logistic import smoothed_logistic
from holdfast.losses.modifiers import DivergenceOptions, f_divergence_score
from holdfast.losses.options import BetaOptions, SmoothingOptions, number, option
from holdfast.losses.table import LossInputs, loss


@dataclass(kw_only=True)
class SmoothedDivergenceOptions(DivergenceOptions, SmoothingOptions):
    """The options of a loss of the margin that allows for wrong labels."""


def _rewards(inputs: LossInputs[BetaOptions]) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """beta times the log ratios: chosen, rejected."""
    chosen, rejected = inputs.log_ratios()
    return inputs.options.beta * chosen, inputs.options.beta * rejected


def _margin(inputs: LossInputs[DivergenceOptions], *, per_token: bool = False) -> Float[Tensor, "P"]:
    """m = beta (score_w - score_l): log ratios seen through the f-divergence, divided by |y| if `per_token`."""
    chosen, rejected = (f_divergence_score(ratio, inputs.options) for ratio in inputs.log_ratios())
    if per_token:
        chosen, rejected = chosen / inputs.policy.chosen_lengths, rejected / inputs.policy.rejected_lengths
    return inputs.options.beta * (chosen - rejected)


@loss("Rafailov et al. 2023, Eq. 7, arXiv:2305.18290", SmoothedDivergenceOptions, reads_margins=True)
def sigmoid(inputs: LossInputs[SmoothedDivergenceOptions]) -> Float[Tensor, "P"]:
    """-(1 - eps) log sigma(m) - eps log sigma(-m). With eps > 0: conservative DPO (Mitchell 2023)."""
    return smoothed_logistic(inputs.beyond_margin(_margin(inputs)), inputs.options.label_smoothing)


@loss(
    "Zhao et al. 2023, arXiv:2305.10425; on ratios: Liu et al. 2023, arXiv:2309.06657",
    DivergenceOptions,
    reads_margins=True,
)
def hinge(inputs: LossInputs[DivergenceOptions]) -> Float[Tensor, "P"]:
    """max(0, 1 - m)."""
    return F.relu(1.0 - inputs.beyond_margin(_margin(inputs)))


@loss("Azar et al. 2023, Eq. 17, arXiv:2310.12036", DivergenceOptions)
def ipo(inputs: LossInputs[DivergenceOptions]) -> Float[Tensor, "P"]:
    """(score_w / |y_w| - score_l / |y_l| - 1 / (2 beta))^2. The paper's tau is beta; its Eq. 17 has no lengths."""
    return ((_margin(inputs, per_token=True) - 0.5) / inputs.options.beta) ** 2


def _exo_objection(options: SmoothedDivergenceOptions) -> str | None:
    """The labels' own probabilities are 1 - eps and eps, and the loss takes the log of both."""
    if options.label_smoothing == 0:
        return "takes the log of label_smoothing, got 0. Set 1e-3, as its paper recommends."
    return None


@loss("Ji et al. 2024, Eq. 16, arXiv:2402.00856", SmoothedDivergenceOptions, objection=_exo_objection)
def exo_pair(inputs: LossInputs[SmoothedDivergenceOptions]) -> Float[Tensor, "P"]:
    """KL(q || p) of two-way choices, q = (sigma(m), sigma(-m)) and p = (1 - eps, eps), eps > 0."""
    margin, smoothing = _margin(inputs), inputs.options.label_smoothing
    win = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-smoothing))
    return win + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(smoothing))


@loss("Chen et al. 2024, arXiv:2402.05369", BetaOptions)
def nca_pair(inputs: LossInputs[BetaOptions]) -> Float[Tensor, "P"]:
    """-log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l)) / 2."""
    chosen, rejected = _rewards(inputs)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@loss("Chowdhury et al. 2024, arXiv:2403.00409", SmoothedDivergenceOptions, reads_margins=True)
def robust(inputs: LossInputs[SmoothedDivergenceOptions]) -> Float[Tensor, "P"]:
    """(-(1 - eps) log sigma(m) + eps log sigma(-m)) / (1 - 2 eps): unbiased where labels flip with probability eps."""
    margin, smoothing = inputs.beyond_margin(_margin(inputs)), inputs.options.label_smoothing
    noisy = -(1.0 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)
    return noisy / (1.0 - 2.0 * smoothing)


@loss("Jung et al. 2024, arXiv:2404.04656", BetaOptions)
def bco_pair(inputs: LossInputs[BetaOptions]) -> Float[Tensor, "P"]:
    """-log sigma(beta r_w) - log sigma(-beta r_l); the paper's reward shift is left at zero."""
    chosen, rejected = _rewards(inputs)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@loss("Wu et al. 2024, Eq. 4.7, arXiv:2405.00675", BetaOptions)
def sppo_hard(inputs: LossInputs[BetaOptions]) -> Float[Tensor, "P"]:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: the paper's eta is 1 / beta, its win rates are 1 and 0."""
    chosen, rejected = inputs.log_ratios()
    target = 0.5 / inputs.options.beta
    return (chosen - target) ** 2 + (rejected + target) ** 2


@loss("Melnyk et al. 2024, paired, arXiv:2406.05882", SmoothingOptions, sorts_batch=True)
def aot(inputs: LossInputs[SmoothingOptions]) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta (sort(g_theta) - sort(g_ref)) within the batch, g = log pi(y_w|x) - log pi(y_l|x)."""
    assert inputs.reference is not None
    policy = (inputs.policy.chosen - inputs.policy.rejected).sort().values
    reference = (inputs.reference.chosen - inputs.reference.rejected).sort().values
    return smoothed_logistic(inputs.options.beta * (policy - reference), inputs.options.label_smoothing)


@loss("Melnyk et al. 2024, unpaired, arXiv:2406.05882", SmoothingOptions, sorts_batch=True)
def aot_unpaired(inputs: LossInputs[SmoothingOptions]) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta (sort(r_w) - sort(r_l)), within the batch."""
    chosen, rejected = _rewards(inputs)
    return smoothed_logistic(chosen.sort().values - rejected.sort().values, inputs.options.label_smoothing)


@loss("D'Oosterlinck et al. 2024, Eq. 7, arXiv:2408.06266", BetaOptions)
def apo_zero(inputs: LossInputs[BetaOptions]) -> Float[Tensor, "P"]:
    """1 - sigma(beta r_w) + sigma(beta r_l): chosen up, rejected down. The 1 is added so that no loss is negative."""
    chosen, rejected = _rewards(inputs)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@loss("D'Oosterlinck et al. 2024, Eq. 8, arXiv:2408.06266", BetaOptions)
def apo_down(inputs: LossInputs[BetaOptions]) -> Float[Tensor, "P"]:
    """sigma(beta r_w) + 1 - sigma(beta (r_w - r_l)): both down, rejected further. The 1 as in `apo_zero`."""
    chosen, rejected = _rewards(inputs)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@dataclass(kw_only=True)
class DiscopopOptions(DivergenceOptions):
    """The options of `discopop`."""

    discopop_tau: Annotated[float, number("above 0", lambda value: value > 0, "0.05 is the value of its paper.")] = (
        option(0.05, "Temperature of the DiscoPOP loss.")
    )


@loss("Lu et al. 2024, Eq. 5, arXiv:2406.08414", DiscopopOptions)
def discopop(inputs: LossInputs[DiscopopOptions]) -> Float[Tensor, "P"]:
    """-(1 - s) log sigma(m) + s exp(-m), s = sigma(m / discopop_tau)."""
    margin, tau = _margin(inputs), inputs.options.discopop_tau
    # s exp(-m) is formed in the exponent: its factors are 0 and infinity at a large negative margin.
    return torch.exp(F.logsigmoid(margin / tau) - margin) - torch.sigmoid(-margin / tau) * F.logsigmoid(margin)


@loss("Lambert et al. 2024, Eq. 6, arXiv:2411.15124", DivergenceOptions, reads_margins=True)
def sigmoid_norm(inputs: LossInputs[DivergenceOptions]) -> Float[Tensor, "P"]:
    """-log sigma(beta (score_w / |y_w| - score_l / |y_l|))."""
    return -F.logsigmoid(inputs.beyond_margin(_margin(inputs, per_token=True)))


@dataclass(kw_only=True)
class PairwiseOptions(SmoothedDivergenceOptions, DiscopopOptions):
    """The options of all losses of this file."""
