"""The demo's estimates against a world small enough to enumerate: 6 tokens, 4 positions, 1296 texts.

Every expectation in it is a plain sum over all texts, in fp64. Where an estimate is a sample mean, its standard error
is part of what is tested: the truth lies within 4 of them, and they are small enough for that to mean something.
"""

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.demo.checks import agreement, bounded, check_all, exceeds, first_loss
from holdfast.demo.experiment import sample_pairs
from holdfast.demo.frontier import Frontier, Optimum, frontier, optimal_policy
from holdfast.demo.policy import (
    Estimate,
    Measurement,
    make_policy,
    measure,
    preference_accuracy,
    pretrain,
    sample_texts,
    text_kls,
    text_logps,
)
from holdfast.demo.results import ArmResult, Check, DemoResult
from holdfast.demo.world import BOS_ID, Chain, Pairs, World, make_tokenizer, make_world

BETAS = (4.0, 1.0, 0.4, 0.1)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(vocabulary_size=6, length=4, seed=3)


@pytest.fixture(scope="module")
def texts() -> Tensor:
    return torch.tensor(list(itertools.product(range(6), repeat=4)))


@pytest.fixture(scope="module")
def reference(world: World) -> nn.Module:
    """A model that has learnt the source only roughly: the weights of importance sampling must make up for it."""
    policy = make_policy(world, hidden_size=16, num_layers=1, seed=1)
    pretrain(policy, world, num_steps=120, generator=seeded(1), texts_per_step=64)
    return policy


@pytest.fixture(scope="module")
def policy(world: World) -> nn.Module:
    """Another model, several nats away from the reference."""
    return make_policy(world, hidden_size=16, num_layers=1, seed=2).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_within(estimate: Estimate, truth: float, largest_error: float) -> None:
    assert 0 < estimate.error < largest_error
    assert abs(estimate.value - truth) < 4 * estimate.error


# --- the world ------------------------------------------------------------------------------------------------------


def test_reward_by_hand() -> None:
    """Score t(u, v) = 100 t + 10 u + v: for the text 4, 2 after <bos> = 1 it is (0 + 10 + 4) + (100 + 40 + 2) = 156."""
    step, before, token = torch.meshgrid(torch.arange(2), torch.arange(5), torch.arange(5), indexing="ij")
    scores = (100 * step + 10 * before + token).double()
    by_hand = World(source=Chain(steps=torch.zeros(2, 5, 5)), scores=scores)
    assert by_hand.reward(torch.tensor([[4, 2], [0, 0]])).tolist() == [156, 110]


def test_source_probabilities_sum_to_one(world: World, texts: Tensor) -> None:
    assert world.source.token_logps(texts).sum(1).logsumexp(0).item() == pytest.approx(0, abs=1e-9)


def test_source_samples_have_the_source_probabilities(world: World, texts: Tensor) -> None:
    """Counts of the last two tokens, which depend on every step before them, against the enumerated marginal."""
    probabilities = world.source.token_logps(texts).sum(1).exp().view(36, 36).sum(0)
    drawn = world.source.sample(20_000, seeded(0))
    shares = torch.bincount(6 * drawn[:, 2] + drawn[:, 3], minlength=36) / 20_000
    errors = (probabilities * (1 - probabilities) / 20_000).sqrt()
    assert ((shares - probabilities).abs() < 5 * errors + 1e-4).all()


@pytest.mark.parametrize("beta", BETAS)
def test_tilted_source_is_the_enumerated_one(world: World, texts: Tensor, beta: float) -> None:
    unnormalised = world.source.token_logps(texts).sum(1) + world.reward(texts) / beta
    tilted, log_partition = world.tilted_source(beta)
    assert log_partition == pytest.approx(unnormalised.logsumexp(0).item(), abs=1e-9)
    torch.testing.assert_close(tilted.token_logps(texts).sum(1), unnormalised.log_softmax(0), rtol=0, atol=1e-9)


def test_labels_have_the_frequency_of_bradley_terry(world: World) -> None:
    better, worse = torch.tensor([3, 4, 5, 3]), torch.tensor([5, 5, 4, 4])
    margin = float(world.reward(better[None]) - world.reward(worse[None]))
    expected = 1 / (1 + math.exp(-margin))
    assert abs(expected - 0.5) > 0.05, "a pair that the labels could not tell from a coin"
    pairs = world.label(better.expand(20_000, -1), worse.expand(20_000, -1), seeded(0))
    is_better = (pairs.chosen == better).all(1)
    assert ((pairs.rejected == worse).all(1) == is_better).all()
    assert abs(is_better.double().mean().item() - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)


