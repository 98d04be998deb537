"""Losses that read the reference's margin at the edges of their batches, by hand, and what their page says of them.

The pair of `test_losses`, unless a test says otherwise: log pi_theta = -10 (chosen, 5 tokens) and -14 (rejected, 4
tokens), log pi_ref = -12 and -13. L(x) = -log sigma(x) = log(1 + e^-x).
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.losses import (
    LOSSES,
    LossOptions,
    MarginMoments,
    PairLogps,
    implicit_rewards,
    moments_after,
    preference_loss,
)

LN2 = math.log(2.0)
INF, NAN = math.inf, math.nan
PAGE = Path(__file__).parent.parent.parent / "docs" / "losses.md"
HERE = LOSSES["hypo"].function.__module__
NAMES = [name for name, loss in LOSSES.items() if loss.function.__module__ == HERE]


def of_pairs(chosen: list[float], rejected: list[float], lengths: tuple[int, int] = (5, 4)) -> PairLogps:
    return PairLogps(
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        chosen_lengths=torch.tensor([lengths[0]] * len(chosen)),
        rejected_lengths=torch.tensor([lengths[1]] * len(chosen)),
        chosen_likelihood=torch.tensor(chosen),
    )


POLICY, REFERENCE = of_pairs([-10.0], [-14.0]), of_pairs([-12.0], [-13.0])


def losses(
    name: str, policy: PairLogps = POLICY, reference: PairLogps = REFERENCE, *, is_training: bool = False,
    moments: Any = None, margins: list[float] | None = None, weights: list[float] | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    if is_training:
        policy = replace(policy, chosen=policy.chosen.clone().requires_grad_())
    return preference_loss(
        policy,
        reference,
        loss_types=[name],
        loss_weights=[1.0],
        options=LossOptions(**options),
        moments=moments,
        margins=None if margins is None else torch.tensor(margins),
        pair_weights=None if weights is None else torch.tensor(weights),
    )


def close(*numbers: float) -> Any:
    return pytest.approx(list(numbers), abs=2e-6, rel=2e-6)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# --- margins of the data ----------------------------------------------------------------------------------------------

AT = {
    "hypo": 0.3,  # 0.1 (4 - max(0, 1))
    "hypo_norm": 0.065,  # 0.1 ((-2 + 3.5) - (-2.4 + 3.25))
    "dpop": 0.3,  # 0.1 (2 + 1 - 50 * 0)
    "rainbow": 0.15 - 0.25 * 0.085 - 0.75 * 0.5,  # 0.1 * 1.5 - (0.25 * 0.1 * 0.85 + 0.75 * 0.5)
}


@pytest.mark.parametrize("name", AT)
@pytest.mark.parametrize("margin", [0.0, 0.7, -1.3])
def test_a_margin_of_the_data_by_hand(name: str, margin: float) -> None:
    """L(m - margin) with the margin m in `AT`; smoothed: 0.8 L(m - margin) + 0.2 L(margin - m)."""
    apart = AT[name] - margin
    assert losses(name, margins=[margin]).tolist() == close(softplus(-apart))
    smoothed = losses(name, margins=[margin], label_smoothing=0.2).tolist()
    assert smoothed == close(0.8 * softplus(-apart) + 0.2 * softplus(apart))


@pytest.mark.parametrize("name", NAMES)
def test_what_reads_a_margin_says_so(name: str) -> None:
    changes = losses(name, margins=[0.7]).tolist() != losses(name).tolist()
    assert changes == LOSSES[name].reads_margins == (name in AT)


# --- a reference without an opinion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ref_w", "ref_l"), [(-12.0, -12.0), (0.0, 0.0)])
def test_hypo_with_a_reference_that_ranks_neither(ref_w: float, ref_l: float) -> None:
    """Delta_ref = 0: L(0.1 * 4) = 0.513015 either way, and the gradient of log pi_theta(y_w) is -0.1 sigma(-0.4)."""
    reference = of_pairs([ref_w], [ref_l])
    assert losses("hypo", POLICY, reference).tolist() == close(0.513015)
    leaf = replace(POLICY, chosen=POLICY.chosen.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(losses("hypo", leaf, reference).sum(), leaf.chosen)
    assert gradient.tolist() == close(-0.1 / (1 + math.exp(0.4)))


def test_hypo_asks_more_than_sigmoid_of_pairs_that_the_reference_ranks_wrongly() -> None:
    """At Delta_theta = Delta_ref = -3 `sigmoid` is at ln 2; `hypo` asks for 0: L(-0.3) = 0.854355."""
    wrong = of_pairs([-15.0], [-12.0])
    assert losses("sigmoid", wrong, wrong).tolist() == close(LN2)
    assert losses("hypo", wrong, wrong).tolist() == close(0.854355)
    right = of_pairs([-12.0], [-15.0])
    assert losses("hypo", right, right).tolist() == close(LN2)


def test_dpop_at_and_below_the_reference() -> None:
    """At r_w = 0 no penalty: r_l = -1 gives L(0.1) = 0.644397. At r_w = -0.5 it is 50 * 0.5 nats: 0.1 (-0.5 + 1 - 25) =
    -2.45, L(-2.45) = 2.532772; the gradient of log pi_theta(y_w) is -0.1 (1 + 50) sigma(2.45)."""
    assert losses("dpop", of_pairs([-12.0], [-14.0])).tolist() == close(0.644397)
    below = of_pairs([-12.5], [-14.0])
    assert losses("dpop", below).tolist() == close(2.532772)
    leaf = replace(below, chosen=below.chosen.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(losses("dpop", leaf).sum(), leaf.chosen)
    assert gradient.tolist() == close(-5.1 / (1 + math.exp(-2.45)))
    assert losses("dpop", below, dpop_lambda=0.0).tolist() == close(losses("sigmoid", below).item())


# --- batches ----------------------------------------------------------------------------------------------------------


def gaps_of(*gaps: float) -> tuple[PairLogps, PairLogps]:
    """Pairs with these gaps Delta_theta - Delta_ref, one token each: the policy's margin is the gap."""
    zeros = [0.0] * len(gaps)
    return of_pairs(list(gaps), zeros, (1, 1)), of_pairs(zeros, zeros, (1, 1))


