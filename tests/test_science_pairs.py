"""Claims about the reference, tried: which pairs are ranked rightly, chosen or drawn anew, worked by hand."""

import math
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from holdfast.demo.world import Pairs, make_world

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from science import choosing, guiding, ranking
from science.settings import QUICK, better_first, margins, setting, true_margins
from science.training import trained_and_measured

TINY = replace(
    QUICK, name="tiny", num_pretrain_steps=4, num_train_steps=8, num_pairs_per_step=8, num_held_out_pairs=60,
    num_measured_texts=60,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_setting(tmp_path_factory):
    return setting(4, TINY, tmp_path_factory.mktemp("science") / "setting")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- ranking ----------------------------------------------------------------------------------------------------------


def test_the_idealised_policy_worked_by_hand():
    """A reward larger by 1 is preferred by alpha = sigmoid(1) = 0.731 of people, and log(alpha / (1 - alpha)) = 1. The
    reference is wrong by 2 nats: at beta 1 the optimum is wrong by 2 - 1 = 1, at 1/4 right by 4 - 2 = 2."""
    alpha = torch.sigmoid(tensor(1.0))
    rewards = torch.log(alpha / (1 - alpha))
    assert ranking.idealised_margins(tensor(-2), rewards, 1.0).item() == pytest.approx(-1)
    assert ranking.idealised_margins(tensor(-2), rewards, 0.25).item() == pytest.approx(2)


def test_the_idealised_policy_is_the_optimum_of_a_world_of_25_texts():
    """Two words beside the special tokens, texts of two tokens: pi* = p exp(r / beta) / Z, every text written out."""
    world, beta = make_world(vocabulary_size=5, length=2, seed=1), 0.7
    texts = torch.tensor([*product(range(5), repeat=2)])
    unnormalised = world.source.token_logps(texts).sum(1) + world.reward(texts) / beta
    optimum = unnormalised - unnormalised.logsumexp(0)
    first, second = torch.tensor([*product(range(25), repeat=2)]).T
    pairs = Pairs(chosen=texts[first], rejected=texts[second])
    reference = world.source.token_logps(pairs.chosen).sum(1) - world.source.token_logps(pairs.rejected).sum(1)
    predicted = ranking.idealised_margins(reference, true_margins(world, pairs), beta)
    torch.testing.assert_close(predicted, optimum[first] - optimum[second])
    exact, _ = world.tilted_source(beta)
    torch.testing.assert_close(exact.token_logps(texts).sum(1), optimum)


def test_the_loss_at_which_a_pair_turns_over():
    """At beta 1/2: -log sigmoid(0) = ln 2, -log sigmoid(1) = 0.313262, -log sigmoid(2) = 0.126928, and -log sigmoid(-1)
    = 1.313262 for a pair that the reference ranks rightly. It is DPO's loss where D = 0, and less where D > 0."""
    reference = tensor(0, -2, -4, 2)
    needed = ranking.needed_losses(reference, 0.5)
    assert needed.tolist() == pytest.approx([math.log(2), 0.313262, 0.126928, 1.313262], abs=1e-6)
    assert torch.equal(ranking.dpo_losses(torch.zeros(4).double(), reference, 0.5), needed)
    assert (ranking.dpo_losses(torch.full((4,), 0.1).double(), reference, 0.5) < needed).all()
    assert (ranking.dpo_losses(torch.full((4,), -0.1).double(), reference, 0.5) > needed).all()


def test_shares_of_pairs_that_turn_over():
    """Of the two that the reference ranks wrongly one turns over; of the three that it ranks rightly one is turned the
    wrong way. Ties of the reference count in neither, and a tie of the policy is not right."""
    reference, own = tensor(-1, -2, 3, 4, 5, 0), tensor(1, 0, -1, 2, 0.5, 5)
    assert ranking.flipped_share(own, reference) == pytest.approx(1 / 2)
    assert ranking.unflipped_share(own, reference) == pytest.approx(1 / 3)
    assert ranking.share(own > 0) == pytest.approx(4 / 6)
    assert ranking.flipped_share(own, reference.abs()) == 0


def test_pairs_as_they_are_labelled_without_mistakes():
    world = make_world(seed=0)
    texts = world.source.sample(40, torch.Generator().manual_seed(0))
    first, second = texts.chunk(2)
    better = better_first(world, Pairs(chosen=first, rejected=second))
    rewards = world.reward(first), world.reward(second)
    assert torch.equal(world.reward(better.chosen), torch.maximum(*rewards))
    assert torch.equal(world.reward(better.rejected), torch.minimum(*rewards))


def test_what_is_said_of_the_ranking_of_a_policy(tiny_setting):
    """Counted anew for a policy that stays where it was: nothing turns over, all losses are ln 2, and a pair has the
    loss that it needs if, and only if, the reference ranks it rightly."""
    options = {"loss_type": "sigmoid", "beta": 1.0, "learning_rate": 0.0}
    numbers = ranking.ranked(tiny_setting, options)
    reference = margins(tiny_setting.policy, tiny_setting.pairs)
    better = better_first(tiny_setting.world, tiny_setting.held_out)
    ideal = margins(tiny_setting.policy, better) + true_margins(tiny_setting.world, better)
    assert numbers["training_wrong"] == pytest.approx(sum(each < 0 for each in reference.tolist()) / len(reference))
    assert numbers["training_ranking"] == pytest.approx(1 - numbers["training_wrong"])
    assert (numbers["training_flipped"], numbers["training_unflipped"], numbers["true_flipped"]) == (0, 0, 0)
    assert numbers["reached_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert numbers["needed_loss"] < math.log(2)
    assert numbers["ideal_ranking"] == pytest.approx(sum(each > 0 for each in ideal.tolist()) / len(ideal))
    assert numbers["rule"] == 1


@pytest.mark.nightly
def test_a_loss_per_token_is_one_per_text_where_all_texts_are_of_one_length(tiny_setting):
    per_text = ranking.ranked(tiny_setting, {"loss_type": "sigmoid", "beta": 1.0})
    per_token = ranking.ranked(tiny_setting, {"loss_type": "sigmoid_norm", "beta": 11.0})
    for measure in ("reward", "kl", "training_flipped", "true_ranking"):
        assert per_token[measure] == pytest.approx(per_text[measure], abs=1e-4)
    assert per_text["rule"] == 1


def test_formula_and_optimum_agree(tiny_setting):
    numbers = ranking.formula_and_optimum(tiny_setting, {"beta": 0.25})
    assert numbers["gap"] == pytest.approx(0, abs=1e-9)
    assert numbers["agrees"] == 1
    assert 0.3 < numbers["reference_agrees"] < 1


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "keep", "places"),
    [
        (0.5, "smallest", [1, 3]),
        (0.5, "largest", [0, 2]),
        (0.3, "smallest", [1]),  # round(1.2); of two that are equal, the first
        (0.75, "largest", [0, 1, 2]),
        (0.01, "largest", [0]),  # at least one
        (1.0, "smallest", [0, 1, 2, 3]),
    ],
)
def test_chosen_pairs(share, keep, places):
    assert choosing.chosen_pairs(tensor(3, 1, 2, 1), share, keep).tolist() == places


