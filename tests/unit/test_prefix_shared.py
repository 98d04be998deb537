"""The shared layout against rows worked by hand, and against the padded layout, whose sequences it must contain."""

import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.batch import HOST_SEQUENCES, PairBatch
from holdfast.data.layouts.filled_rows import spread_segments
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.data.layouts.sequences import truncated_sequences
from holdfast.data.tokenize import content_id
from holdfast.scoring.segments import SEGMENTS, Segment, Segments

PAD = 0
# Few tokens and short sequences, so that prompts and completions occur again.
PROMPT = st.lists(st.integers(1, 2), max_size=3)
COMPLETION = st.lists(st.integers(1, 2), min_size=2, max_size=4)
ROWS = st.lists(
    st.fixed_dictionaries({"prompt_ids": PROMPT, "chosen_ids": COMPLETION, "rejected_ids": COMPLETION}),
    min_size=1,
    max_size=6,
)
EXAMPLES = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
    {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [8, 9]},
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [10, 11, 12]},
]


def lengths(pieces: Segments) -> Iterator[tuple[int, int, bool]]:
    """(row, number of tokens, whether it is a prompt) of every piece, in reading order."""
    for row, segments in enumerate(pieces.rows):
        for segment in segments:
            yield row, segment.prompt, True
            yield from ((row, length, False) for group in segment.groups for length in group)


def pieces(tensors: dict[str, Any]) -> Iterator[tuple[list[int], list[int], list[int], bool]]:
    """(ids, positions, flat places, whether it is a prompt) of every piece, in reading order."""
    filled = [0] * len(tensors["input_ids"])
    for row, length, is_prompt in lengths(tensors[SEGMENTS]):
        here = slice(filled[row], filled[row] + length)
        places = row * tensors["input_ids"].shape[1] + torch.arange(here.start, here.stop)
        filled[row] += length
        yield tensors["input_ids"][row, here].tolist(), tensors["position_ids"][row, here].tolist(), places.tolist(), (
            is_prompt
        )  # fmt: skip
    assert filled == tensors["attention_mask"].count_nonzero(1).tolist()


def test_a_batch_by_hand() -> None:
    """The prompt 1 2 stands once, and so does its completion 3 4, which is sequence 0 of both its pairs.

    It has 8 tokens, the other prompt 4: at 8 tokens a row that is two rows. Sequences are the chosen ones (3 4, 7),
    then the rejected ones (5, 8 9, 10 11 12); the first token of each is predicted at its prompt's end (flat 1, 8).
    The first prompt begins 4 of the 6 rows that the padded layout would have, its completion 3 4 is in 2 of them.
    """
    batch = PairBatch.from_tensors(tensors := SharedLayout(PAD, row_tokens=8)(EXAMPLES))
    assert sorted(batch.inputs) == ["attention_mask", "input_ids", "position_ids", SEGMENTS]
    assert tensors["input_ids"].tolist() == [[1, 2, 3, 4, 5, 10, 11, 12], [6, 7, 8, 9, 0, 0, 0, 0]]
    assert tensors["position_ids"].tolist() == [[0, 1, 2, 3, 2, 2, 3, 4], [0, 1, 1, 2, 0, 0, 0, 0]]
    assert tensors["attention_mask"].tolist() == [[4, 4, 2, 2, 1, 1, 1, 1], [2, 1, 1, 1, 0, 0, 0, 0]]
    first, second = Segment(prompt=2, groups=((2, 1, 3),)), Segment(prompt=1, groups=((1, 2),))
    assert tensors[SEGMENTS] == Segments(rows=((first,), (second,)), num_columns=8)
    assert batch.source.tolist() == [1, 2, 8, 1, 8, 10, 1, 5, 6]
    assert batch.target.tolist() == [3, 4, 7, 5, 8, 9, 10, 11, 12]
    assert batch.sequence.tolist() == [0, 0, 1, 2, 3, 3, 4, 4, 4]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 1, 0], [2, 3, 4])
    expected = [([1, 2], [3, 4]), ([6], [7]), ([1, 2], [5]), ([6], [8, 9]), ([1, 2], [10, 11, 12])]
    assert batch.content.tolist() == [list(content_id(*parts)) for parts in expected]