@pytest.mark.parametrize("gaps", [(3.0,), (3.0, 3.0, 3.0)])
def test_a_batch_whose_gaps_are_all_the_same(gaps: tuple[float, ...]) -> None:
    """The deviation is 0, so every pair is as usual: as `simpo`, and with beta as it is; L(0.3) = 0.554355."""
    policy, reference = gaps_of(*gaps)
    simpo = softplus(0.5 - 0.3)
    assert losses("alpha_dpo", policy, reference, is_training=True).tolist() == close(*[simpo] * len(gaps))
    assert losses("beta_dpo", policy, reference).tolist() == close(*[0.554355] * len(gaps))
    drawn = losses("beta_dpo", policy, reference, is_training=True).tolist()
    kept = max(1, round(0.8 * len(gaps)))
    assert sorted(drawn) == close(*[0.0] * (len(gaps) - kept), *[0.554355 * len(gaps) / kept] * kept)


def test_gaps_that_differ_by_rounding_count_as_the_same() -> None:
    """0.001 nats apart: the deviation 0.0005 counts as 0.01, so M* is +-0.05 and not +-1."""
    policy, reference = gaps_of(0.0, 0.001)
    found = losses("alpha_dpo", policy, reference, alpha_dpo_alpha=1.0, beta=1.0).tolist()
    assert found == close(softplus(0.5 - 0.05), softplus(0.5 + 0.05 - 0.001))


def test_two_gaps_are_one_deviation_apart() -> None:
    """Gaps 3 and 1 have the mean 2 and the deviation 1, of the batch and not of a sample: M* is 1 and -1. At beta 0.1,
    gamma 0.5 and alpha 0.1: L(0.3 - 0.6) and L(0.1 - 0.4) = 0.854355, alike."""
    assert losses("alpha_dpo", *gaps_of(3.0, 1.0)).tolist() == close(0.854355, 0.854355)


@pytest.mark.parametrize("num_pairs", [1, 2, 7, 10])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.8, 0.999, 1.0])
def test_the_share_that_is_drawn(share: float, num_pairs: int) -> None:
    """At least one pair, and its share rounded, where 2.5 is 2 as Python rounds it. The drawn ones count so much more
    that the mean is theirs."""
    ratios = [0.1 * number + 1 for number in range(num_pairs)]
    num_drawn = {(0.25, 10): 2, (0.5, 7): 4, (0.25, 2): 1, (0.5, 1): 1}.get(
        (share, num_pairs), max(1, round(share * num_pairs))
    )
    found = losses("beta_dpo", *gaps_of(*ratios), is_training=True, beta_dpo_share=share, beta_dpo_alpha=0.0).tolist()
    counts = [value / softplus(-0.1 * ratio) for value, ratio in zip(found, ratios, strict=True)]
    assert sorted(counts) == close(*[0.0] * (num_pairs - num_drawn), *[num_pairs / num_drawn] * num_drawn)


