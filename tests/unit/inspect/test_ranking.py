"""What is counted of how models rank pairs: the eight pairs of `ranked_pairs` by hand, and laws on drawn ones."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.inspect.ranking.bias import LengthBias
from holdfast.inspect.ranking.counts import Counts, Likeness, counts_of
from holdfast.inspect.ranking.flipping import AGREEMENTS, Objective, dpo_loss, is_wrong_at_optimum, loss_to_flip
from holdfast.inspect.ranking.groups import by_length, by_source, group_of
from holdfast.inspect.ranking.margins import margins, margins_per_token
from holdfast.inspect.ranking.movement import movement_of
from holdfast.inspect.ranking.picks import picks_after, picks_before
from holdfast.inspect.ranking.shares import Bin, Share, Spread, correlation, histogram, rank_correlation
from holdfast.losses.modifiers import ModifierOptions
from holdfast.losses.objective import LossOptions
from ranked_pairs import AFTER_CHOSEN, AFTER_REJECTED, NAN, eight_pairs


def objective(*loss_types: str, weights=None, modifiers=None, **options) -> Objective:
    return Objective.of(LossOptions(**options), loss_types or ("sigmoid",), weights, modifiers)


def counts(**options) -> Counts:
    return counts_of(eight_pairs(), objective(**options))


# Ranking -------------------------------------------------------------------------------------------------------------


def test_what_is_ranked_wrongly_by_hand():
    """4 of 8 by sum: 0.5, standard error sqrt(0.5 * 0.5 / 8) = 0.176777. 3 of 8 per token: sqrt(0.375 * 0.625 / 8)."""
    found = counts()
    assert margins(eight_pairs()).tolist() == [2, -8, -4, 5, 0, -20, 12, -2]
    assert margins_per_token(eight_pairs()).tolist() == [0, 1, -1, 1, 2, -2, 2, -1]
    assert (found.by_sum.wrong.count, found.by_sum.wrong.share, found.by_sum.tied.count) == (4, 0.5, 1)
    assert found.by_sum.wrong.standard_error == pytest.approx(0.1767767, abs=1e-7)
    assert (found.per_token.wrong.count, found.per_token.tied.count) == (3, 1)
    assert found.per_token.wrong.standard_error == pytest.approx(0.1711633, abs=1e-7)
    assert found.by_sum.margins.mean == pytest.approx(-15 / 8)
    assert found.by_sum.margins.quantiles[0.5] == -1  # between -2 and 0
    assert (found.by_sum.margins.least, found.by_sum.margins.most) == (-20, 12)
    assert found.chosen.mean == pytest.approx(-(2 + 2 + 2 + 2 + 2 + 3 + 1 + 3) / 8)
    assert found.rejected.mean == pytest.approx(-(2 + 3 + 1 + 3 + 4 + 1 + 3 + 2) / 8)


def test_the_loss_that_flips_a_pair_by_hand():
    """log(1 + exp(-beta c)) with beta 0.1 and c = 8, 4, 20, 2: log 1.449329, log 1.670320, log 1.135335, log 1.818731.
    Sorted 0.126928, 0.371100, 0.513015, 0.598139; their median is 0.442058."""
    flipping = counts().flipping
    assert flipping is not None
    assert flipping.loss is not None
    assert flipping.loss.num_values == 4
    assert (flipping.loss.least, flipping.loss.most) == pytest.approx((0.126928, 0.598139), abs=1e-6)
    assert flipping.loss.quantiles[0.5] == pytest.approx((0.371100 + 0.513015) / 2, abs=1e-6)
    assert {limit: share.count for limit, share in flipping.only_below.items()} == {0.5: 2, 0.1: 0, 0.01: 0}
    assert flipping.own_loss is None  # the run's loss is this one
    assert flipping.out_of_reach is not None
    assert flipping.out_of_reach.count == 0
    assert loss_to_flip(np.array([0.0]), 0.1) == pytest.approx(math.log(2))


def test_the_optimum_of_dpo_by_hand():
    """With beta 0.1, raters that agree to 0.6 add 10 log 1.5 = 4.05 nats and those of 0.9 add 10 log 9 = 21.97. So
    0.6 leaves -8 and -20 wrong, 0.8 (13.86) leaves -20, and 0.9 none."""
    flipping = counts().flipping
    assert flipping is not None
    assert {share: found.count for share, found in flipping.at_optimum.items()} == {
        0.6: 2, 0.7: 1, 0.8: 1, 0.9: 0, 0.95: 0, 0.99: 0
    }  # fmt: skip


@given(st.floats(-300, 300), st.floats(-300, 300), st.sampled_from([0.01, 0.1, 1.0]))
def test_a_pair_flips_just_where_the_theorem_says(reference, policy, beta):
    """R = 1 if and only if the loss is at most -log sigma(beta c), here with a loss that is far from rounding to 0."""
    reference_margin, policy_margin = np.array([reference]), np.array([policy])
    loss, limit = dpo_loss(reference_margin, policy_margin, beta), loss_to_flip(reference_margin, beta)
    if abs(policy) > 1e-6 and max(loss[0], limit[0]) > 1e-9:
        assert bool(loss[0] <= limit[0]) == (policy >= 0)


@given(st.floats(-50, 50), st.sampled_from(AGREEMENTS))
def test_the_optimum_is_where_the_expected_loss_is_least(margin, agreement):
    """-a log sigma(beta (g - margin)) - (1 - a) log sigma(-beta (g - margin)) over a grid of policies' margins g."""
    grid = np.linspace(margin - 60, margin + 60, 24_001)
    reference = np.full_like(grid, margin)
    expected = agreement * dpo_loss(reference, grid, 0.1) + (1 - agreement) * dpo_loss(grid, reference, 0.1)
    best = grid[expected.argmin()]
    if abs(best) > 0.01:
        assert is_wrong_at_optimum(np.array([margin]), 0.1, agreement)[0] == (best < 0)


