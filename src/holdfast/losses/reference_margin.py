"""Losses that read the reference's own margin on a pair, Delta_ref = log pi_ref(y_w|x) - log pi_ref(y_l|x).

DPO compares the policy's margin with Delta_ref, whatever that is. These losses ask what it says of the pair: whether
the reference ranks it wrongly (`hypo`), how far it is to be trusted beside a constant margin (`rainbow`), or how far
the policy has moved beside other pairs (`alpha_dpo`, `beta_dpo`). `dpop` keeps the chosen completion from falling
below the reference. See `table` for the notation; Delta_theta is the policy's margin. Given up: f-divergences, since
the papers define none.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from holdfast.losses.logistic import smoothed_logistic
from holdfast.losses.options import BetaOptions, SmoothingOptions, number, option
from holdfast.losses.table import LossInputs, PairLogps, loss


def _differences(logps: PairLogps, *, per_token: bool) -> Float[Tensor, "P"]:
    """log pi(y_w|x) - log pi(y_l|x), nats; each divided by its number of tokens if `per_token`."""
    chosen, rejected = logps.means() if per_token else (logps.chosen, logps.rejected)
    return chosen - rejected


def _both_differences(
    inputs: LossInputs[BetaOptions], *, per_token: bool = False
) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """Delta_theta and Delta_ref, nats."""
    assert inputs.reference is not None
    return _differences(inputs.policy, per_token=per_token), _differences(inputs.reference, per_token=per_token)


# --- the reference where it ranks a pair wrongly ----------------------------------------------------------------------


@loss("Yuan et al. 2026, arXiv:2602.11902", SmoothingOptions, reads_margins=True)
def hypo(inputs: LossInputs[SmoothingOptions]) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta (Delta_theta - max(0, Delta_ref)): a reference that ranks the pair wrongly counts as
    one that has no opinion, so the policy is not done when it is merely less wrong."""
    policy, reference = _both_differences(inputs)
    margin = inputs.beyond_margin(inputs.options.beta * (policy - F.relu(reference)))
    return smoothed_logistic(margin, inputs.options.label_smoothing)


@loss("Yuan et al. 2026, per token, arXiv:2602.11902", SmoothingOptions, reads_margins=True)
def hypo_norm(inputs: LossInputs[SmoothingOptions]) -> Float[Tensor, "P"]:
    """As `hypo`, with log-probs per token in both margins."""
    policy, reference = _both_differences(inputs, per_token=True)
    margin = inputs.beyond_margin(inputs.options.beta * (policy - F.relu(reference)))
    return smoothed_logistic(margin, inputs.options.label_smoothing)


@dataclass(kw_only=True)
class DpopOptions(SmoothingOptions):
    """The options of `dpop`."""

    dpop_lambda: Annotated[
        float, number("of at least 0", lambda value: value >= 0, "50 is the value of its paper.")
    ] = option(50.0, "Weight of DPOP's penalty on a chosen completion that falls below the reference.")


@loss("Pal et al. 2024, arXiv:2402.13228", DpopOptions, reads_margins=True)
def dpop(inputs: LossInputs[DpopOptions]) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta (r_w - r_l - dpop_lambda max(0, -r_w)): falling below the reference on the chosen
    completion costs margin."""
    chosen, rejected = inputs.log_ratios()
    margin = inputs.options.beta * (chosen - rejected - inputs.options.dpop_lambda * F.relu(-chosen))
    return smoothed_logistic(inputs.beyond_margin(margin), inputs.options.label_smoothing)


# --- the reference beside a constant margin ---------------------------------------------------------------------------


@dataclass(kw_only=True)
class RainbowOptions(SmoothingOptions):
    """The options of `rainbow`."""

    rainbow_alpha: Annotated[
        float, number("in [0, 1]", lambda value: 0 <= value <= 1, "0 is `simpo`, 1 is `sigmoid_norm`.")
    ] = option(0.25, "Share of the reference in RainbowPO's mix with a constant margin.")
    rainbow_gamma: Annotated[
        float, number("of at least 0", lambda value: value >= 0, "Use 0 for no target margin.")
    ] = option(0.5, "Constant margin in RainbowPO's mix, in units of beta times nats per token.")


@loss("Zhao et al. 2024, arXiv:2410.04203", RainbowOptions, reads_margins=True)
def rainbow(inputs: LossInputs[RainbowOptions]) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta Delta_theta - (a beta Delta_ref + (1 - a) rainbow_gamma), a = rainbow_alpha, per
    token: the log-probs of a reference pi_ref^a pi_gamma^(1-a), where pi_gamma prefers y_w by rainbow_gamma on every
    pair. a = 1 is `sigmoid_norm`, a = 0 is `simpo`."""
    policy, reference = _both_differences(inputs, per_token=True)
    options = inputs.options
    target = options.rainbow_alpha * options.beta * reference + (1.0 - options.rainbow_alpha) * options.rainbow_gamma
    return smoothed_logistic(inputs.beyond_margin(options.beta * policy - target), options.label_smoothing)