def test_alignment_potentials_worked_by_hand():
    """Explicit 1 and 3: mean 2, deviation 1, so -1 and 1. Implicit -4 and 2, in size 4 and 2: 1 and -1. Together -2 and
    2; with implicit 2 and -4 it is 0 and 0."""
    assert choosing.alignment_potentials(tensor(1, 3), tensor(-4, 2)).tolist() == pytest.approx([-2, 2])
    assert choosing.alignment_potentials(tensor(1, 3), tensor(2, -4)).tolist() == pytest.approx([0, 0])


def test_joint_probabilities_worked_by_hand():
    """Of 0 to 20 the quantiles at 5 and 95 % are 1 and 19. So 10 is 1/2, 14.5 is 3/4, 20 is 1 and 0 is 0. Twice 3/4 is
    (9/16) / (9/16 + 1/16) = 9/10; 3/4 and 1/4 are 1/2; 1 and 0 are 1/2 by rule."""
    values = torch.linspace(0, 20, 41, dtype=torch.float64)
    same, opposed = choosing.joint_probabilities(values, values), choosing.joint_probabilities(values, -values)
    at = {value: place for place, value in enumerate(values.tolist())}
    assert [same[at[value]].item() for value in (0.0, 10.0, 14.5, 20.0)] == pytest.approx([0, 0.5, 0.9, 1])
    assert opposed.tolist() == pytest.approx([0.5] * 41)