LOG_9 = math.log(9)
RESTS = {  # losses, options -> the m from which on they do not fall, wrong pairs of the eight beyond it
    "dpo": (["sigmoid"], {}, math.inf, 0),
    "conservative dpo": (["sigmoid"], {"label_smoothing": 0.1, "beta": 0.5}, LOG_9, 2),  # 0.5 * (8, 4, 20, 2) > 2.197
    "hinge": (["hinge"], {"beta": 0.2}, 1.0, 2),  # 0.2 * (8, 4, 20, 2) > 1
    "exo": (["exo_pair"], {"label_smoothing": 0.1}, LOG_9, 0),
    "robust": (["robust"], {"label_smoothing": 0.1}, math.inf, 0),
    "ipo, per token": (["ipo"], {"beta": 0.4}, 0.5, 1),  # 0.4 * (1, 2, 1) > 0.5
    "sigmoid_norm, per token": (["sigmoid_norm"], {"beta": 10.0}, math.inf, 0),
    "a likelihood beside it": (["hinge", "sft"], {"beta": 0.2}, 1.0, 2),
    "a loss of weight 0": (["ipo", "sigmoid"], {}, math.inf, 0),
}


@pytest.mark.parametrize("case", RESTS.values(), ids=RESTS.keys())
def test_where_losses_come_to_rest(case):
    names, options, rest, beyond = case
    weights = [0.0, 1.0] if len(names) == 2 and names[0] == "ipo" else None
    aim = objective(*names, weights=weights, **options)
    assert aim.obstacle is None
    assert aim.rest == pytest.approx(rest, abs=1e-9)
    flipping = counts_of(eight_pairs(), aim).flipping
    assert flipping is not None
    assert flipping.out_of_reach is not None
    assert flipping.out_of_reach.count == beyond


def test_the_own_loss_at_which_pairs_flip_by_hand():
    """hinge, beta 0.2, m = 0.2 * (8, 4, 20, 2) = 1.6, 0.8, 4, 0.4: losses 0, 0.2, 0, 0.6; with weight 2 twice that.
    ipo, beta 0.5, per token m = 0.5 * (1, 2, 1): ((m - 0.5) / 0.5)^2 = 0, 1, 0."""
    hinge = counts_of(eight_pairs(), objective("hinge", weights=[2.0], beta=0.2)).flipping
    ipo = counts_of(eight_pairs(), objective("ipo", beta=0.5)).flipping
    assert hinge is not None
    assert hinge.own_loss is not None
    assert ipo is not None
    assert ipo.own_loss is not None
    assert (hinge.own_loss.mean, hinge.own_loss.most) == pytest.approx((2 * 0.8 / 4, 1.2))
    assert (ipo.own_loss.num_values, ipo.own_loss.mean, ipo.own_loss.most) == pytest.approx((3, 1 / 3, 1.0))


OBSTACLES = {
    "compares with no reference": (["simpo"], {}, None),
    "bco_pair is no function of the two margins": (["sigmoid", "bco_pair"], {}, None),
    "aot is no function": (["aot"], {}, None),
    "sigmoid and ipo compare sums with means": (["sigmoid", "ipo"], {}, None),
    "f_divergence_type js_divergence": (["sigmoid"], {"f_divergence_type": "js_divergence"}, None),
    "LD-DPO": (["sigmoid"], {}, ModifierOptions(ld_alpha=0.5)),
    "WPO": (["sigmoid"], {}, ModifierOptions(use_weighting=True)),
}


