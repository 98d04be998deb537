"""What the last layer computes of a row of shared prompts: no more than is read, and the same numbers.

That log-probs and gradients are those of the oracle, family by family, is in `test_shared_layout.py`.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import holdfast.scoring.routes.pieces as pieces
import holdfast.scoring.segments as row_segments
from families import VOCABULARY, tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.last_layer import narrowed
from holdfast.scoring.score import score
from holdfast.scoring.segments import SEGMENTS
from shared_rows import ROWS, assert_same, logps_of, problem, shared_batch

NARROWED = (
    "llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox", "gpt2", "phi3", "cohere2",
    "granite",
)  # fmt: skip
IN_FULL = ("mixtral", "qwen3_moe", "gpt_oss", "opt")


def layers_of(model: nn.Module) -> Sequence[nn.Module]:
    decoder = unwrap(model).get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def num_tokens_of_maps(model: nn.Module, batch: PairBatch) -> list[set[int]]:
    """By layer, how many tokens its feed-forward part's linear maps are given."""
    found: list[set[int]] = [set() for _ in layers_of(model)]

    def counted(place: int) -> Callable[..., None]:
        return lambda module, given, output: found[place].add(given[0][..., 0].numel())

    hooks = [
        part.register_forward_hook(counted(place))
        for place, layer in enumerate(layers_of(model))
        for part in getattr(layer, "mlp", layer).modules()
        if isinstance(part, nn.Linear | Conv1D)
    ]
    try:
        score(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def num_read(batch: PairBatch) -> int:
    segments = batch.inputs[SEGMENTS]
    return sum(1 + sum(map(sum, segment.groups)) for segment in segments)


@pytest.mark.parametrize("family", NARROWED)
def test_the_last_layer_computes_what_is_read(family: str) -> None:
    batch = shared_batch()
    num_tokens = batch.inputs["input_ids"].numel()
    assert num_tokens_of_maps(tiny_model(family), batch) == [{num_tokens}, {num_read(batch)}]


@pytest.mark.parametrize("family", IN_FULL)
def test_what_is_no_plain_feed_forward_part_is_computed_in_full(family: str) -> None:
    batch = shared_batch()
    first, last = num_tokens_of_maps(tiny_model(family), batch)
    assert first == last
    with narrowed(tiny_model(family), batch.inputs[SEGMENTS]) as modules:
        assert modules == frozenset()


def test_prompts_ask_nothing_in_the_last_layer_but_by_their_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_segments, "GROUP_TOKENS", 11)
    plain, asked = pieces._attend, []
    monkeypatch.setattr(pieces, "_attend", lambda call, query, *given: (
        asked.append(query.shape[1]) or plain(call, query, *given)
    ))  # fmt: skip
    batch, model = shared_batch(), tiny_model("mistral")
    logps_of(model, batch)
    assert sum(asked[: len(asked) // 2]) == int((batch.inputs["attention_mask"] > 0).sum())
    assert sum(asked[len(asked) // 2 :]) == num_read(batch)


def test_sequences_that_share_nothing_are_computed_in_full() -> None:
    batch = PairBatch.from_tensors(PackedLayout(0, row_tokens=40)(ROWS))
    first, last = num_tokens_of_maps(tiny_model("llama"), batch)
    assert first == last == {batch.inputs["input_ids"].numel()}


def test_where_little_is_left_out_nothing_is() -> None:
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [*range(7, 15)], "rejected_ids": [*range(15, 23)]}]
    first, last = num_tokens_of_maps(tiny_model("llama"), shared_batch(rows))
    assert first == last == {18}


@pytest.mark.parametrize("target", ["all-linear", ["down_proj"]])
def test_adapters_within_it_are_given_the_same_tokens(target: str | list[str]) -> None:
    batch = shared_batch()
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules=target)).eval()
    assert num_tokens_of_maps(model, batch)[-1] == {num_read(batch)}
    assert_same(model)


def test_dora() -> None:
    assert_same(get_peft_model(tiny_model("llama"), LoraConfig(r=4, init_lora_weights=False, use_dora=True)).eval())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_afterwards(fails: bool) -> None:
    """With the forward that somebody else put there, which is used."""
    model, batch, calls = tiny_model("llama"), shared_batch(), []
    module = layers_of(model)[-1].mlp
    forward = module.forward

    def own(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape)
        if fails:
            raise RuntimeError("here")
        return forward(hidden)

    expected = logps_of(model, batch).per_token
    assert "forward" not in vars(module)
    module.forward = own
    if fails:
        with pytest.raises(RuntimeError, match="here"):
            logps_of(model, batch)
    else:
        assert torch.equal(logps_of(model, batch).per_token, expected)
    assert module.forward is own
    assert calls == [(1, num_read(batch), 32)]


class Mixed(nn.Module):
    """Adds to each token what stands before it, by linear maps alone."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.down_proj = plain.down_proj
        self.up_proj = plain.up_proj

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(hidden)).cumsum(1)


def test_a_feed_forward_part_that_mixes_tokens_is_found() -> None:
    """It cannot be told by its parts; the comparison with padded rows tells."""
    model = tiny_model("llama")
    layers_of(model)[-1].mlp = Mixed(layers_of(model)[-1].mlp)
    assert "gives log-probs that differ from" in str(problem(model))


@pytest.mark.parametrize("part", [nn.Conv1d(32, 32, 1), nn.MultiheadAttention(32, 4), nn.LSTM(32, 32)])
def test_parts_that_may_mix_tokens_are_never_narrowed(part: nn.Module) -> None:
    model = tiny_model("llama")
    layers_of(model)[-1].mlp.more = part
    with narrowed(model, shared_batch().inputs[SEGMENTS]) as modules:
        assert modules == frozenset()


def test_a_layer_that_is_run_before_is_computed_in_full() -> None:
    model = tiny_model("llama")
    layers_of(model)[0].mlp = layers_of(model)[-1].mlp
    assert_same(model)
    assert num_tokens_of_maps(model, shared_batch())[-1] == {shared_batch().inputs["input_ids"].numel()}


LENGTHS = st.integers(min_value=1, max_value=9)
PAIRS = st.lists(st.tuples(st.integers(min_value=0, max_value=9), LENGTHS, LENGTHS), min_size=1, max_size=5)


@given(pairs=PAIRS, row_tokens=st.integers(min_value=1, max_value=60))
def test_every_token_that_predicts_is_read(pairs: list[tuple[int, int, int]], row_tokens: int) -> None:
    """And beyond these, no more than the last token of each completion."""
    draw = torch.Generator().manual_seed(0)
    rows = [
        {
            f"{side}_ids": torch.randint(3, VOCABULARY, (length + (prompt == 0),), generator=draw).tolist()
            for side, length in zip(("prompt", "chosen", "rejected"), (prompt, *lengths), strict=True)
        }
        for prompt, *lengths in pairs
    ]
    for row, (prompt, *_) in zip(rows, pairs, strict=True):
        row["prompt_ids"] = row["prompt_ids"] if prompt else []
    batch = shared_batch(rows, row_tokens=row_tokens)
    runs = batch.inputs[SEGMENTS].unread_and_read()
    assert sum(runs) == batch.inputs["input_ids"].numel()
    is_read = torch.cat([torch.full((length,), bool(place % 2)) for place, length in enumerate(runs)])
    assert is_read[batch.source].all()
    assert int(is_read.sum()) == len(batch.source.unique()) + batch.num_sequences
