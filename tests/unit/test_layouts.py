"""A batch says where each completion token sits: read back, it gives the rows that went in."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.batch import HOST_SEQUENCES, PairBatch
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.preference_collator import POSITION_KEYS, DataCollatorForPreference, with_positions
from holdfast.data.tokenize import content_id, truncate

PAD = 0
TOKEN = st.integers(1, 500)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_ids": st.lists(TOKEN, min_size=1, max_size=6),
            "chosen_ids": st.lists(TOKEN, min_size=1, max_size=6),
            "rejected_ids": st.lists(TOKEN, min_size=1, max_size=6),
        }
    ),
    min_size=1,
    max_size=4,
)
PROMPTLESS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_ids": st.just([]),
            "chosen_ids": st.lists(TOKEN, min_size=2, max_size=6),
            "rejected_ids": st.lists(TOKEN, min_size=2, max_size=6),
        }
    ),
    min_size=1,
    max_size=3,
)
EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
]


def sequences(rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of each sequence in the order of a batch."""
    return [(row["prompt_ids"], row[column]) for column in ("chosen_ids", "rejected_ids") for row in rows]


def test_a_batch_by_hand() -> None:
    """Rows of width 5; the first completion token of pair 0's chosen row (flat 3) is predicted from flat 2."""
    batch = PairBatch.from_tensors(PaddedLayout(PAD)(EXAMPLES))
    assert sorted(batch.inputs) == ["attention_mask", "input_ids"]
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert batch.source.tolist() == [2, 3, 6, 12, 16, 17]
    assert batch.target.tolist() == [4, 5, 9, 6, 10, 11]
    assert batch.sequence.tolist() == [0, 0, 1, 2, 3, 3]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 1], [2, 3])
    assert (batch.num_pairs, batch.num_sequences) == (2, 4)
    assert batch.content.tolist() == [list(content_id(*parts)) for parts in sequences(EXAMPLES)]


def test_the_known_collator_by_hand() -> None:
    """The documented example of the collator of that name."""
    tensors = DataCollatorForPreference(pad_token_id=PAD)(features=EXAMPLES)
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == {
        "input_ids": [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "completion_mask": [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]],
    }
    logps = [
        {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5},
        {"ref_chosen_logps": 0.0, "ref_rejected_logps": -1},
    ]
    with_logps = DataCollatorForPreference(PAD)([a | b for a, b in zip(EXAMPLES, logps, strict=True)])
    assert with_logps["ref_chosen_logps"].tolist() == [-1.5, 0.0]
    assert with_logps["ref_rejected_logps"].tolist() == [-2.5, -1.0]


@given(ROWS | PROMPTLESS, st.sampled_from([None, 4, 8]))
def test_unpadding_gives_the_rows_back(rows: list[dict], multiple: int | None) -> None:
    tensors = PaddedLayout(PAD, pad_to_multiple_of=multiple)(rows)
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    expected = [prompt + completion for prompt, completion in sequences(rows)]
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == expected
    assert (ids[mask == 0] == PAD).all()
    longest = max(map(len, expected))
    if multiple is None:
        assert ids.shape[1] == longest
    else:
        assert ids.shape[1] % multiple == 0
        assert longest <= ids.shape[1] < longest + multiple


