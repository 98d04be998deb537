"""The preference losses: pure functions from the log-probs of pairs to one loss per pair, in one table, `LOSSES`.

Every loss reads one small record, `LossInputs`, and is a few lines beside its equation, to be compared with numbers
worked by hand. Modifiers are no arms of the losses: LD-DPO acts where sequences become pairs (`pair_logps`),
f-divergences where log ratios become scores (`LossInputs.margin`), WPO as a factor per pair. Given up: a mean inside
the loss (callers weight and reduce), and a check of the options on every step (`check_losses` is for configuration).

Notation: P pairs, N completion tokens, S sequences; w chosen, l rejected; r = log pi_theta - log pi_ref (nats),
d = score_w - score_l, m = beta d, eps = label_smoothing, sigma the logistic function.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.batch import PairBatch, SequenceLogps

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
MAX_EXPONENT = 80.0  # exp(88) is the largest power of e in fp32; a score stays flat beyond this one
DIVERGENCE, SMOOTHING = "f_divergence_type", "label_smoothing"
LossFunction = Callable[["LossInputs"], Tensor]
LOSSES: dict[str, "Loss"] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """Log-probs (nats, fp32) of the two completions of each pair, in pair order, and how many tokens were scored.

    `chosen` and `rejected` are log pi(y|x) after the LD-DPO modifier, if any; `chosen_likelihood` is without it.
    """

    chosen: Float[Tensor, "P"]
    rejected: Float[Tensor, "P"]
    chosen_lengths: Int[Tensor, "P"]
    rejected_lengths: Int[Tensor, "P"]
    chosen_likelihood: Float[Tensor, "P"]

    def means(self) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """Log-probs per token, nats: chosen, rejected."""
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """The numbers that losses read, named as in `DPOConfig`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss reads. `reference` is None only where no loss of the run needs one."""

    policy: PairLogps
    reference: PairLogps | None
    options: LossOptions

    def log_ratios(self) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """log pi_theta(y|x) - log pi_ref(y|x), nats: chosen, rejected."""
        assert self.reference is not None
        return self.policy.chosen - self.reference.chosen, self.policy.rejected - self.reference.rejected

    def rewards(self) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """beta times the log ratios: chosen, rejected."""
        chosen, rejected = self.log_ratios()
        return self.options.beta * chosen, self.options.beta * rejected

    def margin(self, *, per_token: bool = False) -> Float[Tensor, "P"]:
        """m = beta (score_w - score_l): log ratios seen through the f-divergence, divided by |y| if `per_token`."""
        chosen, rejected = (f_divergence_score(ratio, self.options) for ratio in self.log_ratios())
        if per_token:
            chosen, rejected = chosen / self.policy.chosen_lengths, rejected / self.policy.rejected_lengths
        return self.options.beta * (chosen - rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss, where it comes from, and what matters for combining it. Every loss reads beta, except `sft`."""

    function: LossFunction
    paper: str
    reads: tuple[str, ...] = ()  # the other options that change its value
    needs_reference: bool = True
    is_length_averaged: bool = False  # without a reference, it compares log-probs per token
    sorts_batch: bool = False  # its k-th value belongs to rank k, not to pair k


def _loss(paper: str, *reads: str, **facts: bool) -> Callable[[LossFunction], LossFunction]:
    """Enters the decorated function into `LOSSES`, under its own name."""

    def enter(function: LossFunction) -> LossFunction:
        LOSSES[function.__name__] = Loss(function=function, paper=paper, reads=reads, **facts)
        return function

    return enter


def pair_logps(logps: SequenceLogps, batch: PairBatch, ld_alpha: float | None = None) -> PairLogps:
    """Log-probs of the pairs of `batch`, from those of its sequences.

    With `ld_alpha`, LD-DPO (Liu et al. 2024, arXiv:2409.06411): sum of the first min(|y_w|, |y_l|) tokens + ld_alpha *
    sum of the others, so a completion may count differently in each of its pairs. Apply to policy and reference alike.
    """
    sums, lengths = logps.sums(), logps.lengths()
    chosen_lengths, rejected_lengths = lengths[batch.chosen], lengths[batch.rejected]
    chosen, rejected = sums[batch.chosen], sums[batch.rejected]
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
        chosen_likelihood=sums[batch.chosen],
    )