def test_same_seed_same_world() -> None:
    first, second, other = make_world(seed=5), make_world(seed=5), make_world(seed=6)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.source.steps, second.source.steps)
    assert not torch.equal(first.scores, other.scores)


def test_world_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"world of 3 tokens and texts of 11 .* 0 words are left. Ask for at least 4"):
        make_world(vocabulary_size=3)


def test_tokenizer_names_words_by_their_ids() -> None:
    tokenizer = make_tokenizer(16)
    assert tokenizer.decode([3, 15]) == "w3 w15"
    assert tokenizer("w7 w3")["input_ids"] == [7, 3]
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (16, 0, 1, 2)


def test_rows_are_token_ids() -> None:
    pairs = Pairs(chosen=torch.tensor([[3, 4]]), rejected=torch.tensor([[5, 3]]))
    assert pairs.rows() == {"prompt_ids": [[1]], "chosen_ids": [[3, 4]], "rejected_ids": [[5, 3]]}


# --- policies -------------------------------------------------------------------------------------------------------


def test_policy_probabilities_sum_to_one(reference: nn.Module, texts: Tensor) -> None:
    assert text_logps(reference, texts).logsumexp(0).item() == pytest.approx(0, abs=1e-6)


def test_policy_learnt_the_source(reference: nn.Module, world: World, texts: Tensor) -> None:
    """KL(source || model), by enumeration: below 0.3 nats per text, where an untrained model is beyond 1."""

    def distance(model: nn.Module) -> float:
        source = world.source.token_logps(texts).sum(1)
        return float((source.exp() * (source - text_logps(model, texts))).sum())

    untrained = make_policy(world, hidden_size=16, num_layers=1, seed=1)
    assert distance(reference) < 0.3 < 1 < distance(untrained)


def test_samples_with_a_cache_have_the_policy_s_probabilities(policy: nn.Module, texts: Tensor) -> None:
    probabilities = text_logps(policy, texts).exp().view(36, 36).sum(0)  # of the last two tokens
    drawn = sample_texts(policy, num_texts=20_000, length=4, generator=seeded(0))
    shares = torch.bincount(6 * drawn[:, 2] + drawn[:, 3], minlength=36) / 20_000
    errors = (probabilities * (1 - probabilities) / 20_000).sqrt()
    assert ((shares - probabilities).abs() < 5 * errors).all()


def test_measuring_leaves_the_mode_of_training(policy: nn.Module) -> None:
    for was_training in (True, False):
        policy.train(was_training)
        sample_texts(policy, num_texts=2, length=2, generator=seeded(0))
        assert policy.training is was_training


def test_kl_estimator_has_the_enumerated_mean(policy: nn.Module, reference: nn.Module, texts: Tensor) -> None:
    """The mean over all texts, weighted by their probability, is the KL itself; and each estimate is not negative."""
    logps, estimates = text_logps(policy, texts), text_kls(policy, reference, texts)
    kl = float((logps.exp() * (logps - text_logps(reference, texts))).sum())
    assert kl > 0.5
    assert float((logps.exp() * estimates).sum()) == pytest.approx(kl, abs=1e-6)
    assert estimates.min() >= 0


def test_measurement_against_enumeration(policy: nn.Module, reference: nn.Module, world: World, texts: Tensor) -> None:
    logps = text_logps(policy, texts)
    found = measure(policy, reference, world, num_texts=4000, generator=seeded(0))
    assert_within(found.kl, float((logps.exp() * (logps - text_logps(reference, texts))).sum()), 0.02)
    assert_within(found.reward, float((logps.exp() * world.reward(texts)).sum()), 0.03)
    assert_within(found.fluency, float((logps.exp() * world.source.token_logps(texts).mean(1)).sum()), 0.05)


def test_standard_error_by_hand() -> None:
    """1, 2, 3, 4: mean 2.5, sample variance 5/3, so the error is sqrt(5/3) / 2 = 0.645497."""
    found = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (found.value, found.error) == (2.5, pytest.approx(0.645497, abs=1e-6))