# --- a pair beside the others -----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class AlphaDpoOptions(SmoothingOptions):
    """The options of `alpha_dpo`."""

    alpha_dpo_alpha: Annotated[
        float,
        number("of at least 0", lambda value: value >= 0, "Its authors use 0.05 to 0.2 times beta; 0 is `simpo`."),
    ] = option(0.1, "How much of a pair's standardised margin AlphaDPO adds to its target.")
    alpha_dpo_gamma: Annotated[
        float, number("of at least 0", lambda value: value >= 0, "Use 0 for no target margin.")
    ] = option(0.5, "Constant part of AlphaDPO's target margin, in units of beta times nats per token.")


def _gap_per_token(inputs: LossInputs[BetaOptions]) -> Float[Tensor, "P"]:
    """Delta_theta - Delta_ref per token, without gradient."""
    policy, reference = _both_differences(inputs, per_token=True)
    return (policy - reference).detach()


@loss("Wu et al. 2024, arXiv:2410.10148", AlphaDpoOptions, couples_pairs=True, least_pairs=2, gap=_gap_per_token)
def alpha_dpo(inputs: LossInputs[AlphaDpoOptions]) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta Delta_theta - sg[alpha_dpo_gamma + alpha_dpo_alpha M*], per token, sg without
    gradient. M* = (M - mean M) / std M, where M = Delta_theta - Delta_ref, per token; mean and deviation are
    `MarginMoments`. alpha_dpo_alpha = 0 is `simpo`."""
    options, gaps = inputs.options, _gap_per_token(inputs)
    target = options.alpha_dpo_gamma + options.alpha_dpo_alpha * inputs.moments_of("alpha_dpo", gaps).standardised(gaps)
    margin = options.beta * _differences(inputs.policy, per_token=True) - target
    return smoothed_logistic(margin, options.label_smoothing)


@dataclass(kw_only=True)
class BetaDpoOptions(BetaOptions):
    """The options of `beta_dpo`."""

    beta_dpo_alpha: Annotated[
        float, number("of at least 0", lambda value: value >= 0, "Its paper uses 0.6; 0 is a constant beta.")
    ] = option(0.6, "How much beta-DPO raises beta for each nat by which a batch's margin exceeds the usual one.")
    beta_dpo_share: Annotated[
        float, number("above 0, at most 1", lambda value: 0 < value <= 1, "Its paper uses 0.8; 1 keeps all pairs.")
    ] = option(0.8, "Share of a batch's pairs that beta-DPO trains on, drawn by how usual their margins are.")


def _gap(inputs: LossInputs[BetaOptions]) -> Float[Tensor, "P"]:
    """Delta_theta - Delta_ref, nats, without gradient."""
    policy, reference = _both_differences(inputs)
    return (policy - reference).detach()


_LEAST_BETA = 1e-3


@loss("Wu et al. 2024, arXiv:2407.08639", BetaDpoOptions, couples_pairs=True, gap=_gap)
def beta_dpo(inputs: LossInputs[BetaDpoOptions]) -> Float[Tensor, "P"]:
    """-log sigma(b (Delta_theta - Delta_ref)), b = beta (1 + beta_dpo_alpha (mean M - M_0)) and at least 1e-3, where
    M = Delta_theta - Delta_ref without gradient, its mean runs over the batch, and M_0 is the mean of `MarginMoments`.

    In training only beta_dpo_share of the pairs count, drawn without replacement with weights exp(-M*^2 / 2), M* as in
    `alpha_dpo`; mean M is theirs, and so is the mean of the loss: a pair that was not drawn has the value 0, the others
    are multiplied by pairs / drawn pairs. M is in nats, without beta, as in the authors' code.
    """
    options, gaps = inputs.options, _gap(inputs)
    moments = inputs.moments_of("beta_dpo", gaps)
    weights = torch.ones_like(gaps)
    if inputs.policy.chosen.requires_grad and options.beta_dpo_share < 1:
        weights = _drawn(-0.5 * moments.standardised(gaps) ** 2, options.beta_dpo_share, seed=moments.num_updates)
    beta = options.beta * (1.0 + options.beta_dpo_alpha * ((weights * gaps).mean() - moments.mean))
    policy, reference = _both_differences(inputs)
    return -weights * F.logsigmoid(beta.clamp(min=_LEAST_BETA) * (policy - reference))


def _drawn(log_weights: Float[Tensor, "P"], share: float, *, seed: int) -> Float[Tensor, "P"]:
    """pairs / k for k pairs that are drawn without replacement, 0 for the others; k is the share of the pairs, at least
    one. The pairs with the largest log weight plus Gumbel noise are such a draw (Kool et al. 2019, arXiv:1903.06059).
    The noise depends on the seed and a pair's place alone, so every process draws the same pairs."""
    num_pairs, device = len(log_weights), log_weights.device
    num_drawn = max(1, round(share * num_pairs))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(num_pairs, pin_memory=device.type == "cuda").exponential_(generator=generator)
    keys = log_weights - noise.to(device, non_blocking=True).log()
    return torch.zeros_like(log_weights).index_fill(0, keys.topk(num_drawn).indices, num_pairs / num_drawn)


@dataclass(kw_only=True)
class ReferenceMarginOptions(DpopOptions, RainbowOptions, AlphaDpoOptions, BetaDpoOptions):
    """The options of all losses of this file."""