def test_what_is_trained_on_is_what_was_chosen(tiny_setting):
    """The quarter with the largest true margins has no wrong label, and its mean is that of the sorted list."""
    options = {"labels": "noisy", "share": 0.25, "loss_type": "sigmoid", "beta": 1.0, "keep": "largest"}
    numbers = choosing.trained_on_chosen(tiny_setting, options | {"by": "explicit"})
    found = choosing.pair_margins(tiny_setting, "noisy")
    largest = sorted(true_margins(tiny_setting.world, tiny_setting.pairs).tolist())[-TINY.num_pairs // 4 :]
    assert numbers["explicit"] == pytest.approx(sum(largest) / len(largest))
    assert numbers["right_labels"] == 1
    every = choosing.trained_on_chosen(tiny_setting, options | {"by": "all"})
    plain = trained_and_measured(tiny_setting, {"loss_type": "sigmoid", "beta": 1.0})
    assert {name: every[name] for name in plain} == pytest.approx(plain)
    assert every["implicit"] == pytest.approx(float(found["implicit"].mean()))
    assert torch.equal(found["reference"], margins(tiny_setting.policy, tiny_setting.pairs))


@pytest.mark.nightly
def test_labels_that_never_err(tiny_setting):
    certain = choosing.pair_margins(tiny_setting, "certain")
    noisy = choosing.pair_margins(tiny_setting, "noisy")
    assert torch.equal(certain["explicit"], noisy["explicit"].abs())
    assert torch.equal(certain["reference"].abs(), noisy["reference"].abs())


# --- guides and rounds ------------------------------------------------------------------------------------------------


def test_a_guide_that_did_not_learn_is_the_start_policy(tiny_setting):
    guided = guiding.guided(tiny_setting, {"beta": 1.0, "guide": {"beta": 1.0, "learning_rate": 0.0}})
    plain = trained_and_measured(tiny_setting, {"beta": 1.0})
    assert guided == pytest.approx(plain, abs=1e-5)


@pytest.mark.nightly
def test_one_round_is_one_run(tiny_setting):
    rounds = {"num_rounds": 1, "pairs": "parts", "reference": "base", "beta": 1.0}
    assert guiding.in_rounds(tiny_setting, rounds) == pytest.approx(trained_and_measured(tiny_setting, {"beta": 1.0}))


@pytest.mark.nightly
def test_a_guide_is_the_reference_of_the_second_training(tiny_setting, monkeypatch):
    """The policy begins where the guide began, and has the guide for its reference."""
    seen = []

    def noted(of, pairs, options, *, start=None, ref_model=None):
        policy = train(of, pairs, options, start=start, ref_model=ref_model)
        seen.append((pairs, options, start, ref_model, policy))
        return policy

    train = guiding.train
    monkeypatch.setattr(guiding, "train", noted)
    guide = {"beta": 2.0, "seed": 11}
    guiding.guided(tiny_setting, {"beta": 1.0, "guide": guide})
    first, second = seen
    assert (first[1], second[1]) == (guide, {"beta": 1.0})
    assert first[2] is second[2] is first[3] is None
    assert second[3] is first[4]
    assert first[0] is second[0] is tiny_setting.pairs


def test_rounds_differ_in_pairs_and_reference(tiny_setting, monkeypatch):
    """Two rounds of 32 pairs: which policy drew them, and which is the reference."""
    seen = []

    def noted(of, pairs, options, *, start, ref_model):
        policy = train(of, pairs, options, start=start, ref_model=ref_model)
        seen.append((pairs, start, ref_model, policy))
        return policy

    train = guiding.train
    monkeypatch.setattr(guiding, "train", noted)
    start = tiny_setting.policy
    for pairs, reference in (("parts", "before"), ("fresh", "base")):
        seen.clear()
        guiding.in_rounds(tiny_setting, {"num_rounds": 2, "pairs": pairs, "reference": reference, "beta": 1.0})
        (first, *begin, policy), (second, second_start, second_reference, _) = seen
        assert all(each is start for each in begin)
        assert second_start is policy
        assert second_reference is {"base": start, "before": policy}[reference]
        assert torch.equal(first.chosen, tiny_setting.pairs.chosen[:32])
        assert torch.equal(second.chosen, tiny_setting.pairs.chosen[32:64]) == (pairs == "parts")
        assert len(second.chosen) == 32