@pytest.mark.parametrize(("reason", "case"), OBSTACLES.items(), ids=OBSTACLES.keys())
def test_why_the_loss_of_a_flipped_pair_cannot_be_stated(reason, case):
    names, options, modifiers = case
    aim = objective(*names, modifiers=modifiers, **options)
    assert aim.obstacle is not None
    assert reason in aim.obstacle
    flipping = counts_of(eight_pairs(), aim).flipping
    assert flipping is not None
    assert (flipping.own_loss, flipping.out_of_reach) == (None, None)


# Lengths -------------------------------------------------------------------------------------------------------------


def test_length_bias_by_hand():
    """Differences -1, 6, 1, -1, 2, 0, -2, -1. By sum the shorter one is preferred in pairs 0, 1, 2, 3, 6 of the seven
    that differ (4 is tied, 7 prefers the longer one); per token the longer one in pairs 1, 4, 7. Of the three with a
    longer chosen completion 1 and 2 are wrong, of the four with a shorter one 7 is. Pair 1 is wrong by length alone."""
    bias = LengthBias.of(eight_pairs())
    difference = np.array([-1, 6, 1, -1, 2, 0, -2, -1])
    assert (bias.mean_chosen, bias.mean_rejected, bias.mean_difference) == (41 / 8, 37 / 8, 0.5)
    assert (bias.longer.count, bias.equal.count) == (3, 1)
    assert (bias.prefers_shorter.count, bias.prefers_shorter.num_pairs) == (5, 7)
    assert bias.prefers_longer_per_token.count == 3
    assert (bias.wrong_where_longer.count, bias.wrong_where_longer.num_pairs) == (2, 3)
    assert (bias.wrong_where_shorter.count, bias.wrong_where_shorter.num_pairs) == (1, 4)
    assert bias.wrong_by_length.count == 1
    assert bias.correlation == pytest.approx(np.corrcoef(margins(eight_pairs()), difference)[0, 1])
    assert bias.nats_per_token == pytest.approx(np.polyfit(difference, margins(eight_pairs()), 1)[0])


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
def test_correlations_are_those_of_torch_and_of_ranks(pairs):
    first, second = (np.array(values, dtype=np.float64) for values in zip(*pairs, strict=True))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert correlation(first, second) is None
        return
    assert correlation(first, second) == pytest.approx(
        float(torch.corrcoef(torch.tensor([*first, *second]).reshape(2, -1))[0, 1])
    )
    ranks = [
        [(values < each).sum() + ((values == each).sum() + 1) / 2 for each in values] for values in (first, second)
    ]
    assert rank_correlation(first, second) == pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1])


# Likeness ------------------------------------------------------------------------------------------------------------


def test_likeness_leaves_out_what_is_not_known():
    found = Likeness.of(eight_pairs())
    assert found is not None
    assert (found.num_known, found.above_zero.count, found.above_zero.num_pairs) == (7, 4, 7)
    assert found.ches.mean == pytest.approx(5 / 7)
    assert found.normalised.most == 0.8
    assert Likeness.of(eight_pairs(ches=np.full(8, NAN))) is None


# Groups --------------------------------------------------------------------------------------------------------------


def test_groups_are_the_counts_of_their_pairs_alone():
    """maths has rows 0, 2, 4, 6 with margins 2, -4, 0, 12; prose -8, 5, -20, -2. The longer completion has 6, 10, 3, 3,
    4, 10, 5, 5 tokens: two of 2 to 3, four of 4 to 7, two of 8 to 15."""
    sources = by_source(eight_pairs(), None, objective())
    assert [(each.name, each.reference.num_pairs, each.reference.by_sum.wrong.count) for each in sources] == [
        ("maths", 4, 1),
        ("prose", 4, 3),
    ]
    lengths = by_length(eight_pairs(), None, objective())
    assert [(each.name, each.reference.num_pairs, each.reference.by_sum.wrong.count) for each in lengths] == [
        ("2 to 3", 2, 1),
        ("4 to 7", 4, 1),
        ("8 to 15", 2, 2),
    ]
    assert sources[0].reference == counts_of(eight_pairs().where(np.array([True, False] * 4)), objective())


def test_pairs_without_a_source():
    assert by_source(eight_pairs(source=np.full(8, -1), sources=()), None, objective()) == ()
    some = by_source(eight_pairs(source=np.array([0, 0, -1, 0, 0, 0, 0, 0])), None, objective())
    assert [(each.name, each.reference.num_pairs) for each in some] == [("maths", 7), ("(none)", 1)]


# After training ------------------------------------------------------------------------------------------------------