def f_divergence_score(log_ratio: Float[Tensor, "P"], options: LossOptions) -> Float[Tensor, "P"]:
    """f'(t) at t = pi_theta / pi_ref, which takes the place of the log ratio (Wang et al. 2023, arXiv:2309.16240).

    reverse_kl: log t;  forward_kl: 1 - 1/t;  js_divergence: log(2t / (1 + t));  alpha_divergence: (t^(a-1) - 1) / (a-1)
    with a = f_alpha_divergence_coef, one minus the paper's alpha: a = 1 is reverse_kl and a = 0 is forward_kl.
    """
    _require_known("f_divergence_type", options.f_divergence_type, F_DIVERGENCES)
    if options.f_divergence_type == "js_divergence":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    fixed_powers = {"reverse_kl": 0.0, "forward_kl": -1.0}
    power = fixed_powers.get(options.f_divergence_type, options.f_alpha_divergence_coef - 1.0)
    if abs(power) < 1e-6:  # the limit, before the quotient loses its digits
        return log_ratio
    return torch.expm1((power * log_ratio).clamp(max=MAX_EXPONENT)) / power


def _smoothed_logistic(margin: Tensor, smoothing: float) -> Tensor:
    """-(1 - eps) log sigma(margin) - eps log sigma(-margin)."""
    return -(1.0 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


@_loss("Rafailov et al. 2023, Eq. 7, arXiv:2305.18290", DIVERGENCE, SMOOTHING)
def sigmoid(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-(1 - eps) log sigma(m) - eps log sigma(-m). With eps > 0: conservative DPO (Mitchell 2023)."""
    return _smoothed_logistic(inputs.margin(), inputs.options.label_smoothing)


@_loss("Zhao et al. 2023, arXiv:2305.10425; on ratios: Liu et al. 2023, arXiv:2309.06657", DIVERGENCE)
def hinge(inputs: LossInputs) -> Float[Tensor, "P"]:
    """max(0, 1 - m)."""
    return F.relu(1.0 - inputs.margin())


@_loss("Azar et al. 2023, Eq. 17, arXiv:2310.12036", DIVERGENCE)
def ipo(inputs: LossInputs) -> Float[Tensor, "P"]:
    """(score_w / |y_w| - score_l / |y_l| - 1 / (2 beta))^2. The paper's tau is beta; its Eq. 17 has no lengths."""
    return ((inputs.margin(per_token=True) - 0.5) / inputs.options.beta) ** 2


@_loss("Ji et al. 2024, Eq. 16, arXiv:2402.00856", DIVERGENCE, SMOOTHING)
def exo_pair(inputs: LossInputs) -> Float[Tensor, "P"]:
    """KL(q || p) of two-way choices, q = (sigma(m), sigma(-m)) and p = (1 - eps, eps), eps > 0."""
    margin, smoothing = inputs.margin(), inputs.options.label_smoothing
    win = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-smoothing))
    return win + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(smoothing))


@_loss("Chen et al. 2024, arXiv:2402.05369")
def nca_pair(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l)) / 2."""
    chosen, rejected = inputs.rewards()
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@_loss("Chowdhury et al. 2024, arXiv:2403.00409", DIVERGENCE, SMOOTHING)
def robust(inputs: LossInputs) -> Float[Tensor, "P"]:
    """(-(1 - eps) log sigma(m) + eps log sigma(-m)) / (1 - 2 eps): unbiased where labels flip with probability eps."""
    margin, smoothing = inputs.margin(), inputs.options.label_smoothing
    noisy = -(1.0 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)
    return noisy / (1.0 - 2.0 * smoothing)


@_loss("Jung et al. 2024, arXiv:2404.04656")
def bco_pair(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta r_w) - log sigma(-beta r_l); the paper's reward shift is left at zero."""
    chosen, rejected = inputs.rewards()
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@_loss("Wu et al. 2024, Eq. 4.7, arXiv:2405.00675")
def sppo_hard(inputs: LossInputs) -> Float[Tensor, "P"]:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: the paper's eta is 1 / beta, its win rates are 1 and 0."""
    chosen, rejected = inputs.log_ratios()
    target = 0.5 / inputs.options.beta
    return (chosen - target) ** 2 + (rejected + target) ** 2