@given(ROWS, st.sampled_from([None, 4]), st.sampled_from([1, 12, 100]))
def test_every_pair_has_the_sequences_of_the_padded_layout(rows: list[dict], multiple: int | None, budget: int) -> None:
    shared = SharedLayout(PAD, pad_to_multiple_of=multiple, row_tokens=budget)(rows)
    padded = PaddedLayout(PAD)(rows)
    for side in ("chosen", "rejected"):
        for ours, theirs in zip(shared[side].tolist(), padded[side].tolist(), strict=True):
            assert shared["content"][ours].tolist() == padded["content"][theirs].tolist()
            found, expected = shared["sequence"] == ours, padded["sequence"] == theirs
            assert shared["target"][found].tolist() == padded["target"][expected].tolist()
            # A token is predicted where the token before it stands, at the position before its own.
            for name, expected_ids in (("input_ids", padded["input_ids"]), ("position_ids", None)):
                values = shared[name].flatten()[shared["source"][found]].tolist()
                source = padded["source"][expected]
                wanted = (
                    source % padded["input_ids"].shape[1] if expected_ids is None else expected_ids.flatten()[source]
                )
                assert values == wanted.tolist()
    assert (shared["sequence"].diff() >= 0).all()
    assert len(shared["content"]) == len({tuple(ids) for ids in shared["content"].tolist()})
    assert shared["input_ids"].shape[1] % (multiple or 1) == 0
    assert all(tensor.dtype == torch.int64 for name, tensor in shared.items() if name not in (SEGMENTS, HOST_SEQUENCES))


@given(ROWS, st.sampled_from([None, 4]), st.sampled_from([1, 12, 100]), st.sampled_from([SharedLayout, PackedLayout]))
def test_host_memory_says_of_sequences_what_the_tensors_say(
    rows: list[dict], multiple: int | None, budget: int, made: type[SharedLayout | PackedLayout]
) -> None:
    layout = made(PAD, pad_to_multiple_of=multiple, row_tokens=budget)
    batch = PairBatch.from_tensors(layout(rows))
    read = replace(batch, host_sequences=None)
    assert batch.host_sequences is not None
    assert batch.content_ids() == read.content_ids()
    assert batch.lengths() == read.lengths()
    assert batch.tokens_of_rows() == read.tokens_of_rows()


def test_what_host_memory_says_by_hand() -> None:
    batch = PairBatch.from_tensors(SharedLayout(PAD, row_tokens=8)(EXAMPLES))
    assert batch.lengths() == [2, 1, 1, 2, 3]
    assert batch.tokens_of_rows() == [6, 3]
    assert batch.content_ids()[1] == content_id([6], [7])


@given(ROWS, st.sampled_from([1, 12, 100]))
def test_each_prompt_and_each_completion_stands_once(rows: list[dict], budget: int) -> None:
    tensors = SharedLayout(PAD, row_tokens=budget)(rows)
    prompts, completions, prompt = [], [], []
    for ids, positions, _, is_prompt in pieces(tensors):
        if is_prompt:
            prompt = ids
            prompts.append(tuple(ids))
        else:
            completions.append((tuple(prompt), tuple(ids)))
        first = 0 if is_prompt else len(prompt)
        assert positions == list(range(first, first + len(ids)))
    wanted = {(tuple(row["prompt_ids"]), tuple(row[side])) for row in rows for side in ("chosen_ids", "rejected_ids")}
    assert sorted(completions) == sorted(wanted)
    assert sorted(prompts) == sorted({prompt for prompt, _ in wanted})
    assert (tensors["input_ids"][tensors["attention_mask"] == 0] == PAD).all()