def test_beta_rises_with_the_drawn_pairs_alone() -> None:
    """Of gaps 0 and 4 (mean 2) one is drawn, equally likely by their gaps. Its own gap raises or lowers beta: 0.1 (1 +
    0.6 (4 - 2)) = 0.22, L(0.88) = 0.346976, or 0.1 (1 - 1.2) < 0.001: L(0) = ln 2. It counts twice."""
    policy, reference = gaps_of(0.0, 4.0)
    seen = set()
    for number in range(1, 12):
        moments = {"beta_dpo": MarginMoments(mean=torch.tensor(2.0), deviation=torch.tensor(2.0), num_updates=number)}
        found = losses("beta_dpo", policy, reference, is_training=True, beta_dpo_share=0.5, moments=moments).tolist()
        is_second = found[0] == 0
        assert found == close(*((0.0, 2 * 0.346976) if is_second else (2 * LN2, 0.0)))
        seen.add(is_second)
    assert seen == {True, False}


@pytest.mark.nightly
def test_how_often_a_pair_is_drawn() -> None:
    """One of three pairs, 0, 2 and -2 deviations off: with weights 1, e^-2 and e^-2 the first is drawn in 1 / (1 + 2
    e^-2) = 78.7 % of the batches. Over 2000 of them the standard error is 0.9 %. The largest weight times exponential
    noise, which is no such draw, would be the first in 82.5 %."""
    policy, reference = gaps_of(1.0, 5.0, -3.0)
    moments = MarginMoments(mean=torch.tensor(1.0), deviation=torch.tensor(2.0), num_updates=1)
    times = 0
    for number in range(2000):
        of_batch = {"beta_dpo": replace(moments, num_updates=number)}
        found = losses("beta_dpo", policy, reference, is_training=True, beta_dpo_share=0.34, moments=of_batch)
        times += int(found[0] > 0)
    assert times / 2000 == pytest.approx(1 / (1 + 2 * math.exp(-2)), abs=0.019)