@_loss("Melnyk et al. 2024, paired, arXiv:2406.05882", SMOOTHING, sorts_batch=True)
def aot(inputs: LossInputs) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta (sort(g_theta) - sort(g_ref)) within the batch, g = log pi(y_w|x) - log pi(y_l|x)."""
    assert inputs.reference is not None
    policy = (inputs.policy.chosen - inputs.policy.rejected).sort().values
    reference = (inputs.reference.chosen - inputs.reference.rejected).sort().values
    return _smoothed_logistic(inputs.options.beta * (policy - reference), inputs.options.label_smoothing)


@_loss("Melnyk et al. 2024, unpaired, arXiv:2406.05882", SMOOTHING, sorts_batch=True)
def aot_unpaired(inputs: LossInputs) -> Float[Tensor, "P"]:
    """As `sigmoid`, with m = beta (sort(r_w) - sort(r_l)), within the batch."""
    chosen, rejected = inputs.rewards()
    return _smoothed_logistic(chosen.sort().values - rejected.sort().values, inputs.options.label_smoothing)


@_loss("D'Oosterlinck et al. 2024, Eq. 7, arXiv:2408.06266")
def apo_zero(inputs: LossInputs) -> Float[Tensor, "P"]:
    """1 - sigma(beta r_w) + sigma(beta r_l): chosen up, rejected down. The 1 is added so that no loss is negative."""
    chosen, rejected = inputs.rewards()
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@_loss("D'Oosterlinck et al. 2024, Eq. 8, arXiv:2408.06266")
def apo_down(inputs: LossInputs) -> Float[Tensor, "P"]:
    """sigma(beta r_w) + 1 - sigma(beta (r_w - r_l)): both down, rejected further. The 1 as in `apo_zero`."""
    chosen, rejected = inputs.rewards()
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@_loss("Lu et al. 2024, Eq. 5, arXiv:2406.08414", DIVERGENCE, "discopop_tau")
def discopop(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-(1 - s) log sigma(m) + s exp(-m), s = sigma(m / discopop_tau)."""
    margin, tau = inputs.margin(), inputs.options.discopop_tau
    # s exp(-m) is formed in the exponent: its factors are 0 and infinity at a large negative margin.
    return torch.exp(F.logsigmoid(margin / tau) - margin) - torch.sigmoid(-margin / tau) * F.logsigmoid(margin)


