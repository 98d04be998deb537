"""The two records: reductions against Python loops over lists, and what a plain dict of tensors must hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.batch import PairBatch, SequenceLogps

# Per sequence, its per-token values; multiples of 1/8 add up exactly in fp32, in any order.
completions = st.lists(
    st.lists(st.integers(-800, 0).map(lambda eighths: eighths / 8), max_size=6), min_size=1, max_size=6
)


def record_of(values: list[list[float]]) -> SequenceLogps:
    return SequenceLogps(
        per_token=torch.tensor([number for row in values for number in row], dtype=torch.float32),
        sequence=torch.tensor([place for place, row in enumerate(values) for _ in row], dtype=torch.long),
        num_sequences=len(values),
    )


@given(completions)
def test_sums_and_lengths(values):
    """A sequence without scored tokens has the sum 0 and the length 0, and keeps its place."""
    logps = record_of(values)
    assert logps.sums().tolist() == [sum(row) for row in values]
    assert logps.lengths().tolist() == [len(row) for row in values]
    assert not logps.lengths().is_floating_point()


@given(completions)
def test_ranks_count_from_zero_in_every_sequence(values):
    assert record_of(values).ranks().tolist() == [rank for row in values for rank in range(len(row))]


@given(completions, st.integers(-3, 3))
def test_segment_sum_takes_any_value_per_token(values, factor):
    logps = record_of(values)
    doubled = logps.segment_sum(factor * logps.per_token)
    assert doubled.tolist() == [factor * sum(row) for row in values]


@given(completions, st.data())
def test_in_sequences(values, data):
    asked = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=4))
    found = record_of(values).in_sequences(torch.tensor(asked, dtype=torch.long))
    assert found.tolist() == [place in asked for place, row in enumerate(values) for _ in row]


def test_gradient_of_a_sum_reaches_its_own_tokens_only():
    logps = record_of([[-1.0, -2.0], [-3.0], [-4.0, -5.0, -6.0]])
    leaf = logps.per_token.requires_grad_()
    (gradient,) = torch.autograd.grad(logps.sums() @ torch.tensor([1.0, 10.0, 100.0]), leaf)
    assert gradient.tolist() == [1.0, 1.0, 10.0, 100.0, 100.0, 100.0]


TENSORS = {
    "input_ids": torch.tensor([[5, 6, 7], [5, 8, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "source": torch.tensor([0, 1, 3]),
    "target": torch.tensor([6, 7, 8]),
    "sequence": torch.tensor([0, 0, 1]),
    "chosen": torch.tensor([0]),
    "rejected": torch.tensor([1]),
    "content": torch.tensor([[1, 2], [3, 4]]),
}


def test_from_tensors_tells_fields_from_model_inputs():
    batch = PairBatch.from_tensors(TENSORS)
    assert sorted(batch.inputs) == ["attention_mask", "input_ids"]
    for name, tensor in TENSORS.items():
        found = batch.inputs[name] if name in batch.inputs else getattr(batch, name)
        assert torch.equal(found, tensor)
    assert (batch.num_pairs, batch.num_sequences) == (1, 2)


def test_source_points_at_what_predicts_the_target():
    """`source` is row * T + column, so the token after it, in the flat ids, is the target."""
    batch = PairBatch.from_tensors(TENSORS)
    assert torch.equal(batch.inputs["input_ids"].flatten()[batch.source + 1], batch.target)


@pytest.mark.parametrize("missing", ["source", "target", "sequence", "chosen", "rejected", "content"])
def test_from_tensors_says_what_is_missing(missing):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != missing}
    message = rf"needs the tensors \['chosen', .*\]; \['{missing}'\] are missing from \['attention_mask', .*\]\. Use"
    with pytest.raises(ValueError, match=message):
        PairBatch.from_tensors(tensors)


def test_from_tensors_of_another_trainers_batch():
    with pytest.raises(ValueError, match=r"\['chosen', 'content', .*\] are missing from \['input_ids'\]"):
        PairBatch.from_tensors({"input_ids": TENSORS["input_ids"]})