@pytest.mark.parametrize("name", NAMES)
def test_all_weights_zero_are_no_loss_and_no_gradient(name: str) -> None:
    policy, reference = gaps_of(1.0, -2.0, 0.5)
    leaf = replace(policy, chosen=policy.chosen.clone().requires_grad_())
    total = losses(name, leaf, reference, weights=[0.0] * 3).sum()
    (gradient,) = torch.autograd.grad(total, leaf.chosen)
    assert (total.item(), gradient.tolist()) == (0.0, [0.0] * 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_log_prob_that_is_not_finite_is_never_hidden(name: str, bad: float) -> None:
    """Of the policy's chosen completion: the sum of the batch is not finite, so the run stops, whatever is drawn."""
    policy, reference = gaps_of(bad, 1.0, 2.0)
    assert not math.isfinite(losses(name, policy, reference).sum().item())
    for number in range(8):
        earlier = {
            n: MarginMoments(mean=torch.tensor(0.0), deviation=torch.tensor(1.0), num_updates=number) for n in NAMES
        }
        found = losses(name, policy, reference, is_training=True, beta_dpo_share=0.3, moments=earlier)
        assert not math.isfinite(found.sum().item())


@pytest.mark.parametrize("name", NAMES)
def test_margins_of_ten_thousand_nats_are_finite(name: str) -> None:
    for far in (1e4, -1e4):
        policy, reference = gaps_of(far, 0.0, 1.0)
        leaf = replace(policy, chosen=policy.chosen.clone().requires_grad_())
        total = losses(name, leaf, reference).sum()
        (gradient,) = torch.autograd.grad(total, leaf.chosen)
        assert math.isfinite(total.item())
        assert all(map(math.isfinite, gradient.tolist()))


# --- moments ----------------------------------------------------------------------------------------------------------


def test_the_gap_of_a_loss_by_hand() -> None:
    """Of the pair above: 4 - 1 = 3 nats for `beta_dpo`, and per token 1.5 - 0.85 = 0.65 for `alpha_dpo`. Without
    gradient."""
    policy = replace(POLICY, chosen=POLICY.chosen.clone().requires_grad_())
    found = moments_after({}, policy, REFERENCE, loss_types=NAMES, options=LossOptions())
    assert found.keys() == {"alpha_dpo", "beta_dpo"}
    assert found["beta_dpo"].mean.tolist() == pytest.approx(3.0)
    assert found["alpha_dpo"].mean.tolist() == pytest.approx(0.65, abs=1e-6)
    for moments in found.values():
        assert (moments.deviation.item(), moments.num_updates) == (0.0, 1)
        assert not moments.mean.requires_grad
        assert not moments.deviation.requires_grad


def test_moments_of_three_batches() -> None:
    """Means 2, 4, 1 and deviations 1, 0, 3: 0.9 (0.9 * 2 + 0.1 * 4) + 0.1 = 2.08; 0.9 * 0.9 + 0.1 * 3 = 1.11."""
    moments = MarginMoments.of(torch.tensor([1.0, 3.0])).after(torch.tensor([4.0])).after(torch.tensor([-2.0, 4.0]))
    assert moments.record() == pytest.approx({"mean": 2.08, "deviation": 1.11, "num_updates": 3}, abs=1e-6)
    assert moments.standardised(torch.tensor([2.08, 3.19])).tolist() == close(0.0, 1.0)
    assert type(moments.record()["mean"]) is float
    trained = MarginMoments.of(torch.tensor([1.0, 3.0], requires_grad=True))
    assert not trained.mean.requires_grad
    assert not trained.deviation.requires_grad


def test_moments_of_another_loss_are_not_read() -> None:
    other = {"beta_dpo": MarginMoments(mean=torch.tensor(9.0), deviation=torch.tensor(2.0), num_updates=3)}
    assert losses("alpha_dpo", moments=other).tolist() == losses("alpha_dpo").tolist()


@pytest.mark.parametrize("name", ["alpha_dpo", "beta_dpo"])
def test_the_target_and_beta_have_no_gradient(name: str) -> None:
    """The gradient of a pair's log-prob is that with the others and the moments held: by finite differences it would
    not be."""
    policy, reference = gaps_of(3.0, -1.0)
    leaf = replace(policy, chosen=policy.chosen.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(losses(name, leaf, reference, beta=1.0, beta_dpo_share=1.0).sum(), leaf.chosen)
    if name == "alpha_dpo":  # targets 0.5 + 0.1 and 0.5 - 0.1: -sigma(target - gap)
        expected = [-1 / (1 + math.exp(3.0 - 0.6)), -1 / (1 + math.exp(-1.0 - 0.4))]
    else:  # alone, beta is 1: -sigma(-gap)
        expected = [-1 / (1 + math.exp(3.0)), -1 / (1 + math.exp(-1.0))]
    assert gradient.tolist() == close(*expected)


def test_rewards_have_no_gradient() -> None:
    policy = replace(
        POLICY, chosen=POLICY.chosen.clone().requires_grad_(), rejected=POLICY.rejected.clone().requires_grad_()
    )
    for reward in implicit_rewards(policy, REFERENCE, NAMES, LossOptions()):
        assert not reward.requires_grad


def test_each_loss_has_one_weight() -> None:
    for weights in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="zip"):
            preference_loss(POLICY, REFERENCE, loss_types=["hypo", "dpop"], loss_weights=weights, options=LossOptions())


def test_moments_of_several_losses_go_on_each_by_itself() -> None:
    """A loss that joins later begins with that batch; one that has left is no longer among them."""
    options = LossOptions()
    first = moments_after({}, *gaps_of(1.0, 3.0), loss_types=["beta_dpo", "hypo"], options=options)
    second = moments_after(first, *gaps_of(4.0, 4.0), loss_types=["alpha_dpo", "beta_dpo"], options=options)
    assert second["beta_dpo"].record() == pytest.approx({"mean": 2.2, "deviation": 0.9, "num_updates": 2})
    assert second["alpha_dpo"].record() == pytest.approx({"mean": 4.0, "deviation": 0.0, "num_updates": 1})
    assert moments_after(second, *gaps_of(1.0), loss_types=["alpha_dpo"], options=options).keys() == {"alpha_dpo"}


# --- per token or summed ----------------------------------------------------------------------------------------------


def is_per_token(name: str) -> bool:
    """Whether completions of twice the tokens with the same log-probs per token have the same loss."""
    needs = LOSSES[name].needs_reference
    options = LossOptions(label_smoothing=1e-3 if name == "exo_pair" else 0.0)
    found = []
    for times in (1, 2):
        lengths = (5 * times, 4 * times)
        policy, reference = of_pairs([-10.0 * times], [-14.0 * times], lengths), None
        if needs:
            reference = of_pairs([-12.0 * times], [-13.0 * times], lengths)
        found.append(preference_loss(policy, reference, loss_types=[name], loss_weights=[1.0], options=options).item())
    return found[0] == pytest.approx(found[1], abs=1e-6)


def test_the_page_says_which_losses_are_per_token() -> None:
    listed = re.search(r"^Per token: (.*?)\.\s", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == {name for name in LOSSES if is_per_token(name)}
