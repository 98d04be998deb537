"""What is counted of a dataset: by hand on rows that were made up for it, and against what a layout cuts."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from holdfast.data.layouts.sequences import truncated_sequences
from holdfast.data.usability import EMPTY_COMPLETION, EQUAL_COMPLETIONS, PROMPT_FILLS
from holdfast.inspect.facts import RowFacts, collect, overlaps
from holdfast.inspect.lengths import Bin, Lengths, histogram
from holdfast.inspect.numbers import by_source, leaked, numbers_of
from holdfast.inspect.pairs import Cutting, pair_at, read_pairs

WHOLE = Cutting(max_length=None, truncation_mode="keep_start")


def dataset(*rows: tuple[list[int], list[int], list[int]], **columns: list) -> Dataset:
    """A dataset of token ids: prompt, chosen, rejected."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict({**dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), **columns})


def facts_of(data: Dataset, cutting: Cutting = WHOLE, unusable: dict[str, list[int]] | None = None) -> RowFacts:
    return collect(data, unusable or {}, cutting, description="", is_quiet=True)[0]


# One row at a time ---------------------------------------------------------------------------------------------------

P, C, R = [1, 2, 3], [4, 5, 6, 7], [8, 9]
CUTS = {  # max_length, mode, masks of C and R -> seen tokens, scored of chosen and rejected, unscored, beyond
    "whole": (None, "keep_start", None, None, 7 + 5, 4, 2, 0, 0),
    "room to spare": (7, "keep_start", None, None, 7 + 5, 4, 2, 0, 0),
    "chosen loses two": (5, "keep_start", None, None, 5 + 5, 2, 2, 0, 2),
    "both prompts lose, chosen all": (4, "keep_end", None, None, 4 + 4, 3, 2, 1, 3 + 1),  # its first has no predecessor
    "all of a prompt, and a token": (3, "keep_end", None, None, 3 + 3, 2, 2, 1, 4 + 2),
    "two are not scored": (None, "keep_start", [1, 0, 0, 1], None, 7 + 5, 2, 2, 2, 0),
    "what follows the last scored one": (None, "keep_start", [0, 1, 0, 0], [1, 1], 5 + 5, 1, 2, 1, 0),
    "which needs no room": (5, "keep_start", [0, 1, 0, 0], [1, 1], 5 + 5, 1, 2, 1, 0),
    "the last scored one is cut": (5, "keep_start", [1, 0, 0, 1], None, 4 + 5, 1, 2, 0, 2),
}


@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS.keys())
def test_the_tokens_of_a_row_by_hand(case):
    max_length, mode, chosen_mask, rejected_mask, *expected = case
    data = dataset((P, C, R), chosen_mask=[chosen_mask], rejected_mask=[rejected_mask])
    facts = facts_of(data, Cutting(max_length=max_length, truncation_mode=mode))
    names = ("num_tokens", "chosen_scored", "rejected_scored", "num_unscored", "num_beyond")
    assert [int(getattr(facts, name)[0]) for name in names] == expected
    assert (facts.prompt[0], facts.chosen[0], facts.rejected[0]) == (3, 4, 2)


def test_the_first_token_of_a_row_is_not_scored():
    facts = facts_of(dataset(([], [4, 5], [6, 7, 8])))
    assert (facts.chosen_scored[0], facts.rejected_scored[0], facts.num_unscored[0]) == (1, 2, 2)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 5, 9, 14, 40])
def test_sequences_are_those_of_a_layout(max_length, mode):
    """Ids, prompts and targets of the batch, for rows of random lengths and masks."""
    draw = np.random.default_rng(0)

    def ids(least: int) -> list[int]:
        return draw.integers(0, 50, int(draw.integers(least, 15))).tolist()

    rows = [(ids(0), ids(1), ids(1)) for _ in range(60)]
    masks = [
        [None if draw.random() < 0.3 else draw.integers(0, 2, len(row[side])).tolist() for row in rows]
        for side in (1, 2)
    ]
    data = dataset(*rows, chosen_mask=masks[0], rejected_mask=masks[1])
    expected = truncated_sequences(list(data), max_length, mode)
    pairs = [pair for some in read_pairs(data, Cutting(max_length=max_length, truncation_mode=mode)) for pair in some]
    assert [pair.index for pair in pairs] == list(range(60))
    found = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    for ours, theirs in zip(found, expected, strict=True):
        seen = [*ours.prompt[ours.seen_prompt], *ours.completion[ours.seen_completion]]
        assert seen == theirs.ids.tolist()
        assert ours.seen_prompt.stop - ours.seen_prompt.start == theirs.num_prompt
        assert ours.scored.sum() == theirs.num_targets
        assert ours.num_seen == len(theirs.ids)