def test_movement_by_hand():
    """Margins before 2, -8, -4, 5, 0, -20, 12, -2; after -1, 3, -1, 15, -1, 5, 15.7, -2. So 1 and 5 flip; 0 and 4
    unflip; 2 and 7 are still wrong, and of these only the margin of 2 rose. Chosen changes by -2, 5, -3, 0, -2, 5, 2.7,
    1, rejected by 1, -6, -6, -10, -1, -20, -1, 1: chosen fell in 0, 2, 4; of these the margin rose in 2, and rejected
    fell too in 2 and 4. Of pair 6 the chosen completion is at -0.1 per token, above log 0.9 = -0.105."""
    moved = movement_of(eight_pairs(), eight_pairs(AFTER_CHOSEN, AFTER_REJECTED), 0.1)
    flips = moved.by_sum
    assert [each.count for each in (flips.flipped, flips.unflipped, flips.still_wrong, flips.still_right)] == [
        2,
        2,
        2,
        2,
    ]
    assert (flips.flipped_of_wrong.count, flips.flipped_of_wrong.num_pairs, flips.towards.count) == (2, 4, 1)
    assert (moved.rose.count, moved.displaced.count, moved.squeezed.count) == (5, 3, 1)
    assert (moved.both_fell.count, moved.rejected_rose.count, moved.memorised.count) == (2, 2, 1)
    assert moved.chosen.mean == pytest.approx(6.7 / 8)
    assert moved.rejected.mean == pytest.approx(-42 / 8)
    assert moved.margins.mean == pytest.approx(48.7 / 8)
    assert moved.chosen_per_token.mean == pytest.approx(
        (-2 / 5 + 5 / 10 - 3 / 3 - 2 / 4 + 5 / 10 + 2.7 / 3 + 1 / 4) / 8
    )
    change = np.array([-3, 11, 3, 10, -1, 25, 3.7, 0])
    assert moved.loss is not None
    assert moved.loss.mean == pytest.approx(np.log(1 + np.exp(-0.1 * change)).mean())
    assert moved.length_correlation == pytest.approx(np.corrcoef(change, [-1, 6, 1, -1, 2, 0, -2, -1])[0, 1])
    assert movement_of(eight_pairs(), eight_pairs(), None).by_sum.flipped.count == 0


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [("row", np.arange(8), "0 and 0|10 and 1 at pair 1"), ("chosen_tokens", np.full(8, 9), "5 and 9 at pair 0")],
)
def test_other_pairs_are_not_compared(name, values, message):
    with pytest.raises(ValueError, match=f"their {name} differ: .*({message})"):
        movement_of(eight_pairs(), replace(eight_pairs(), **{name: values}), 0.1)


def test_fewer_pairs_are_not_compared():
    with pytest.raises(ValueError, match="8 and 7 pairs"):
        movement_of(eight_pairs(), eight_pairs().where(np.arange(7)), 0.1)


def test_a_group_has_both_models():
    group = group_of("all", eight_pairs(), eight_pairs(AFTER_CHOSEN, AFTER_REJECTED), objective())
    assert group.policy is not None
    assert group.policy.by_sum.wrong.count == 4
    assert group.policy.flipping is None


def test_the_pairs_to_look_at():
    assert [(pick.num_pairs, pick.places) for pick in picks_before(eight_pairs(), 2)] == [
        (4, (5, 1)),
        (3, (5, 2)),
        (7, (7, 5)),
    ]
    after = picks_after(eight_pairs(), eight_pairs(AFTER_CHOSEN, AFTER_REJECTED), 3)
    assert {pick.title: pick.places for pick in after} == {
        "moved the most": (5, 1, 3),
        "flipped": (5, 1),
        "unflipped": (0, 4),
        "still wrong by the most": (7, 2),
        "displaced by the most": (2, 0, 4),
        "memorised": (6,),
    }


# Shares and spreads --------------------------------------------------------------------------------------------------


def test_shares_of_nothing():
    assert Share.of(np.array([], dtype=bool)) == Share(count=0, num_pairs=0, share=None, standard_error=None)
    assert Spread.of(np.array([])) is None
    one = Spread.of(np.array([3.0]))
    assert one is not None
    assert (one.mean, one.standard_error, one.quantiles[0.99]) == (3.0, None, 3.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_histograms_count_every_value_once(values):
    array = np.array(values)
    bins = histogram(array)
    assert sum(each.count for each in bins) == len(values)
    assert len(bins) <= 26
    assert all(left.high == right.low for left, right in pairwise(bins))
    for each in bins:
        low, high = -math.inf if each.low is None else each.low, math.inf if each.high is None else each.high
        assert low < high
        assert not low < 0 < high or each.low is None or each.high is None


def test_a_histogram_by_hand():
    assert histogram(np.array([-1.5, -0.5, 0.0, 0.5, 2.0]), num_bins=4) == (
        Bin(low=-2, high=-1, count=1), Bin(low=-1, high=0, count=1), Bin(low=0, high=1, count=2),
        Bin(low=1, high=2, count=0), Bin(low=2, high=3, count=1),
    )  # fmt: skip