def test_preference_accuracy_against_the_model_s_own_loss(
    policy: nn.Module, reference: nn.Module, world: World
) -> None:
    """Text by text, log pi(y) from the loss that transformers computes for labels: minus 4 tokens times their mean."""
    pairs = sample_pairs(reference, world, 100, seeded(0))

    def logp(model: nn.Module, text: Tensor) -> float:
        ids = torch.cat((torch.tensor([BOS_ID]), text))[None]
        with torch.no_grad():
            return -4 * float(model(input_ids=ids, labels=ids).loss)

    def share(reward_of) -> float:
        rows = zip(pairs.chosen, pairs.rejected, strict=True)
        return sum(reward_of(chosen) > reward_of(rejected) for chosen, rejected in rows) / 100

    anchored = share(lambda text: logp(policy, text) - logp(reference, text))
    alone = share(lambda text: logp(policy, text))
    assert anchored != alone
    assert preference_accuracy(policy, reference, pairs).value == pytest.approx(anchored, abs=1e-9)
    assert preference_accuracy(policy, None, pairs).value == pytest.approx(alone, abs=1e-9)
    assert preference_accuracy(policy, policy, pairs).value == 0


def test_pairs_are_of_different_texts(reference: nn.Module, world: World) -> None:
    pairs = sample_pairs(reference, world, 500, seeded(0))
    assert pairs.chosen.shape == pairs.rejected.shape == (500, 4)
    assert (pairs.chosen != pairs.rejected).any(1).all()


@pytest.mark.parametrize(("strength", "is_narrow"), [(6.0, True), (200.0, False)])
def test_a_narrow_policy_is_asked_until_there_are_enough_pairs(
    strength: float, is_narrow: bool, reference: nn.Module, world: World
) -> None:
    """A policy that hardly writes anything but one word draws most pairs of one text twice, or all of them."""
    narrow: Any = copy.deepcopy(reference)
    narrow.lm_head = nn.Linear(narrow.lm_head.in_features, narrow.lm_head.out_features)
    with torch.no_grad():
        narrow.lm_head.weight.zero_()
        narrow.lm_head.bias.zero_()[4] = strength
    if is_narrow:
        pairs = sample_pairs(narrow, world, 500, seeded(0))
        assert pairs.chosen.shape == (500, 4)
        assert (pairs.chosen != pairs.rejected).any(1).all()
        return
    with pytest.raises(ValueError, match="draws gave one text twice each"):
        sample_pairs(narrow, world, 500, seeded(0))


# --- the frontier ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_optimal_policy_against_enumeration(reference: nn.Module, world: World, texts: Tensor, beta: float) -> None:
    reference_logps, rewards = text_logps(reference, texts), world.reward(texts)
    unnormalised = reference_logps + rewards / beta
    logps = unnormalised.log_softmax(0)
    found = optimal_policy(reference, world, beta, num_texts=20_000, generator=seeded(0))
    assert_within(found.log_partition, float(unnormalised.logsumexp(0)), 0.03)
    assert_within(found.reward, float((logps.exp() * rewards).sum()), 0.03)
    assert_within(found.kl, float((logps.exp() * (logps - reference_logps)).sum()), 0.1)
    assert_within(found.fluency, float((logps.exp() * world.source.token_logps(texts).mean(1)).sum()), 0.05)
    assert 5_000 < found.effective_texts < 20_000


def test_no_distribution_over_texts_is_above_the_ceiling(reference: nn.Module, world: World, texts: Tensor) -> None:
    """Random tilts of the reference lie below it; the optimum at a beta of the grid lies on it, to its own error."""
    optima = frontier(reference, world, BETAS, num_texts=4000, generator=seeded(0))
    assert [optimum.beta for optimum in optima.optima] == sorted(BETAS, reverse=True)
    reference_logps, rewards = text_logps(reference, texts), world.reward(texts)

    def reward_and_ceiling(logps: Tensor) -> tuple[float, Estimate]:
        kl = float((logps.exp() * (logps - reference_logps)).sum())
        return float((logps.exp() * rewards).sum()), optima.reward_ceiling(kl)

    for beta in BETAS:
        reward, ceiling = reward_and_ceiling((reference_logps + rewards / beta).log_softmax(0))
        assert abs(reward - ceiling.value) < 4 * ceiling.error + 1e-3
    for seed in range(20):
        noise = torch.randn(len(texts), generator=seeded(seed), dtype=torch.float64)
        reward, ceiling = reward_and_ceiling((reference_logps + rewards * seed / 10 + noise).log_softmax(0))
        assert reward < ceiling.value + 4 * ceiling.error


# --- the checks -----------------------------------------------------------------------------------------------------

LN2 = math.log(2)