@given(ROWS)
def test_without_repetitions_only_the_places_differ_from_the_padded_layout(rows: list[dict]) -> None:
    rows = [  # tokens of their own for every sequence
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": [*row["chosen_ids"], 10 + 2 * number],
            "rejected_ids": [*row["rejected_ids"], 11 + 2 * number],
        }
        for number, row in enumerate(rows)
    ]
    shared, padded = SharedLayout(PAD)(rows), PaddedLayout(PAD)(rows)
    for name in ("target", "sequence", "chosen", "rejected", "content"):
        assert torch.equal(shared[name], padded[name]), name


@given(ROWS, st.integers(2, 6), st.sampled_from(["keep_start", "keep_end"]))
def test_truncation_is_that_of_the_padded_layout(rows: list[dict], max_length: int, mode: str) -> None:
    """Where it cuts the prompt differently for two completions, they have unlike prompts."""
    options = {"max_length": max_length, "truncation_mode": mode}
    refusal = None
    try:
        padded = PaddedLayout(PAD, **options)(rows)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        with pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"):
            SharedLayout(PAD, **options)(rows)
        return
    shared = SharedLayout(PAD, **options)(rows)
    for side in ("chosen", "rejected"):
        assert torch.equal(shared["content"][shared[side]], padded["content"][padded[side]])


def test_a_prompt_that_truncation_cuts_for_one_completion_stands_twice() -> None:
    """Five tokens at most, the end kept: 1 2 3 + 4 5 fits, 1 2 3 + 6 7 8 loses the 1."""
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]}]
    tensors = SharedLayout(PAD, max_length=5, truncation_mode="keep_end")(rows)
    assert tensors["input_ids"].tolist() == [[1, 2, 3, 4, 5, 2, 3, 6, 7, 8]]
    assert tensors["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_rows_keep_to_the_budget(sizes: list[int], budget: int) -> None:
    rows = spread_segments(sizes, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    filled = [sum(sizes[index] for index in row) for row in rows]
    assert max(filled) <= max(budget, *sizes)
    # Into the row that has least: no row is longer than another one by more than what was put there last.
    assert max(filled) - min(filled) <= max(sizes)


@given(st.lists(st.integers(1, 3_000), min_size=1, max_size=40))
def test_rows_without_a_budget_are_nearly_full(sizes: list[int]) -> None:
    """And no fewer than that takes: of like segments, as many as there are rows of about a thousand tokens."""
    rows = spread_segments(sizes, None)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    longest = max(sum(sizes[index] for index in row) for row in rows)
    assert len(rows) * longest <= 1.06 * sum(sizes)
    assert len(rows) <= -(-sum(sizes) // 1_000)
    assert [len(row) for row in spread_segments([500] * 12, None)] == [2] * 6


def test_completions_without_pairs() -> None:
    rows = truncated_sequences(EXAMPLES, None, "keep_start")[:2]
    tensors = SharedLayout(PAD).of_completions(rows)
    assert tensors["input_ids"].tolist() == [[1, 2, 3, 4, 6, 7]]
    assert tensors["content"].tolist() == [list(content_id([1, 2], [3, 4])), list(content_id([6], [7]))]
    assert tensors["chosen"].shape == tensors["rejected"].shape == (0,)


def test_it_travels_to_workers() -> None:
    collator = SharedLayout(3, max_length=9, truncation_mode="keep_end", pad_to_multiple_of=4, row_tokens=7)
    assert pickle.loads(pickle.dumps(collator)) == collator
    batch = collator(EXAMPLES)
    assert pickle.loads(pickle.dumps(batch[SEGMENTS])) == batch[SEGMENTS]


def test_options_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"truncation_mode must be one of .*found 'middle'"):
        SharedLayout(PAD, truncation_mode="middle")
    with pytest.raises(ValueError, match=r"max_length must leave room.*found 0"):
        SharedLayout(PAD, max_length=0)
    with pytest.raises(ValueError, match=r"pad_to_multiple_of must be at least 1; found 0. Give"):
        SharedLayout(PAD, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match=r"row_tokens is how many tokens a row may have; found 0. Give at least 1"):
        SharedLayout(PAD, row_tokens=0)