@_loss("Wang et al. 2024, arXiv:2411.10442", needs_reference=False)
def sft(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-(sum of the log-probs of all chosen tokens of the batch) / (their number), the same for every pair."""
    mean = inputs.policy.chosen_likelihood.sum() / inputs.policy.chosen_lengths.sum()
    return -mean.expand_as(inputs.policy.chosen)


@_loss("Lambert et al. 2024, Eq. 6, arXiv:2411.15124", DIVERGENCE)
def sigmoid_norm(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta (score_w / |y_w| - score_l / |y_l|))."""
    return -F.logsigmoid(inputs.margin(per_token=True))


@_loss("Meng et al. 2024, Eq. 6, arXiv:2405.14734", "simpo_gamma", needs_reference=False, is_length_averaged=True)
def simpo(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta (log pi_theta(y_w|x) / |y_w| - log pi_theta(y_l|x) / |y_l|) - simpo_gamma)."""
    chosen, rejected = inputs.policy.means()
    return -F.logsigmoid(inputs.options.beta * (chosen - rejected) - inputs.options.simpo_gamma)


@_loss("Hong et al. 2024, Eqs. 6 and 7, arXiv:2403.07691", needs_reference=False, is_length_averaged=True)
def orpo(inputs: LossInputs) -> Float[Tensor, "P"]:
    """nll - beta log sigma(log odds_w - log odds_l), odds = p / (1 - p), log p = log pi_theta(y|x) / |y|; nll is `sft`
    and the paper's lambda is beta. log p stops one fp32 step short of 0, where the odds would be infinite."""
    log_p = (mean.clamp(max=-torch.finfo(mean.dtype).eps) for mean in inputs.policy.means())
    chosen, rejected = (value - torch.log(-torch.expm1(value)) for value in log_p)
    return sft(inputs) - inputs.options.beta * F.logsigmoid(chosen - rejected)


@_loss("Xu et al. 2024, arXiv:2401.08417", "cpo_alpha", needs_reference=False)
def cpo(inputs: LossInputs) -> Float[Tensor, "P"]:
    """-log sigma(beta (log pi_theta(y_w|x) - log pi_theta(y_l|x))) + cpo_alpha * nll, where nll is `sft`."""
    preference = -F.logsigmoid(inputs.options.beta * (inputs.policy.chosen - inputs.policy.rejected))
    return preference + inputs.options.cpo_alpha * sft(inputs)


def preference_loss(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    options: LossOptions,
    weights: Float[Tensor, "P"] | None = None,
) -> Float[Tensor, "P"]:
    """The weighted sum of the named losses per pair: weights[p] * sum_k loss_weights[k] * loss_k[p].

    `weights` are those of `wpo_weights`. ValueError for an unknown name, or a needed reference that is None.
    """
    _require_reference(loss_types, reference)
    inputs = LossInputs(policy=policy, reference=reference, options=options)
    terms = [weight * LOSSES[name].function(inputs) for name, weight in zip(loss_types, loss_weights, strict=True)]
    total = torch.stack(terms).sum(0)  # [P]
    return total if weights is None else weights * total


def wpo_weights(logps: SequenceLogps, log_sum_sq_probs: Float[Tensor, "N"], batch: PairBatch) -> Float[Tensor, "P"]:
    """The weight of each pair, w(y_w) * w(y_l), without gradient (WPO, Zhou et al. 2024, Eq. 2, arXiv:2406.11827).

    w(y) = exp(mean over tokens of (log pi(token) - log sum_v pi(v)^2)); `log_sum_sq_probs` is that last term per token.
    """
    aligned = (logps.per_token - log_sum_sq_probs).detach()
    means = logps.segment_sum(aligned) / logps.lengths()  # [S]
    return torch.exp(means[batch.chosen] + means[batch.rejected])


def implicit_rewards(
    policy: PairLogps, reference: PairLogps | None, loss_types: Sequence[str], options: LossOptions
) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """The rewards that the policy stands for, chosen and rejected, without gradient.

    beta * (log pi_theta(y|x) - log pi_ref(y|x)) (Rafailov et al. 2023, arXiv:2305.18290). Where no loss needs a
    reference: beta * log pi_theta(y|x) / |y| if `simpo` or `orpo` is among them, else beta * log pi_theta(y|x).
    """
    _require_reference(loss_types, reference)
    if any(LOSSES[name].needs_reference for name in loss_types):
        chosen, rejected = LossInputs(policy=policy, reference=reference, options=options).log_ratios()
    elif any(LOSSES[name].is_length_averaged for name in loss_types):
        chosen, rejected = policy.means()
    else:
        chosen, rejected = policy.chosen, policy.rejected
    return options.beta * chosen.detach(), options.beta * rejected.detach()


# Per option: what holds of an allowed value, that in words, and what to do.
_RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "beta": (lambda value: value > 0, " above 0", "0.1 is a usual value."),
    SMOOTHING: (lambda value: 0 <= value < 0.5, " in [0, 0.5)", "If most labels are wrong, swap the columns."),
    "f_alpha_divergence_coef": (lambda _: True, "", "Choose one between 0 (forward_kl) and 1 (reverse_kl)."),
    "discopop_tau": (lambda value: value > 0, " above 0", "0.05 is the value of its paper."),
    "simpo_gamma": (lambda value: value >= 0, " of at least 0", "Use 0 for no target margin."),
    "cpo_alpha": (lambda value: value >= 0, " of at least 0", "Use 0 for no likelihood term."),
}