def test_a_row_by_its_number_is_the_same_as_in_order():
    data = dataset(*[([n], [n, 1], [n, 2]) for n in range(2_500)])
    pair = pair_at(data, 1_234, WHOLE)
    assert (pair.index, pair.chosen.completion.tolist()) == (1_234, [1_234, 1])
    assert facts_of(data).index.tolist() == list(range(2_500))


# Numbers of many rows ------------------------------------------------------------------------------------------------

ROWS = (
    ([1], [10, 11, 12], [20]),  # 0
    ([1], [20], [10, 11, 12]),  # 1: the other way round
    ([1], [10, 11, 12], [20]),  # 2: as row 0
    ([2], [10, 11, 12], [20]),  # 3: another prompt
    ([3, 3], [10, 20], [20, 10]),  # 4: the same tokens, in another order
    ([4], [30, 31], [32, 33]),  # 5: left out
    ([2], [40], [41]),  # 6: a second pair of row 3's prompt
)
UNUSABLE = {PROMPT_FILLS: [5]}


def test_repeats_by_hand():
    repeats = numbers_of(facts_of(dataset(*ROWS), unusable=UNUSABLE)).repeats
    assert (repeats.identical.count, repeats.identical.examples) == (1, (2,))
    assert (repeats.contradictions.count, repeats.contradictions.examples) == (3, (0, 1, 2))
    assert 1 not in repeats.nearly_identical.examples  # its sides are swapped
    assert (repeats.num_prompts, repeats.shared_prompts, repeats.most_pairs) == (3, 2, 3)
    assert (repeats.sharing.count, repeats.sharing.examples) == (5, (0, 1, 2, 3, 6))
    assert repeats.identical.share == pytest.approx(1 / 6)


def test_length_bias_by_hand():
    """Chosen minus rejected of the six used rows: 2, -2, 2, 2, 0, 0. Longer in 3 of 6, equal in 2, shorter in 1."""
    numbers = numbers_of(facts_of(dataset(*ROWS), unusable=UNUSABLE))
    bias = numbers.length_bias
    assert bias is not None
    assert (bias.longer, bias.equal, bias.shorter) == (pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(1 / 6))
    assert bias.mean_difference == pytest.approx(4 / 6)
    assert (bias.mean_chosen, bias.mean_rejected) == (pytest.approx(13 / 6), pytest.approx(9 / 6))
    assert bias.rule_accuracy == pytest.approx(1 / 2 + 1 / 6)


def test_what_is_left_out_is_counted_by_reason_and_no_further():
    numbers = numbers_of(facts_of(dataset(*ROWS), unusable={EMPTY_COMPLETION: [0, 3], EQUAL_COMPLETIONS: [5]}))
    assert (numbers.num_rows, numbers.num_used) == (7, 4)
    found = {reason: (each.count, each.examples) for reason, each in numbers.left_out.items()}
    assert found == {EMPTY_COMPLETION: (2, (0, 3)), EQUAL_COMPLETIONS: (1, (5,))}
    assert numbers.tokens.seen == sum(2 * len(ROWS[n][0]) + len(ROWS[n][1]) + len(ROWS[n][2]) for n in (1, 2, 4, 6))
    assert numbers.lengths["prompt"].mean == pytest.approx(8 / 7)  # of all rows


def test_no_row_is_used():
    numbers = numbers_of(facts_of(dataset(*ROWS), unusable={PROMPT_FILLS: list(range(7))}))
    assert (numbers.num_used, numbers.length_bias, numbers.mean_overlap) == (0, None, None)
    assert (numbers.repeats.num_prompts, numbers.nearly_equal.count, numbers.truncated.share) == (0, 0, 0.0)


def test_nearly_equal_pairs_by_hand():
    """Row 4 has the same two tokens on both sides: 2 * 2 / (2 + 2) = 1. All other rows share none."""
    numbers = numbers_of(facts_of(dataset(*ROWS), unusable=UNUSABLE))
    assert (numbers.nearly_equal.count, numbers.nearly_equal.examples) == (1, (4,))
    assert numbers.mean_overlap == pytest.approx(1 / 6)


def test_the_most_similar_pairs_are_the_first_examples():
    long = list(range(100))
    numbers = numbers_of(facts_of(dataset(([1], long, [*long[:91], *[200] * 9]), ([2], long, [*long[:99], 200]))))
    assert numbers.nearly_equal.examples == (1, 0)


