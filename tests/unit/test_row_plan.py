"""The numbers that kernels read about rows, against numbers worked by hand, and on their way to a device."""

import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.scoring.row_plan import PADDING, RowPlan
from holdfast.scoring.segments import SEGMENTS, Segments
from holdfast.scoring.token_limit import _rows
from shared_rows import ROWS, shared_batch

LENGTHS = st.integers(min_value=0, max_value=6)
BATCHES = st.lists(
    st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, max_size=3)), max_size=3), min_size=1, max_size=3
).filter(lambda rows: sum(prompt + sum(own) for row in rows for prompt, own in row) > 0)


def test_a_plan_by_hand() -> None:
    """Row 0: a prompt of 2 with completions of 1 and 2. Row 1: a completion of 3 alone, a prompt of 1, padding of 1.

    The completions see keys 0 1 2 and 0 1 3 4; all other spans see themselves.
    """
    plan = RowPlan.of([[(2, [1, 2])], [(0, [3]), (1, [])]], 5)
    assert plan.part("query_ends").tolist() == [0, 2, 3, 5, 8, 9, 10]
    assert plan.part("key_ends").tolist() == [0, 2, 5, 9, 12, 13, 14]
    assert plan.part("keys").tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert plan.part("segment").tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, PADDING]]
    assert plan.part("completion").tolist() == [[0, 0, 1, 2, 2], [1, 1, 1, 0, 0]]
    assert plan.part("position").tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 0, 0]]
    assert (plan.longest_query, plan.longest_key, plan.gathers) == (3, 4, True)
    assert plan.numbers.dtype == torch.int32


@given(BATCHES, st.integers(0, 3))
def test_every_query_has_its_keys(rows: list[list[tuple[int, list[int]]]], padding: int) -> None:
    """What a token sees under causal attention, span by span, is what its segment, completion and position say."""
    num_columns = max(sum(prompt + sum(own) for prompt, own in row) for row in rows) + padding
    plan = RowPlan.of(rows, num_columns)
    segment, completion, position = (plan.part(name).flatten() for name in ("segment", "completion", "position"))
    seen: list[set[int]] = []
    keys = plan.part("keys").tolist() if plan.gathers else [*range(len(rows) * num_columns)]
    for (start, end), (first, last) in zip(
        pairwise(plan.part("query_ends").tolist()), pairwise(plan.part("key_ends").tolist()), strict=True
    ):
        own = keys[first:last]
        seen += [{*own[: len(own) - (end - start) + 1 + place]} for place in range(end - start)]
        assert end - start <= plan.longest_query
        assert last - first <= plan.longest_key
    row_of = torch.arange(len(rows)).repeat_interleave(num_columns)
    for token, found in enumerate(seen):
        is_near = (segment == segment[token]) & (row_of == row_of[token]) & (position <= position[token])
        expected = is_near & ((completion == 0) | (completion == completion[token]))
        assert found == set(expected.nonzero().flatten().tolist())


def test_rows_that_share_nothing_are_read_as_they_lie() -> None:
    plan = PackedLayout(0, row_tokens=40)(ROWS)[SEGMENTS].plan
    assert not plan.gathers
    assert torch.equal(plan.part("query_ends"), plan.part("key_ends"))


@pytest.mark.parametrize("layout", [SharedLayout(0, row_tokens=40), PackedLayout(0, row_tokens=40)])
def test_the_collator_makes_it(layout: SharedLayout) -> None:
    segments = layout(ROWS)[SEGMENTS]
    assert torch.equal(segments.plan.numbers, RowPlan.of(segments.lengths(), segments.num_columns).numbers)
    again = pickle.loads(pickle.dumps(segments))
    assert again == segments
    assert torch.equal(again.plan.numbers, segments.plan.numbers)


def test_it_goes_to_the_device_with_the_batch() -> None:
    """`meta` is another device than the CPU, and has no values."""
    segments = SharedLayout(0)(ROWS)[SEGMENTS]
    there = segments.to("meta", non_blocking=True)
    assert there.plan.numbers.device.type == "meta"
    assert there == segments
    assert there.to(torch.device("meta")) is there
    assert there.plan_on(torch.device("meta")) is there.plan
    assert segments.to("cpu") is segments
    bare = Segments(rows=segments.rows, num_columns=segments.num_columns)
    assert bare.to("cpu") is bare  # a CPU reads no plan
    assert bare.pin_memory() is bare
    assert bare.to("meta").plan.numbers.shape == segments.plan.numbers.shape


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_of_a_batch_have_a_plan_of_their_own(device: str) -> None:
    batch = shared_batch(row_tokens=1)
    segments = batch.inputs[SEGMENTS]
    cut = segments.of_rows(1, 3).to(device)
    assert cut.plan.numbers.device.type == device
    assert cut.plan.part("segment").shape == (2, segments.num_columns)
    if device == "cpu":
        assert torch.equal(cut.plan.numbers, RowPlan.of(segments.lengths()[1:3], segments.num_columns).numbers)
    assert Segments(rows=segments.rows, num_columns=segments.num_columns).of_rows(1, 3).plan is None


def test_a_batch_that_is_cut_has_the_plan_of_its_rows() -> None:
    batch = shared_batch(row_tokens=1)
    tokens = (batch.source // batch.inputs["input_ids"].shape[1] == 2).nonzero().flatten()
    rows: PairBatch = _rows(batch, 2, 3, tokens)
    plan: Tensor = rows.inputs[SEGMENTS].plan.part("segment")
    assert plan.shape == (1, batch.inputs["input_ids"].shape[1])