def check_losses(
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    options: LossOptions,
    *,
    ld_alpha: float | None,
    use_weighting: bool,
) -> None:
    """None; ValueError where losses, options and modifiers make no sense together, or no loss would read an option."""
    given, defaults = list(loss_types), LossOptions()
    if not given:
        raise ValueError(f"loss_type must name at least one loss, got none. Choose from {', '.join(LOSSES)}.")
    for name in given:
        _require_known("loss_type", name, LOSSES)
    if len(loss_weights) != len(given) or not all(map(math.isfinite, loss_weights)):
        raise ValueError(f"loss_weights must be finite, one per loss, got {list(loss_weights)}. Weigh each of {given}.")
    for field, (is_allowed, rule, remedy) in _RANGES.items():
        if not (math.isfinite(value := getattr(options, field)) and is_allowed(value)):
            raise ValueError(f"{field} must be a finite number{rule}, got {value}. {remedy}")
    _require_known(DIVERGENCE, options.f_divergence_type, F_DIVERGENCES)
    if ld_alpha is not None and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {ld_alpha}. Use None (or 1) to count all tokens alike.")
    if "exo_pair" in given and options.label_smoothing == 0:
        raise ValueError("exo_pair takes the log of label_smoothing, got 0. Set 1e-3, as its paper recommends.")
    sorting = [name for name in given if LOSSES[name].sorts_batch]
    if use_weighting and sorting:
        raise ValueError(f"use_weighting weighs pairs, but {sorting[0]} sorts them apart. Give up one of the two.")
    others = [name for name in given if name != "sft"]  # sft reads no option, and may stand beside any loss
    for field in (SMOOTHING, DIVERGENCE, "discopop_tau", "simpo_gamma", "cpo_alpha"):
        value, default = getattr(options, field), getattr(defaults, field)
        unable = [name for name in others if field not in LOSSES[name].reads]
        # A number may concern one term of a sum; a divergence says what is optimal, so all terms must share it.
        if value != default and (len(unable) == len(others) or (unable and field == DIVERGENCE)):
            readers = ", ".join(name for name, loss in LOSSES.items() if field in loss.reads)
            unread = f"{field}={value} is not read by {', '.join(unable) or 'sft'}"
            raise ValueError(f"{unread}. Leave it at {default}, or choose from {readers}.")
    coef, divergence = options.f_alpha_divergence_coef, options.f_divergence_type
    if coef != defaults.f_alpha_divergence_coef and divergence != "alpha_divergence":
        raise ValueError(
            f"f_alpha_divergence_coef={coef} is not read by {divergence}. Drop it or use alpha_divergence."
        )
    if ld_alpha is not None and not others:
        raise ValueError(f"ld_alpha={ld_alpha} is not read by sft. Set it to None, or add a preference loss.")


def _require_known(option: str, name: str, known: Iterable[str]) -> None:
    if name not in (names := list(known)):
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(f"{option} '{name}' is unknown. Did you mean '{nearest}'? There are {', '.join(names)}.")


def _require_reference(loss_types: Sequence[str], reference: PairLogps | None) -> None:
    for name in loss_types:
        _require_known("loss_type", name, LOSSES)
        if LOSSES[name].needs_reference and reference is None:
            free = ", ".join(name for name, loss in LOSSES.items() if not loss.needs_reference)
            raise ValueError(f"{name} compares with a reference, but got None. Pass its log-probs, or use {free}.")
