"""What must hold of every layout in `choose.LAYOUTS`, so of one that is added there, too."""

import pickle

import pytest
import torch

import oracle
from families import CONFIGS, tiny_model
from holdfast.batch import PairBatch
from holdfast.config import LAYOUT_NAMES
from holdfast.data.layouts.base import Layout
from holdfast.data.layouts.choose import LAYOUTS
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.rows import Row
from holdfast.data.tokenize import content_id
from shared_rows import ROWS, assert_equal_logps, logps_of, oracle_logps

PAD = 0
EXACT = sorted(CONFIGS.keys() - {"lfm2", "falcon_h1"})
"""The families that compute rows of several sequences right."""


class Options:
    """What a layout is made from, as in `DPOConfig`."""

    max_length = 64
    truncation_mode = "keep_end"
    pad_to_multiple_of = 4
    tokens_per_batch = None


@pytest.fixture(params=LAYOUTS, ids=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param].of_options(PAD, Options())


def completions() -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(prompt, completion) of each distinct completion of `ROWS`, by content id."""
    pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in ROWS]
    return {content_id(*pair): pair for pair in pairs}


def test_the_option_names_it(layout: Layout) -> None:
    assert layout.name in LAYOUT_NAMES
    assert type(layout) is LAYOUTS[layout.name]
    assert (layout.max_length, layout.truncation_mode, layout.pad_to_multiple_of) == (64, "keep_end", 4)
    assert layout.summary


@pytest.mark.parametrize("family", EXACT)
def test_every_family_computes_it_right(family: str, layout: Layout) -> None:
    """Log-probs and gradients of the distinct completions, against the oracle, which reads one sequence at a time."""
    model, by_content = tiny_model(family), completions()
    batch = PairBatch.from_tensors(layout(ROWS))
    logps = dict(zip(batch.content_ids(), logps_of(model, batch).per_token.split(batch.lengths()), strict=True))
    found = torch.cat([logps[content] for content in by_content])
    assert_equal_logps(found, oracle_logps(model), model, model)


def test_each_pair_has_its_completions(layout: Layout) -> None:
    """The chosen and the rejected one of every pair, token by token."""
    model, batch = tiny_model("llama"), PairBatch.from_tensors(layout(ROWS))
    logps = logps_of(model, batch).per_token.split(batch.lengths())
    for side, sequences in (("chosen_ids", batch.chosen), ("rejected_ids", batch.rejected)):
        for row, sequence in zip(ROWS, sequences.tolist(), strict=True):
            expected = oracle.sequence_logps(model, tuple(row["prompt_ids"]), tuple(row[side]))
            torch.testing.assert_close(logps[sequence], expected, rtol=0, atol=1e-5)
            assert batch.content_ids()[sequence] == content_id(row["prompt_ids"], row[side])


def test_completions_without_pairs(layout: Layout) -> None:
    by_content = completions()
    rows = [Row(torch.tensor(prompt + completion).numpy(), len(prompt)) for prompt, completion in by_content.values()]
    batch = PairBatch.from_tensors(layout.of_completions(rows))
    assert batch.content_ids() == list(by_content)
    assert (len(batch.chosen), len(batch.rejected)) == (0, 0)
    model = tiny_model("llama")
    logps = logps_of(model, batch).per_token.split(batch.lengths())
    for found, (prompt, completion) in zip(logps, by_content.values(), strict=True):
        expected = oracle.sequence_logps(model, tuple(prompt), tuple(completion))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_it_says_of_its_rows(layout: Layout) -> None:
    """`tokens_in_rows` lies between the tokens that are no padding and all of them; one prompt of ten tokens is there
    once or five times, beside five completions of two."""
    prompt = [*range(3, 13)]
    rows = [Row(torch.tensor([*prompt, 20 + number, 30]).numpy(), 10) for number in range(5)]
    tensors = layout.of_completions(rows)
    num_attended = int((tensors["attention_mask"] > 0).sum())
    assert num_attended == (10 + 5 * 2 if layout.shares_prompts else 5 * 12)
    estimate = layout.tokens_in_rows(num_tokens=num_attended, num_sequences=5, longest=12)
    assert num_attended <= estimate <= tensors["input_ids"].numel()
    assert layout.fills_rows == (len(tensors["input_ids"]) < 5)


def test_the_last_to_fall_back_to_is_padded(layout: Layout) -> None:
    """With the same options on the way, so that a run's sequences are cut alike in each."""
    seen = [layout]
    while (fallback := seen[-1].fallback()) is not None:
        seen.append(fallback)
        assert (fallback.pad_token_id, fallback.max_length) == (PAD, 64)
        assert (fallback.truncation_mode, fallback.pad_to_multiple_of) == ("keep_end", 4)
    assert type(seen[-1]) is PaddedLayout


def test_it_travels_to_workers(layout: Layout) -> None:
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_a_completion_without_a_token_to_predict_is_refused(layout: Layout) -> None:
    pair = {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6, 7]}
    with pytest.raises(ValueError, match=r"must have a completion token to predict.*'chosen of pair 0'"):
        layout([pair])