def measurement(reward: float = 1.0, kl: float = 1.0, fluency: float = -1.5) -> Measurement:
    return Measurement(
        reward=Estimate(value=reward, error=0.01),
        kl=Estimate(value=kl, error=0.01),
        fluency=Estimate(value=fluency, error=0.01),
    )


def arm(name: str, found: Measurement | None = None, **changes) -> ArmResult:
    result = ArmResult(
        name=name,
        label=name,
        measurement=found or measurement(),
        accuracy=Estimate(value=0.7, error=0.01),
        num_reference_bytes=0,
        seconds=1.0,
        losses=(LN2, 0.6),
        waypoints=(),
        held_out_logps=(-5.0, -6.0),
    )
    return replace(result, **changes)


def line_frontier() -> Frontier:
    """One beta, 2, with log Z = 1: the ceiling at KL k is 2 (k + 1)."""
    exactly = Estimate(value=0.0, error=0.0)
    log_partition = Estimate(value=1.0, error=0.0)
    optimum = Optimum(
        beta=2, reward=exactly, kl=exactly, fluency=exactly, log_partition=log_partition, effective_texts=1
    )  # fmt: skip
    return Frontier(optima=(optimum,))


def as_expected() -> tuple[ArmResult, ...]:
    return (
        arm("model"), arm("adapter"), arm("precomputed"), arm("tr-dpo", measurement(kl=2.0)),
        arm("none", measurement(fluency=-3.0), losses=(4.0, 0.6)),
    )  # fmt: skip


def test_all_is_as_expected() -> None:
    checks = check_all(as_expected(), line_frontier())
    assert [check.is_met for check in checks] == [True] * 5
    assert [check.is_gate for check in checks] == [True, True, True, False, False]


def test_a_first_loss_that_is_not_ln_2_is_noticed() -> None:
    assert first_loss((arm("model"), arm("adapter", losses=(LN2 + 9e-6,)))).is_met
    found = first_loss((arm("model"), arm("adapter", losses=(LN2 - 2e-5, LN2))))
    assert not found.is_met
    assert found.found == "at worst 0.693127 (adapter)"


@pytest.mark.parametrize(
    "changes", [{"losses": (LN2, 0.6002)}, {"held_out_logps": (-5.0, -6.0002)}, {"losses": (LN2,)}]
)
def test_fixed_arms_that_differ_are_noticed(changes: dict) -> None:
    assert agreement((arm("model"), arm("adapter"), arm("precomputed", losses=(LN2, 0.60005)))).is_met
    assert not agreement((arm("model"), arm("adapter"), arm("precomputed", **changes))).is_met


def test_a_policy_above_the_frontier_is_noticed() -> None:
    """At KL 1 the ceiling is 4; the error of the difference is hypot(0.01, 0.02, 0.001) = 0.0224, five are 0.112."""
    assert bounded((arm("model", measurement(reward=4.10)),), line_frontier()).is_met
    above = bounded((arm("model"), arm("adapter", measurement(reward=4.12))), line_frontier())
    assert not above.is_met
    assert above.found == "highest against it: adapter, 5.4 standard errors above"


def test_what_is_larger_beyond_three_errors() -> None:
    """The error of the difference of two numbers with errors 0.03 and 0.04 is 0.05, three of them 0.15."""
    low = Estimate(value=1.0, error=0.03)
    assert exceeds(Estimate(value=1.16, error=0.04), low)
    assert not exceeds(Estimate(value=1.14, error=0.04), low)


def test_findings_that_are_missed_are_told_and_only_gates_fail(tmp_path: Path) -> None:
    *others, _, _ = as_expected()
    dull = (*others, arm("tr-dpo"), arm("none", losses=(4.0, 0.6)))
    checks = check_all(dull, line_frontier())
    assert [check.is_met for check in checks] == [True, True, True, False, False]
    assert demo_result(checks, tmp_path).exit_code == 0
    broken = (*checks[1:], replace(checks[0], is_met=False))
    assert demo_result(broken, tmp_path).exit_code == 1


def demo_result(checks: tuple[Check, ...], folder: Path) -> DemoResult:
    optima = line_frontier()
    return DemoResult(
        seed=0,
        beta=2.0,
        start=measurement(kl=0.0),
        source_fluency=Estimate(value=-1.5, error=0.01),
        best_accuracy=Estimate(value=0.8, error=0.01),
        arms=as_expected(),
        target=optima.optima[0],
        frontier=optima,
        checks=checks,
        seconds=1.0,
        output_dir=folder,
    )