@given(ROWS | PROMPTLESS, st.sampled_from([None, 4]))
def test_targets_are_the_next_tokens_of_their_row(rows: list[dict], multiple: int | None) -> None:
    tensors = PaddedLayout(PAD, pad_to_multiple_of=multiple)(rows)
    ids, source, target, sequence = (tensors[key] for key in ("input_ids", "source", "target", "sequence"))
    assert torch.equal(ids.flatten()[source + 1], target)
    assert torch.equal(source // ids.shape[1], sequence)
    assert torch.equal((source + 1) // ids.shape[1], sequence)
    found = [target[sequence == index].tolist() for index in range(len(ids))]
    # The first token of a sequence without a prompt has no predecessor.
    assert found == [completion if prompt else completion[1:] for prompt, completion in sequences(rows)]


@given(ROWS, st.integers(2, 12), st.sampled_from(["keep_start", "keep_end"]))
def test_truncation_as_in_the_dataset(rows: list[dict], max_length: int, mode: str) -> None:
    cut = [truncate(*parts, max_length, mode) for parts in sequences(rows)]
    layout = PaddedLayout(PAD, max_length=max_length, truncation_mode=mode)
    if any(len(prompt) + len(completion) < 2 or not completion for prompt, completion in cut):
        with pytest.raises(ValueError, match="must have a completion token to predict"):
            layout(rows)
        return
    tensors = layout(rows)
    assert tensors["attention_mask"].sum(1).tolist() == [len(prompt) + len(completion) for prompt, completion in cut]
    assert tensors["content"].tolist() == [list(content_id(*parts)) for parts in cut]


@given(ROWS | PROMPTLESS, st.sampled_from([None, 8]))
def test_positions_from_masks_are_those_of_the_padded_layout(rows: list[dict], multiple: int | None) -> None:
    own = PaddedLayout(PAD, pad_to_multiple_of=multiple)(rows)
    derived = with_positions(DataCollatorForPreference(PAD, pad_to_multiple_of=multiple)(rows))
    assert derived.keys() == own.keys()
    assert derived.pop(HOST_SEQUENCES) == own.pop(HOST_SEQUENCES)
    for name, tensor in own.items():
        assert torch.equal(derived[name], tensor), name
        assert derived[name].dtype == tensor.dtype == torch.int64


@given(ROWS | PROMPTLESS)
def test_left_padding_moves_positions_and_nothing_else(rows: list[dict]) -> None:
    right = DataCollatorForPreference(PAD, pad_to_multiple_of=8)(rows)
    lengths = right["attention_mask"].sum(1).tolist()
    left = {
        key: torch.stack([row.roll(-length) for row, length in zip(tensor, lengths, strict=True)])
        for key, tensor in right.items()
    }
    expected, found = with_positions(right), with_positions(left)
    for name in ("target", "sequence", "content"):
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(found["input_ids"].flatten()[found["source"] + 1], found["target"])


def test_a_mask_with_holes_scores_what_it_marks_under_an_id_of_its_own() -> None:
    tensors = DataCollatorForPreference(PAD)([{"prompt_ids": [1], "chosen_ids": [2, 3, 4], "rejected_ids": [5, 6, 7]}])
    whole = with_positions(tensors)
    tensors["completion_mask"][0, 2] = 0
    holed = with_positions(tensors)
    assert holed["target"].tolist() == [2, 4, 5, 6, 7]
    assert holed["source"].tolist() == [0, 2, 4, 5, 6]
    assert holed["content"][1].tolist() == whole["content"][1].tolist()
    assert holed["content"][0].tolist() == list(content_id([1], [2, 3, 4], [1, 0, 1]))


def test_model_inputs_and_complete_batches_pass_through() -> None:
    complete = PaddedLayout(PAD)(EXAMPLES)
    assert with_positions(complete) == complete
    tensors = DataCollatorForPreference(PAD)(EXAMPLES) | {"token_type_ids": torch.zeros(4, 5)}
    batch = PairBatch.from_tensors(with_positions(tensors))
    assert sorted(batch.inputs) == ["attention_mask", "input_ids", "token_type_ids"]


@pytest.mark.parametrize("convert", [np.array, torch.tensor, tuple])
def test_rows_may_be_arrays(convert: type) -> None:
    rows = [{column: convert(ids) for column, ids in row.items()} for row in EXAMPLES]
    for name, tensor in PaddedLayout(PAD)(rows).items():
        expected = PaddedLayout(PAD)(EXAMPLES)[name]
        assert tensor == expected if name == HOST_SEQUENCES else torch.equal(tensor, expected), name


@pytest.mark.parametrize("layout", [PaddedLayout, DataCollatorForPreference])
def test_collators_travel_to_workers(layout: type) -> None:
    collator = layout(pad_token_id=3, max_length=9, truncation_mode="keep_end", pad_to_multiple_of=4)
    assert pickle.loads(pickle.dumps(collator)) == collator


@pytest.mark.parametrize("layout", [PaddedLayout, DataCollatorForPreference])
def test_options_that_are_refused(layout: type) -> None:
    with pytest.raises(ValueError, match=r"truncation_mode must be one of .*found 'middle'"):
        layout(PAD, truncation_mode="middle")
    with pytest.raises(ValueError, match=r"max_length must leave room.*found 0"):
        layout(PAD, max_length=0)
    with pytest.raises(ValueError, match=r"pad_to_multiple_of must be at least 1; found 0. Give"):
        layout(PAD, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match=r"return_tensors must be 'pt'; found 'np'. Leave it out"):
        DataCollatorForPreference(PAD, return_tensors="np")


def test_batches_that_are_refused() -> None:
    """With `max_length=3` nothing is left of pair 0's completions, whose prompt has three tokens."""
    message = (
        r"must have a completion token.*found none in \['chosen of pair 0', 'rejected of pair 0'\].*prepare_dataset"
    )
    with pytest.raises(ValueError, match=message):
        PaddedLayout(PAD, max_length=3)(EXAMPLES)
    with pytest.raises(ValueError, match=message):
        with_positions(DataCollatorForPreference(PAD, max_length=3)(EXAMPLES))
    tensors = DataCollatorForPreference(PAD)(EXAMPLES)
    with pytest.raises(ValueError, match=r"one shape \[2P, T\].*found \{'input_ids': \(3, 5\)"):
        with_positions({name: tensor[:3] for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=r"a collated batch needs .*found \['input_ids'\].*Use `PaddedLayout`"):
        with_positions({"input_ids": tensors["input_ids"]})
    with pytest.raises(ValueError, match=r"holds \['ref_chosen_logps'\].*Drop these keys"):
        with_positions({**tensors, "ref_chosen_logps": torch.zeros(2)})
    assert not set(POSITION_KEYS) & tensors.keys()
