"""The losses against numbers worked by hand, against the naive oracle, and against laws that need no numbers.

The hand-worked pair, unless a test says otherwise: log pi_theta = -10 (chosen, 5 tokens) and -14 (rejected, 4 tokens),
log pi_ref = -12 and -13; so r_w = 2, r_l = -1, d = 3, and m = 0.3 at beta = 0.1. L(x) = -log sigma(x) = log(1 + e^-x):
L(0.1) = 0.644397, L(0.2) = 0.598139, L(-0.2) = 0.798139, L(0.3) = 0.554355, L(-0.3) = 0.854355.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.losses import (
    F_DIVERGENCES,
    LOSSES,
    LossOptions,
    MarginMoments,
    PairLogps,
    check_losses,
    f_divergence_score,
    implicit_rewards,
    moments_after,
    pair_logps,
    preference_loss,
    wpo_weights,
)
from holdfast.losses.options import option_names, rules

LN2 = math.log(2.0)


def of_pairs(chosen: list[float], rejected: list[float], lengths_w: list[int], lengths_l: list[int]) -> PairLogps:
    chosen_logps = torch.tensor(chosen)
    return PairLogps(
        chosen=chosen_logps,
        rejected=torch.tensor(rejected),
        chosen_lengths=torch.tensor(lengths_w),
        rejected_lengths=torch.tensor(lengths_l),
        chosen_likelihood=chosen_logps,
    )


MOMENTS = MarginMoments(mean=torch.tensor(1.0), deviation=torch.tensor(2.0), num_updates=3)

POLICY = of_pairs([-10.0], [-14.0], [5], [4])
REFERENCE = of_pairs([-12.0], [-13.0], [5], [4])


def value(
    name: str, policy: PairLogps = POLICY, reference: PairLogps | None = REFERENCE, *, moments=None, **options
) -> list[float]:
    settings = {"loss_types": [name], "loss_weights": [1.0], "options": LossOptions(**options), "moments": moments}
    return preference_loss(policy, reference, **settings).tolist()


def close(*numbers: float):
    return pytest.approx(list(numbers), abs=2e-6, rel=2e-6)


# By hand ------------------------------------------------------------------------------------------------------------


def test_sigmoid_by_hand():
    """L(0.3) = 0.554355; smoothed with 0.1: 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355."""
    assert value("sigmoid") == close(0.554355)
    assert value("sigmoid", label_smoothing=0.1) == close(0.584355)


def test_hinge_by_hand():
    """1 - 0.3 = 0.7; with beta = 0.5 the margin is 1.5, beyond 1: 0."""
    assert value("hinge") == close(0.7)
    assert value("hinge", beta=0.5) == [0.0]


def test_ipo_by_hand():
    """2/5 - (-1/4) = 0.65; 1 / (2 * 0.1) = 5; (0.65 - 5)^2 = 18.9225."""
    assert value("ipo") == close(18.9225)


def test_exo_pair_by_hand():
    """sigma(0.3) = 0.574443 and sigma(-0.3) = 0.425557; log 0.9 = -0.105361 and log 0.1 = -2.302585:
    0.574443 * (-0.554355 + 0.105361) + 0.425557 * (-0.854355 + 2.302585) = -0.257921 + 0.616304 = 0.358383."""
    assert value("exo_pair", label_smoothing=0.1) == close(0.358383)


def test_nca_pair_by_hand():
    """Rewards 0.2 and -0.1: L(0.2) + (L(-0.2) + L(0.1)) / 2 = 0.598139 + (0.798139 + 0.644397) / 2 = 1.319407."""
    assert value("nca_pair") == close(1.319407)


def test_robust_by_hand():
    """(0.9 * 0.554355 - 0.1 * 0.854355) / 0.8 = (0.4989195 - 0.0854355) / 0.8 = 0.516855."""
    assert value("robust", label_smoothing=0.1) == close(0.516855)


def test_bco_pair_by_hand():
    """Rewards 0.2 and -0.1: L(0.2) + L(0.1) = 0.598139 + 0.644397 = 1.242536."""
    assert value("bco_pair") == close(1.242536)


def test_sppo_hard_by_hand():
    """1 / (2 * 0.1) = 5: (2 - 5)^2 + (-1 + 5)^2 = 9 + 16 = 25."""
    assert value("sppo_hard") == close(25.0)


def test_aot_by_hand():
    """Two pairs with log-prob gaps 4 and 1 under the policy, 1 and 3 under the reference. Sorted: (1, 4) - (1, 3) =
    (0, 1), times 0.1: L(0) = 0.693147 and L(0.1) = 0.644397. Pair by pair it would be L(0.3) and L(-0.2)."""
    policy = of_pairs([-10.0, -5.0], [-14.0, -6.0], [5, 2], [4, 3])
    reference = of_pairs([-12.0, -4.0], [-13.0, -7.0], [5, 2], [4, 3])
    assert value("aot", policy, reference) == close(0.693147, 0.644397)


def test_aot_unpaired_by_hand():
    """Log ratios (2, 0) of the chosen and (-1, 3) of the rejected. Sorted: (0, 2) - (-1, 3) = (1, -1), times 0.1:
    L(0.1) = 0.644397 and L(-0.1) = 0.744397. Pair by pair it would be L(0.3) and L(-0.3)."""
    policy = of_pairs([-10.0, -4.0], [-14.0, -4.0], [5, 2], [4, 3])
    reference = of_pairs([-12.0, -4.0], [-13.0, -7.0], [5, 2], [4, 3])
    assert value("aot_unpaired", policy, reference) == close(0.644397, 0.744397)


def test_apo_zero_by_hand():
    """1 - sigma(0.2) + sigma(-0.1) = 1 - 0.549834 + 0.475021 = 0.925187."""
    assert value("apo_zero") == close(0.925187)


def test_apo_down_by_hand():
    """sigma(0.2) + 1 - sigma(0.3) = 0.549834 + 1 - 0.574443 = 0.975391."""
    assert value("apo_down") == close(0.975391)


def test_discopop_by_hand():
    """s = sigma(0.3 / 0.3) = sigma(1) = 0.731059 and e^-0.3 = 0.740818:
    0.268941 * 0.554355 + 0.731059 * 0.740818 = 0.149089 + 0.541582 = 0.690671."""
    assert value("discopop", discopop_tau=0.3) == close(0.690671)


def test_sft_by_hand():
    """Chosen: -10 over 5 tokens and -3 over 1 token. 13 / 6 = 2.166667 for both, not the mean of 2 and 3."""
    policy = of_pairs([-10.0, -3.0], [-14.0, -1.0], [5, 1], [4, 1])
    assert value("sft", policy, None) == close(13 / 6, 13 / 6)


def test_sigmoid_norm_by_hand():
    """0.1 * (2/5 + 1/4) = 0.065; L(0.065) = log(1 + 0.937067) = 0.661175."""
    assert value("sigmoid_norm") == close(0.661175)


def test_simpo_by_hand():
    """Means -10/5 = -2 and -14/4 = -3.5; beta = 2, gamma = 0.5: L(2 * 1.5 - 0.5) = log(1 + e^-2.5) = 0.0788897."""
    assert value("simpo", POLICY, None, beta=2.0) == close(0.0788897)


def test_orpo_by_hand():
    """Log odds -2 - log(1 - e^-2) = -2 + 0.145413 = -1.854587 and -3.5 - log(1 - e^-3.5) = -3.5 + 0.030662 =
    -3.469338; L(1.614751) = log(1 + 0.198940) = 0.181438; nll = 10/5 = 2; 2 + 0.1 * 0.181438 = 2.018144."""
    assert value("orpo", POLICY, None) == close(2.018144)


def test_cpo_by_hand():
    """L(0.1 * (-10 + 14)) = log(1 + e^-0.4) = 0.513015; with cpo_alpha = 0.5: 0.513015 + 0.5 * 2 = 1.513015."""
    assert value("cpo", POLICY, None, cpo_alpha=0.5) == close(1.513015)


# A reference that ranks the pair wrongly: its margin is -1, and r_w = 3, r_l = -2.
WRONG = of_pairs([-13.0], [-12.0], [5], [4])


def test_hypo_by_hand():
    """The reference's margin is 1, so as `sigmoid`: L(0.3). One that ranks wrongly counts as 0: L(0.1 * 4) = 0.513015,
    where `sigmoid` has L(0.1 * 5)."""
    assert value("hypo") == close(0.554355) == value("sigmoid")
    assert value("hypo", POLICY, WRONG) == close(0.513015)
    assert value("sigmoid", POLICY, WRONG) == close(0.474077)


def test_hypo_norm_by_hand():
    """Per token: the policy's margin is -2 + 3.5 = 1.5, the reference's -2.4 + 3.25 = 0.85: L(0.1 * 0.65) = 0.661175.
    The wrong one has -2.6 + 3 = 0.4, so per token it is not wrong: L(0.1 * 1.1) = 0.639659."""
    assert value("hypo_norm") == close(0.661175)
    assert value("hypo_norm", POLICY, WRONG) == close(0.639659)


def test_dpop_by_hand():
    """r_w = 2 is above the reference: as `sigmoid`. At log pi_theta(y_w) = -14, r_w = -2 and the margin is
    -2 + 1 - 5 * 2 = -11: L(-1.1) = 1.387335."""
    assert value("dpop", dpop_lambda=5.0) == close(0.554355)
    assert value("dpop", of_pairs([-14.0], [-14.0], [5], [4]), dpop_lambda=5.0) == close(1.387335)


def test_rainbow_by_hand():
    """0.1 * 1.5 - (0.4 * 0.1 * 0.85 + 0.6 * 0.2) = -0.004: L(-0.004) = 0.695149. At its ends: `sigmoid_norm`, and
    `simpo` with the same target."""
    assert value("rainbow", rainbow_alpha=0.4, rainbow_gamma=0.2) == close(0.695149)
    assert value("rainbow", rainbow_alpha=1.0) == value("sigmoid_norm")
    assert value("rainbow", rainbow_alpha=0.0, rainbow_gamma=1.2) == value("simpo", simpo_gamma=1.2)


def test_alpha_dpo_by_hand():
    """The gap per token is 1.5 - 0.85 = 0.65. Alone, it is its own mean: as `simpo` with the target 0.5. With mean 1
    and deviation 2 it is standardised to -0.175, so the target is 0.5 - 0.0175: L(0.15 - 0.4825) = 0.873154."""
    assert value("alpha_dpo") == value("simpo")
    assert value("alpha_dpo", moments={"alpha_dpo": MOMENTS}) == close(0.873154)
    assert value("alpha_dpo", moments={"sigmoid": MOMENTS}) == value("simpo")


def test_beta_dpo_by_hand():
    """Alone, beta is 0.1. With mean 1 the gap 3 raises it to 0.1 (1 + 0.6 * 2) = 0.22: L(0.66) = 0.416637. A gap of -5
    would lower it below 0, so it is 0.001: L(-0.005) = 0.695650."""
    assert value("beta_dpo") == value("sigmoid")
    assert value("beta_dpo", moments={"beta_dpo": MOMENTS}) == close(0.416637)
    worse = of_pairs([-18.0], [-14.0], [5], [4])
    assert value("beta_dpo", worse, moments={"beta_dpo": MOMENTS}) == close(0.695650)


def test_beta_dpo_draws_the_share_of_pairs_that_it_trains_on():
    """Of ten pairs eight count 10/8 each, two not at all; a pair ten deviations off is never among them. Without a
    gradient, as in evaluation, all count once."""
    ratios = [0.0, 1.0, 2.0, 3.0, 0.5, 1.5, 2.5, -1.0, 21.0, 1.2]
    policy, reference = (
        of_pairs(ratios, [0.0] * 10, [3] * 10, [3] * 10),
        of_pairs([0.0] * 10, [0.0] * 10, [3] * 10, [3] * 10),
    )
    settings = {"loss_types": ["beta_dpo"], "loss_weights": [1.0], "options": LossOptions(beta_dpo_alpha=0.0)}
    plain = torch.nn.functional.softplus(-0.1 * torch.tensor(ratios))
    drawn = set()
    for step in range(1, 30):
        moments = {"beta_dpo": replace(MOMENTS, num_updates=step)}
        assert torch.allclose(preference_loss(policy, reference, **settings, moments=moments), plain)
        training = replace(policy, chosen=policy.chosen.clone().requires_grad_())
        counts = preference_loss(training, reference, **settings, moments=moments).detach() / plain
        assert sorted(counts.tolist()) == close(*[0.0] * 2, *[1.25] * 8)
        assert counts[8] == 0
        drawn.add(int((counts == 0).nonzero().flatten()[0]))
    assert len(drawn) > 4  # another draw in each batch


def test_moments_by_hand():
    """Gaps 3 and -1: mean 1, deviation 2. Then 11 and 7 (mean 9, deviation 2): 0.9 * 1 + 0.1 * 9 = 1.8, and 2."""
    first = of_pairs([-10.0, -10.0], [-14.0, -10.0], [5, 5], [4, 4])
    second = of_pairs([-2.0, -2.0], [-14.0, -10.0], [5, 5], [4, 4])
    reference = of_pairs([-12.0, -12.0], [-13.0, -13.0], [5, 5], [4, 4])
    settings = {"loss_types": ["sigmoid", "beta_dpo"], "options": LossOptions()}
    moments = moments_after({}, first, reference, **settings)
    assert {name: each.record() for name, each in moments.items()} == {
        "beta_dpo": {"mean": 1.0, "deviation": 2.0, "num_updates": 1}
    }
    moments = moments_after(moments, second, reference, **settings)
    assert moments["beta_dpo"].record() == pytest.approx({"mean": 1.8, "deviation": 2.0, "num_updates": 2})
    assert (
        MarginMoments.restored(moments["beta_dpo"].record(), torch.device("cpu")).record()
        == moments["beta_dpo"].record()
    )


AT_ZERO_MARGIN = {
    "sigmoid": LN2,
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.1**2),
    "exo_pair": -LN2 - 0.5 * math.log(0.1 * 0.9),  # KL of a fair coin from (0.9, 0.1)
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 2 * (0.5 / 0.1) ** 2,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LN2 + 0.5,
    "sigmoid_norm": LN2,
}


def at_zero_margin(name: str) -> float:
    """The value by hand, above; of a loss that is not there, by the oracle."""
    if name in AT_ZERO_MARGIN:
        return AT_ZERO_MARGIN[name]
    chosen, rejected = [torch.full((5,), -2.0)], [torch.full((4,), -3.5)]
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].reads else 0.0
    options = {"label_smoothing": smoothing}
    return oracle.LOSS_ORACLE[name](chosen, rejected, chosen, rejected, options).item()


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.needs_reference])
def test_value_at_zero_margin(name):
    """A policy that is its reference: what every run starts with."""
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].reads else 0.0
    assert value(name, POLICY, POLICY, label_smoothing=smoothing) == close(at_zero_margin(name))


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ({"f_divergence_type": "reverse_kl"}, LN2),
        ({"f_divergence_type": "forward_kl"}, 1 - 1 / 2),
        ({"f_divergence_type": "js_divergence"}, math.log(4 / 3)),
        ({"f_divergence_type": "alpha_divergence"}, 2 - math.sqrt(2)),  # 2 (1 - 2^-0.5)
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0}, 2 - 1),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0}, 1 - 1 / 2),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, LN2),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0 + 1e-7}, LN2),
    ],
)
def test_f_divergence_score_where_the_policy_is_twice_as_likely(divergence, expected):
    score = f_divergence_score(torch.tensor([LN2]), LossOptions(**divergence))
    assert score.tolist() == close(expected)


def test_exponent_of_a_divergence_is_capped_at_80():
    """t^1 - 1 with log t = 1e4: e^80 - 1, and flat there."""
    log_ratio = torch.tensor([1e4], requires_grad=True)
    score = f_divergence_score(
        log_ratio, LossOptions(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0)
    )
    (gradient,) = torch.autograd.grad(score.sum(), log_ratio)
    assert score.tolist() == pytest.approx([math.exp(80.0)], rel=1e-5)
    assert gradient.tolist() == [0.0]


# Pairs, LD-DPO, WPO -------------------------------------------------------------------------------------------------


def batch_of(lengths: list[int], chosen: list[int], rejected: list[int]) -> PairBatch:
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return PairBatch(
        inputs={},
        source=torch.arange(len(sequence)),
        target=torch.zeros_like(sequence),
        sequence=sequence,
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        content=torch.zeros(len(lengths), 2, dtype=torch.long),
    )


def logps_of(per_token: Tensor, batch: PairBatch) -> SequenceLogps:
    return SequenceLogps(per_token=per_token, sequence=batch.sequence, num_sequences=batch.num_sequences)


# Three completions, y0 of 3 tokens, y1 of 1, y2 of 2; y0 is chosen over both others, and y2 over y1.
SHARED = batch_of([3, 1, 2], chosen=[0, 0, 2], rejected=[1, 2, 1])
SHARED_LOGPS = logps_of(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]), SHARED)


def test_pair_logps_by_hand():
    """Sums: y0 = -6, y1 = -4, y2 = -11."""
    pairs = pair_logps(SHARED_LOGPS, SHARED)
    assert pairs.chosen.tolist() == [-6.0, -6.0, -11.0]
    assert pairs.rejected.tolist() == [-4.0, -11.0, -4.0]
    assert pairs.chosen_likelihood.tolist() == [-6.0, -6.0, -11.0]
    assert pairs.chosen_lengths.tolist() == [3, 3, 2]
    assert pairs.rejected_lengths.tolist() == [1, 2, 1]


def test_ld_alpha_by_hand():
    """y0 counts differently in its two pairs. Beside y1 it shares 1 token: -1 + 0.5 * (-5) = -3.5; beside y2, 2 tokens:
    -3 + 0.5 * (-3) = -4.5. y2 beside y1: -5 + 0.5 * (-6) = -8. The shorter one of a pair counts in full, and so do all
    likelihoods."""
    pairs = pair_logps(SHARED_LOGPS, SHARED, ld_alpha=0.5)
    assert pairs.chosen.tolist() == [-3.5, -4.5, -8.0]
    assert pairs.rejected.tolist() == [-4.0, -11.0, -4.0]
    assert pairs.chosen_likelihood.tolist() == [-6.0, -6.0, -11.0]
    assert pairs.chosen_lengths.tolist() == [3, 3, 2]


def test_ld_alpha_at_its_ends():
    """0 leaves the shared tokens, 1 is no modifier."""
    assert pair_logps(SHARED_LOGPS, SHARED, ld_alpha=0.0).chosen.tolist() == [-1.0, -3.0, -5.0]
    whole, plain = pair_logps(SHARED_LOGPS, SHARED, ld_alpha=1.0), pair_logps(SHARED_LOGPS, SHARED)
    assert torch.equal(whole.chosen, plain.chosen)
    assert torch.equal(whole.rejected, plain.rejected)


def test_wpo_weights_by_hand():
    """At each place the vocabulary has (1/2, 1/4, 1/4), so sum p^2 = 3/8. Chosen: tokens of 1/2 and 1/4, the mean of
    log(4/3) and log(2/3): sqrt(8/9). Rejected: one token of 1/4: 2/3. The weight is 2/3 * sqrt(8/9) = 0.628539."""
    batch = batch_of([2, 1], chosen=[0], rejected=[1])
    logps = logps_of(torch.tensor([0.5, 0.25, 0.25]).log().requires_grad_(), batch)
    weights = wpo_weights(logps, torch.tensor([0.375] * 3).log(), batch)
    assert weights.tolist() == close(0.628539)
    assert not weights.requires_grad


def test_weights_multiply_every_pair_on_its_own():
    policy = of_pairs([-10.0, -5.0], [-14.0, -6.0], [5, 2], [4, 3])
    reference = of_pairs([-12.0, -4.0], [-13.0, -7.0], [5, 2], [4, 3])
    settings = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "options": LossOptions()}
    plain = preference_loss(policy, reference, **settings)
    weighted = preference_loss(policy, reference, **settings, pair_weights=torch.tensor([0.5, 3.0]))
    assert weighted.tolist() == close(0.5 * plain[0].item(), 3.0 * plain[1].item())


# Against the oracle -------------------------------------------------------------------------------------------------

LENGTHS = [3, 5, 1, 4, 7, 2]
PAIRS = {"chosen": [0, 0, 3, 4], "rejected": [1, 2, 1, 5]}  # sequences 0 and 1 belong to two pairs each


def random_logps(seed: int) -> tuple[PairBatch, Tensor, Tensor, Tensor]:
    """A batch, and per token: policy log-probs, reference log-probs, log sum p^2 of the policy."""
    batch, draw = batch_of(LENGTHS, **PAIRS), torch.Generator().manual_seed(seed)
    policy = -0.05 - 3.0 * torch.rand(sum(LENGTHS), generator=draw)
    reference = (policy + 0.5 * torch.randn(sum(LENGTHS), generator=draw)).clamp(max=-0.01)
    return batch, policy, reference, -2.0 * torch.rand(sum(LENGTHS), generator=draw)


def tokens_of(per_token: Tensor, part: str) -> list[Tensor]:
    """One tensor per pair: the per-token values of the completion that plays this part."""
    sequences = per_token.split(LENGTHS)
    return [sequences[index] for index in PAIRS[part]]


def oracle_losses(name: str, policy: Tensor, reference: Tensor, log_sum_sq: Tensor | None, options: dict) -> Tensor:
    of_policy = [tokens_of(policy, part) for part in ("chosen", "rejected")]
    of_reference = [tokens_of(reference, part) for part in ("chosen", "rejected")]
    losses = oracle.LOSS_ORACLE[name](*of_policy, *of_reference, options)
    if log_sum_sq is None:
        return losses
    return losses * oracle.wpo_weights(*of_policy, *(tokens_of(log_sum_sq, part) for part in ("chosen", "rejected")))


def package_losses(name: str, policy: Tensor, reference: Tensor, log_sum_sq: Tensor | None, options: dict) -> Tensor:
    batch = batch_of(LENGTHS, **PAIRS)
    ld_alpha = options.get("ld_alpha")
    logps = logps_of(policy, batch)
    needs_reference = LOSSES[name].needs_reference
    return preference_loss(
        pair_logps(logps, batch, ld_alpha),
        pair_logps(logps_of(reference, batch), batch, ld_alpha) if needs_reference else None,
        loss_types=[name],
        loss_weights=[1.0],
        options=LossOptions(**{key: number for key, number in options.items() if key != "ld_alpha"}),
        pair_weights=None if log_sum_sq is None else wpo_weights(logps, log_sum_sq, batch),
    )


OTHER_VALUES = {"label_smoothing": 0.1, "discopop_tau": 0.3, "simpo_gamma": 1.2, "cpo_alpha": 0.4}
DIVERGENCE, COEFFICIENT = "f_divergence_type", "f_alpha_divergence_coef"


def other_value(option: str) -> float:
    """A value of the option that is not its default: the one above, or the first of a few that its rule allows."""
    if option in OTHER_VALUES:
        return OTHER_VALUES[option]
    default, rule = getattr(LossOptions(), option), rules(LossOptions)[option]
    return next(value for value in (0.3, 1.2, 0.7, 3.0, -0.5) if value != default and rule.allows(value))


def combinations():
    """Every loss with everything that it reads: plain and other numbers, divergences, LD-DPO, WPO."""
    others = {
        name: other_value(name) for name in option_names(LossOptions) if name not in ("beta", DIVERGENCE, COEFFICIENT)
    }
    alphas = [("alpha_divergence", coef) for coef in (0.5, 0.0, 1.0, 1.7)]
    for name, loss in LOSSES.items():
        divergences = [("reverse_kl", 0.5)]
        if "f_divergence_type" in loss.reads:
            divergences += [("forward_kl", 0.5), ("js_divergence", 0.5), *alphas]
        plain = {"beta": 0.1} if name != "exo_pair" else {"beta": 0.1, "label_smoothing": 1e-3}
        for numbers in (plain, {"beta": 0.4} | {key: others[key] for key in loss.reads if key in others}):
            for divergence, coef in divergences:
                for ld_alpha in (None, 0.0, 0.6):
                    for is_weighted in (False,) if loss.sorts_batch else (False, True):
                        facts = {"f_divergence_type": divergence, "f_alpha_divergence_coef": coef}
                        options = numbers | facts | {"ld_alpha": ld_alpha}
                        label = f"{name}-beta{numbers['beta']}-{divergence}{coef}-ld{ld_alpha}-wpo{is_weighted}"
                        yield pytest.param(name, options, is_weighted, id=label)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_whether_it_couples_pairs(name):
    """Each pair's value is that of the pair alone exactly where `couples_pairs` is false, in the first batch and in
    later ones. Several processes gather the pairs of those losses only of which it is true."""
    batch, *tokens, _ = random_logps(seed=len(name))
    policy, reference = (pair_logps(logps_of(logps, batch), batch) for logps in tokens)
    needed = reference if LOSSES[name].needs_reference else None
    options = LossOptions(label_smoothing=1e-3 if name == "exo_pair" else 0.0)

    def losses(pairs, moments):
        of_reference = None if needed is None else needed.of_pairs(pairs)
        return preference_loss(
            policy.of_pairs(pairs),
            of_reference,
            loss_types=[name],
            loss_weights=[1.0],
            options=options,
            moments=moments,
        )

    def is_alone(moments):
        pairs = torch.arange(batch.num_pairs)
        alone = torch.cat([losses(pair, moments) for pair in pairs.split(1)])
        return torch.allclose(losses(pairs, moments), alone)

    assert (is_alone({}) and is_alone({name: MOMENTS})) != LOSSES[name].couples_pairs


@pytest.mark.parametrize(("name", "options", "is_weighted"), list(combinations()))
def test_losses_equal_the_oracle(name, options, is_weighted):
    """In value, and in the gradient of a sum in which every pair counts differently."""
    _, policy, reference, log_sum_sq = random_logps(seed=len(name))
    results = []
    for losses_of in (oracle_losses, package_losses):
        leaf = policy.clone().requires_grad_()
        losses = losses_of(name, leaf, reference, log_sum_sq if is_weighted else None, options)
        (gradient,) = torch.autograd.grad((losses * torch.tensor([1.0, -0.5, 2.0, 0.3])).sum(), leaf)
        results.append((losses.detach(), gradient))
    (expected, expected_gradient), (losses, gradient) = results
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_the_combinations_cover_every_loss_and_divergence():
    """The oracle knows every loss, and the table above leaves out no divergence."""
    assert set(oracle.LOSS_ORACLE) == set(LOSSES)
    assert {case.values[1]["f_divergence_type"] for case in combinations()} == set(F_DIVERGENCES)
    assert {case.values[0] for case in combinations()} == set(LOSSES)


# Laws ---------------------------------------------------------------------------------------------------------------

numbers = st.floats(-30.0, 30.0, width=32)
smoothings = st.floats(0.001, 0.45)


def at_log_ratios(ratio_w: float, ratio_l: float) -> tuple[PairLogps, PairLogps]:
    return of_pairs([ratio_w - 50.0], [ratio_l - 50.0], [5], [4]), of_pairs([-50.0], [-50.0], [5], [4])


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "aot"])
@given(ratio_w=numbers, ratio_l=numbers, shift=numbers)
def test_losses_of_the_margin_ignore_what_both_completions_share(name, ratio_w, ratio_l, shift):
    """log pi_theta + c for both completions of a pair (as log Z(x) would) changes nothing."""
    smoothing = 0.1 if name == "exo_pair" else 0.0
    here = value(name, *at_log_ratios(ratio_w, ratio_l), label_smoothing=smoothing)
    there = value(name, *at_log_ratios(ratio_w + shift, ratio_l + shift), label_smoothing=smoothing)
    assert here == pytest.approx(there, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_losses_of_each_completion_do_not_ignore_it(name):
    """The counterpart of the law above: these judge each completion by itself, which is why they take no divergence."""
    assert abs(value(name, *at_log_ratios(2.0, -1.0))[0] - value(name, *at_log_ratios(7.0, 4.0))[0]) > 0.001
    assert "f_divergence_type" not in LOSSES[name].reads


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "discopop", "bco_pair", "apo_zero", "sigmoid_norm"])
@given(ratio=st.floats(-30, 29, width=32), step=st.floats(0.0625, 1, width=32))
def test_a_better_chosen_completion_never_costs_more(name, ratio, step):
    before, after = value(name, *at_log_ratios(ratio, 0.0)), value(name, *at_log_ratios(ratio + step, 0.0))
    # discopop switches from the logistic to the exponential loss, which is higher by up to 1 - ln 2, around zero.
    assert after[0] <= before[0] + (0.31 if name == "discopop" else 1e-6)


@given(ratio_w=numbers, ratio_l=numbers)
def test_robust_and_sigmoid_agree_where_labels_are_right(ratio_w, ratio_l):
    pairs = at_log_ratios(ratio_w, ratio_l)
    assert value("robust", *pairs) == pytest.approx(value("sigmoid", *pairs), abs=1e-6)


@given(ratio=numbers, smoothing=smoothings)
def test_robust_is_unbiased(ratio, smoothing):
    """(1 - eps) * loss(pair) + eps * loss(flipped pair) is the loss of the clean label."""
    right = value("robust", *at_log_ratios(ratio, 0.0), label_smoothing=smoothing)[0]
    flipped = value("robust", *at_log_ratios(0.0, ratio), label_smoothing=smoothing)[0]
    clean = value("sigmoid", *at_log_ratios(ratio, 0.0))[0]
    assert (1 - smoothing) * right + smoothing * flipped == pytest.approx(clean, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "exo_pair"])
@given(smoothing=smoothings, away=st.floats(-20, 20))
def test_smoothed_losses_are_least_where_the_policy_says_the_labels_odds(name, smoothing, away):
    """At m = log((1 - eps) / eps) the policy's odds are the labels'; exo_pair, a KL, is 0 there."""
    best = 10.0 * math.log((1 - smoothing) / smoothing)  # beta = 0.1
    least = value(name, *at_log_ratios(best, 0.0), label_smoothing=smoothing)[0]
    assert value(name, *at_log_ratios(best + away, 0.0), label_smoothing=smoothing)[0] >= least - 1e-6
    if name == "exo_pair":
        assert least == pytest.approx(0.0, abs=1e-6)


@given(first=st.sampled_from(sorted(LOSSES)), second=st.sampled_from(sorted(LOSSES)), a=numbers, b=numbers)
def test_combinations_are_linear(first, second, a, b):
    _, policy, reference, _ = random_logps(seed=3)
    batch = batch_of(LENGTHS, **PAIRS)
    pairs = pair_logps(logps_of(policy, batch), batch), pair_logps(logps_of(reference, batch), batch)
    options = LossOptions(label_smoothing=0.1)
    both = preference_loss(*pairs, loss_types=[first, second], loss_weights=[a, b], options=options)
    one = preference_loss(*pairs, loss_types=[first], loss_weights=[1.0], options=options)
    two = preference_loss(*pairs, loss_types=[second], loss_weights=[1.0], options=options)
    torch.testing.assert_close(both, a * one + b * two, rtol=1e-5, atol=1e-4)


@given(order=st.permutations(range(4)), reference_order=st.permutations(range(4)))
def test_aot_sees_distributions_not_pairs(order, reference_order):
    """Reordering the pairs of one model alone changes nothing."""
    _, policy, reference, _ = random_logps(seed=4)
    batch = batch_of(LENGTHS, **PAIRS)
    shuffled = [
        batch_of(LENGTHS, [PAIRS["chosen"][i] for i in places], [PAIRS["rejected"][i] for i in places])
        for places in (order, reference_order)
    ]
    plain = value("aot", *(pair_logps(logps_of(logps, batch), batch) for logps in (policy, reference)))
    mixed = value(
        "aot", pair_logps(logps_of(policy, batch), shuffled[0]), pair_logps(logps_of(reference, batch), shuffled[1])
    )
    assert mixed == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.needs_reference])
def test_losses_without_a_reference_never_look_at_it(name):
    assert value(name, POLICY, None) == value(name, POLICY, REFERENCE)


# At the ends of the range -------------------------------------------------------------------------------------------

# With r_w = +-1e4, r_l = 0, beta = 0.1 (a margin of +-1000) and eps = 0.1 where it is read; 5 chosen tokens.
LIMITS = {
    "sigmoid": (0.1 * 1000, 0.9 * 1000),
    "hinge": (0.0, 1001.0),
    "ipo": ((2000.0 - 5) ** 2, (2000.0 + 5) ** 2),
    "exo_pair": (-math.log(0.9), -math.log(0.1)),
    "nca_pair": (500 + 0.5 * LN2, 1000 + 0.5 * LN2),
    "robust": (-0.1 * 1000 / 0.8, 0.9 * 1000 / 0.8),
    "bco_pair": (LN2, 1000 + LN2),
    "sppo_hard": (9995.0**2 + 25, 10005.0**2 + 25),
    "aot": (0.1 * 1000, 0.9 * 1000),
    "aot_unpaired": (0.1 * 1000, 0.9 * 1000),
    "apo_zero": (0.5, 1.5),
    "apo_down": (1.0, 1.0),
    "discopop": (0.0, 1000.0),
    "sigmoid_norm": (0.0, 200.0),
}


def gradient_at(name: str, chosen: float, reference: PairLogps | None, rejected: float, **options) -> list[float]:
    leaf = torch.tensor([chosen, rejected], requires_grad=True)
    lengths = {"chosen_lengths": torch.tensor([5]), "rejected_lengths": torch.tensor([4])}
    policy = PairLogps(chosen=leaf[:1], rejected=leaf[1:], chosen_likelihood=leaf[:1], **lengths)
    settings = {"loss_types": [name], "loss_weights": [1.0], "options": LossOptions(**options)}
    (gradient,) = torch.autograd.grad(preference_loss(policy, reference, **settings).sum(), leaf)
    return gradient.tolist()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", LIMITS)
def test_limits_at_margins_of_ten_thousand_nats(name, sign):
    options = {"label_smoothing": 0.1 if "label_smoothing" in LOSSES[name].reads else 0.0}
    policy, reference = of_pairs([sign * 1e4], [0.0], [5], [4]), of_pairs([0.0], [0.0], [5], [4])
    assert value(name, policy, reference, **options) == pytest.approx([LIMITS[name][sign < 0]], rel=1e-5, abs=1e-5)
    assert all(map(math.isfinite, gradient_at(name, sign * 1e4, reference, 0.0, **options)))


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize(("ratio_w", "ratio_l"), [(1e4, 0.0), (-1e4, 0.0), (-1e4, -1e4), (1e4, 1e4)])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "f_divergence_type" in loss.reads])
def test_no_divergence_turns_a_far_margin_into_nan(name, ratio_w, ratio_l, divergence):
    smoothing = 0.1 if name == "exo_pair" else 0.0
    options = {"label_smoothing": smoothing, "f_divergence_type": divergence}
    policy, reference = of_pairs([ratio_w], [ratio_l], [4], [4]), of_pairs([0.0], [0.0], [4], [4])
    found = value(name, policy, reference, **options)
    assert not math.isnan(found[0])
    if ratio_w == ratio_l:
        assert found == close(at_zero_margin(name))
    elif name in ("sigmoid", "hinge", "exo_pair", "robust", "sigmoid_norm"):
        # Not `ipo`, to which a margin far above its target is wrong too, nor `discopop`, which has a bump beyond zero.
        assert (found[0] > at_zero_margin(name)) == (ratio_w < ratio_l)
    assert not any(map(math.isnan, gradient_at(name, ratio_w, reference, ratio_l, **options)))


@pytest.mark.parametrize(
    ("mean_w", "mean_l", "odds_part"),
    [
        (0.0, 0.0, LN2),
        (-1e4, -1e4, LN2),
        (0.0, -1e4, 0.0),
        (-1e4, 0.0, 1e4 - math.log(torch.finfo(torch.float32).eps)),
    ],
)
def test_orpo_where_probabilities_are_zero_or_one(mean_w, mean_l, odds_part):
    """log p = 0 has infinite odds; it is taken as -eps of fp32, whose log odds are -log eps = 15.94."""
    policy = of_pairs([5 * mean_w], [4 * mean_l], [5], [4])
    assert value("orpo", policy, None) == pytest.approx([-mean_w + 0.1 * odds_part], rel=1e-5, abs=1e-5)
    assert all(map(math.isfinite, gradient_at("orpo", 5 * mean_w, None, 4 * mean_l)))


# Rewards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_types", "expected"),
    [
        (["sigmoid"], (0.2, -0.1)),  # 0.1 * (2, -1)
        (["cpo", "sigmoid"], (0.2, -0.1)),  # one loss with a reference is enough
        (["sft"], (-1.0, -1.4)),  # 0.1 * (-10, -14)
        (["cpo", "sft"], (-1.0, -1.4)),
        (["simpo"], (-0.2, -0.35)),  # 0.1 * (-10/5, -14/4)
        (["sft", "orpo"], (-0.2, -0.35)),
    ],
)
def test_implicit_rewards_by_hand(loss_types, expected):
    policy = replace(POLICY, chosen=POLICY.chosen.clone().requires_grad_())
    reference = REFERENCE if any(LOSSES[name].needs_reference for name in loss_types) else None
    chosen, rejected = implicit_rewards(policy, reference, loss_types, LossOptions())
    assert (*chosen.tolist(), *rejected.tolist()) == pytest.approx(expected)
    assert not chosen.requires_grad


# Refusals -----------------------------------------------------------------------------------------------------------


def check(loss_types, loss_weights=None, *, ld_alpha=None, use_weighting=False, **options) -> None:
    weights = [1.0] * len(loss_types) if loss_weights is None else loss_weights
    check_losses(loss_types, weights, LossOptions(**options), ld_alpha=ld_alpha, use_weighting=use_weighting)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), rf"loss_type must name at least one loss, got none\. Choose from {', '.join(LOSSES)}\."),
        ((["sigmod"],), r"loss_type 'sigmod' is unknown\. Did you mean 'sigmoid'\? There are sigmoid, hinge, "),
        ((["sigmoid", "IPO"],), r"loss_type 'IPO' is unknown\."),
        ((["sigmoid"], [1.0, 2.0]), r"loss_weights must be finite, one per loss, got \[1\.0, 2\.0\]\. Weigh each of"),
        ((["sigmoid"], []), r"one per loss, got \[\]\. Weigh each of \['sigmoid'\]"),
        ((["sigmoid", "sft"], [1.0, NAN]), r"must be finite, one per loss, got \[1\.0, nan\]"),
        ((["sigmoid"], [-INF]), r"must be finite, one per loss, got \[-inf\]"),
    ],
)
def test_refused_losses(arguments, message):
    with pytest.raises(ValueError, match=message):
        check(*arguments)


@pytest.mark.parametrize(
    ("loss_types", "options", "message"),
    [
        (["sigmoid"], {"beta": -0.1}, r"beta must be a finite number above 0, got -0\.1\. 0\.1 is a usual value"),
        (["sigmoid"], {"beta": 0.0}, r"beta must be a finite number above 0, got 0\.0"),
        (["sigmoid"], {"beta": NAN}, r"beta must be a finite number above 0, got nan"),
        (["sigmoid"], {"beta": INF}, r"beta must be a finite number above 0, got inf"),
        (["robust"], {"label_smoothing": 0.5}, r"label_smoothing must be .* in \[0, 0\.5\), got 0\.5\. .* swap"),
        (["sigmoid"], {"label_smoothing": -0.1}, r"label_smoothing must be .* in \[0, 0\.5\), got -0\.1"),
        (["hinge"], {"label_smoothing": NAN}, r"label_smoothing must be .* got nan"),
        (["exo_pair"], {}, r"exo_pair takes the log of label_smoothing, got 0\. Set 1e-3"),
        (
            ["hinge", "sft"],
            {"label_smoothing": 0.1},
            r"label_smoothing=0\.1 is not read by hinge\. Leave it at 0\.0, or",
        ),
        (
            ["sft"],
            {"label_smoothing": 0.1},
            r"label_smoothing=0\.1 is not read by sft\. .* choose from sigmoid, exo_pair",
        ),
        (
            ["sigmoid"],
            {"f_divergence_type": "jsd"},
            r"f_divergence_type 'jsd' is unknown\. Did you mean 'js_divergence'\?",
        ),
        (["nca_pair"], {"f_divergence_type": "forward_kl"}, r"f_divergence_type=forward_kl is not read by nca_pair\."),
        (
            ["sigmoid", "simpo"],
            {"f_divergence_type": "forward_kl"},
            r"=forward_kl is not read by simpo\. Leave it at reverse",
        ),
        (["sft"], {"f_divergence_type": "js_divergence"}, r"f_divergence_type=js_divergence is not read by sft\."),
        (
            ["sigmoid"],
            {"f_alpha_divergence_coef": 0.3},
            r"f_alpha_divergence_coef=0\.3 is not read by reverse_kl\. Drop it or",
        ),
        (
            ["sigmoid"],
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": NAN},
            r"f_alpha_divergence_coef must be a finite number, got nan\. Choose one between 0",
        ),
        (["sigmoid"], {"ld_alpha": 1.5}, r"ld_alpha must lie in \[0, 1\], got 1\.5\. Use None"),
        (["sigmoid"], {"ld_alpha": -0.1}, r"ld_alpha must lie in \[0, 1\], got -0\.1"),
        (["sigmoid"], {"ld_alpha": NAN}, r"ld_alpha must lie in \[0, 1\], got nan"),
        (["sft"], {"ld_alpha": 0.5}, r"ld_alpha=0\.5 is not read by sft\. Set it to None, or add"),
        (["aot"], {"use_weighting": True}, r"use_weighting weighs pairs, but aot sorts them apart\. Give up one"),
        (["sigmoid", "aot_unpaired"], {"use_weighting": True}, r"but aot_unpaired sorts them apart"),
        (["discopop"], {"discopop_tau": 0.0}, r"discopop_tau must be a finite number above 0, got 0\.0\. 0\.05 is"),
        (
            ["sigmoid"],
            {"discopop_tau": 0.1},
            r"discopop_tau=0\.1 is not read by sigmoid\. Leave it at 0\.05, or .* discopop",
        ),
        (["simpo"], {"simpo_gamma": -1.0}, r"simpo_gamma must be a finite number of at least 0, got -1\.0"),
        (
            ["cpo"],
            {"simpo_gamma": 1.0},
            r"simpo_gamma=1\.0 is not read by cpo\. Leave it at 0\.5, or choose from simpo\.",
        ),
        (["cpo"], {"cpo_alpha": -1.0}, r"cpo_alpha must be a finite number of at least 0, got -1\.0\. Use 0 for no"),
        (
            ["simpo"],
            {"cpo_alpha": 0.0},
            r"cpo_alpha=0\.0 is not read by simpo\. Leave it at 1\.0, or choose from cpo\.",
        ),
    ],
)
def test_refused_options(loss_types, options, message):
    with pytest.raises(ValueError, match=message):
        check(loss_types, **options)


@pytest.mark.parametrize(
    ("loss_types", "options"),
    [
        *[([name], {"label_smoothing": 1e-3 if name == "exo_pair" else 0.0}) for name in LOSSES],
        (["sigmoid", "sft"], {"f_divergence_type": "forward_kl", "ld_alpha": 0.5, "use_weighting": True}),
        (["hinge", "robust"], {"label_smoothing": 0.2}),
        (["sigmoid", "simpo", "cpo"], {"simpo_gamma": 1.0, "cpo_alpha": 0.1}),
        (["ipo"], {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2}),
        (["sigmoid", "sigmoid"], {"ld_alpha": 0.0}),
    ],
)
def test_sensible_combinations_pass(loss_types, options):
    assert check(loss_types, **options) is None


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.needs_reference])
def test_a_missing_reference_is_said(name):
    message = rf"{name} compares with a reference, but got None\. Pass its log-probs, or use sft, simpo, orpo, cpo"
    with pytest.raises(ValueError, match=message):
        value(name, POLICY, None)
    with pytest.raises(ValueError, match=message):
        implicit_rewards(POLICY, None, ["sft", name], LossOptions())


def test_unknown_names_are_said_where_the_check_was_skipped():
    with pytest.raises(ValueError, match="loss_type 'dpo' is unknown"):
        value("dpo")
    with pytest.raises(ValueError, match=r"f_divergence_type 'kl' is unknown\. Did you mean '.*_kl'\?"):
        value("sigmoid", f_divergence_type="kl")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_the_options_that_it_declares_and_no_other(name):
    """Another value of an option changes the loss or its gradient where the loss declares it, and nowhere else."""
    _, policy, reference, _ = random_logps(seed=5)
    policy.requires_grad_()  # as in training
    plain = {"label_smoothing": 0.05, "f_divergence_type": "alpha_divergence"}
    changes = {option: other_value(option) for option in option_names(LossOptions) if option != DIVERGENCE}
    declared = set(option_names(LOSSES[name].options))
    before = package_losses(name, policy, reference, None, plain)
    for option, changed in changes.items():
        after = package_losses(name, policy, reference, None, plain | {option: changed})
        assert torch.equal(before, after) == (option not in declared), option
    after = package_losses(name, policy, reference, None, plain | {DIVERGENCE: "forward_kl"})
    assert torch.equal(before, after) == (DIVERGENCE not in declared)


def test_an_option_out_of_its_range_is_refused_whatever_the_losses():
    """Every option of a loss has a rule, and every number has values that it does not allow."""
    assert set(rules(LossOptions)) == set(option_names(LossOptions))
    for option, rule in rules(LossOptions).items():
        if not rule.choices:
            with pytest.raises(ValueError, match=rf"{option} must be a finite number.*, got nan"):
                check(["sigmoid"], **{option: NAN})


def test_every_loss_names_its_paper():
    assert [name for name, loss in LOSSES.items() if "arXiv:" not in loss.paper] == []