def test_overlaps_are_those_of_multisets():
    draw = np.random.default_rng(1)
    rows = [([1], *(draw.integers(0, 6, int(draw.integers(1, 9))).tolist() for _ in range(2))) for _ in range(100)]
    found = overlaps(next(read_pairs(dataset(*rows), WHOLE)))
    for (_, chosen, rejected), value in zip(rows, found, strict=True):
        common = (Counter(chosen) & Counter(rejected)).total()
        assert value == pytest.approx(2 * common / (len(chosen) + len(rejected)))


def test_rows_that_nearly_repeat_another():
    """A token of 90 changed: 3 of the row's stretches of three tokens, so Jaccard is 90 / 96 = 0.94 or so."""
    draw = np.random.default_rng(0)
    rows = [tuple(draw.integers(0, 1000, 30).tolist() for _ in range(3)) for _ in range(300)]
    changed = [([*prompt[:9], 1001, *prompt[10:]], chosen, rejected) for prompt, chosen, rejected in rows[:100]]
    repeats = numbers_of(facts_of(dataset(*rows, *changed, *rows[:2]))).repeats
    assert repeats.identical.examples == (400, 401)
    assert 85 <= repeats.nearly_identical.count <= 100
    assert min(repeats.nearly_identical.examples) >= 300


def test_hashes_agree_as_often_as_stretches_are_shared():
    """The mean over many pairs of rows: of the share of equal hashes, and of the exact Jaccard of their stretches."""
    draw = np.random.default_rng(1)
    rows, exact = [], []
    for _ in range(500):
        one = draw.integers(0, 500, 60)
        other = np.where(draw.random(60) < 0.1, draw.integers(0, 500, 60), one)
        rows += [([], [7], one.tolist()), ([], [7], other.tolist())]
        whole = [["-", "c7", "-", *(f"r{token}" for token in each), "-", "-"] for each in (one, other)]
        sets = [set(zip(row, row[1:], row[2:], strict=False)) for row in whole]
        exact.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    signature = facts_of(dataset(*rows)).signature
    assert (signature[::2] == signature[1::2]).mean() == pytest.approx(np.mean(exact), abs=0.02)


def test_numbers_of_each_source():
    data = dataset(*ROWS, source=["b", "b", "a", "a", None, "b", "a"])
    facts, sources = collect(data, UNUSABLE, WHOLE, description="", is_quiet=True)
    assert sources == ("b", "a", "(none)")
    each = by_source(facts, sources)
    assert {name: (numbers.num_rows, numbers.num_used) for name, numbers in each.items()} == {
        "b": (3, 2), "a": (3, 3), "(none)": (1, 1),
    }  # fmt: skip
    assert each["b"].repeats.contradictions.examples == (0, 1)
    assert sum(numbers.tokens.seen for numbers in each.values()) == numbers_of(facts).tokens.seen


def test_prompts_of_evaluation_that_are_trained_on():
    """Row 5 of the training data has the prompt [4], and is left out."""
    training = facts_of(dataset(*ROWS), unusable=UNUSABLE)
    evaluation = facts_of(dataset(([4], [1], [2]), ([2], [7], [8]), ([9], [7], [8]), ([3, 3], [1], [2])))
    found = leaked(evaluation, training)
    assert (found.count, found.share, found.examples) == (2, 0.5, (1, 3))


# Lengths -------------------------------------------------------------------------------------------------------------


def test_lengths_by_hand():
    lengths = Lengths.of(np.array([4, 0, 2, 3, 1, 100, 3, 8, 9, 10]))
    assert (lengths.mean, lengths.least, lengths.most) == (14.0, 0, 100)
    assert lengths.quantiles == {0.05: 0, 0.25: 2, 0.5: 3, 0.75: 9, 0.95: 100, 0.99: 100}  # sorted[ceil(10 q) - 1]


def test_a_histogram_has_every_row_once():
    assert histogram(np.array([0, 1, 2, 3, 4, 7, 8, 8, 31])) == (
        Bin(first=0, last=0, count=1), Bin(first=1, last=1, count=1), Bin(first=2, last=3, count=2),
        Bin(first=4, last=7, count=2), Bin(first=8, last=15, count=2), Bin(first=16, last=31, count=1),
    )  # fmt: skip
    assert histogram(np.array([64, 127])) == (Bin(first=64, last=127, count=2),)
