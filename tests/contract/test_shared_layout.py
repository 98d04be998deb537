"""Shared prompts against the oracle, which has one row a completion: log-probs and gradients, family by family."""

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import holdfast.data.layouts.trial as trial
import holdfast.scoring.attention as attention
import holdfast.scoring.routes.pieces as pieces
import holdfast.scoring.segments as row_segments
import oracle
from families import CONFIGS, VOCABULARY, tiny_model
from flex_on_cpu import flex_on_cpu, num_graphs
from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.trial import measured_problem
from holdfast.scoring.attention import attending, shared_mask
from holdfast.scoring.segments import Segments
from recomputation import recompute
from shared_rows import ROWS, assert_same, logps_of, oracle_logps, padded_batch, problem, shared_batch

WRONG = {"lfm2", "falcon_h1"}
EXACT = sorted(CONFIGS.keys() - WRONG)


@pytest.fixture(params=["joined", "apart"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether prompts are attended with their completions by plain products, as short ones are, or each by a kernel."""
    if request.param == "apart":
        monkeypatch.setattr(row_segments, "GROUP_TOKENS", 11)
        monkeypatch.setattr(pieces, "PLAIN_SCORES", 0)
    return request.param


@pytest.mark.parametrize("family", EXACT)
def test_equals_the_oracle(family: str, cut: str) -> None:
    """In three rows, one of them of two segments, with padding."""
    batch = shared_batch()
    segments = batch.inputs[row_segments.SEGMENTS]
    assert {segment.is_joined for segment in segments} == ({True} if cut == "joined" else {False})
    assert len(batch.inputs["input_ids"]) == 3
    assert (batch.inputs["attention_mask"] == 0).any()
    model = tiny_model(family)
    assert_same(model)
    assert problem(model) is None


@pytest.mark.parametrize("row_tokens", [1, 10_000])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_however_rows_are_filled(family: str, row_tokens: int) -> None:
    """One segment a row, and everything in one row."""
    assert len(shared_batch(row_tokens=row_tokens).inputs["input_ids"]) == (4 if row_tokens == 1 else 1)
    assert_same(tiny_model(family), row_tokens=row_tokens)


@pytest.mark.parametrize("group_tokens", [0, 11, 25])
def test_however_completions_are_grouped(group_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_segments, "GROUP_TOKENS", group_tokens)
    assert_same(tiny_model("mistral"))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_rows_without_a_prompt(family: str) -> None:
    """Their first token is predicted by nothing; the oracle begins with the second."""
    rows = [{**row, "prompt_ids": []} for row in ROWS[-2:]]
    model = tiny_model(family)
    completions = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    expected = torch.cat([oracle.sequence_logps(model, ids[:1], ids[1:]) for ids in completions])
    torch.testing.assert_close(logps_of(model, shared_batch(rows)).per_token, expected, rtol=0, atol=1e-5)


def test_chunks_are_counted_in_positions() -> None:
    """Llama 4: a layer sees its chunk of 6 positions only. A second copy of the prompt's tokens would shift them."""
    model = tiny_model("llama4")
    assert "chunked_attention" in model.config.layer_types
    assert_same(model)


CONFIGS_MORE = {
    "llama4": lambda: tf.Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        attention_chunk_size=6, layer_types=["chunked_attention", "full_attention"], max_position_embeddings=128,
        no_rope_layers=[1, 0],
    ),
    "stablelm": lambda: tf.StableLmConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128,
    ),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "mamba": lambda: tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, config in CONFIGS_MORE.items():
        monkeypatch.setitem(CONFIGS, family, config)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("lfm2", r"has layers that are not attention \(conv\)"),
        ("falcon_h1", r"has layers that are not attention \(hybrid\)"),
        ("stablelm", r"fails on them \(ValueError: .*the segments of the rows did not reach it"),
        ("bloom", "is not on the attention interface"),
        ("mpt", "is not on the attention interface"),
        ("mamba", r"has layers that are not attention \(linear_attention\)"),
    ],
)
def test_families_that_need_padded_rows_are_found(family: str, reason: str) -> None:
    found = problem(tiny_model(family))
    assert found is not None
    assert re.search(reason, found), found


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1", "mamba"])
def test_convolutions_are_found_whatever_the_layers_are_called(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "ATTENTION_LAYERS", {"conv", "hybrid", "linear_attention", "full_attention"})
    assert str(problem(tiny_model(family))).endswith("carries state along its rows")


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1", "mamba"])
def test_state_along_the_row_is_also_found_in_the_numbers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "known_problem", lambda causal_lm: None)
    assert "gives log-probs that differ from" in str(problem(tiny_model(family)))


def test_a_broken_mask_is_found(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rejected completion sees the chosen one: every number is finite and plausible, and wrong."""
    model = tiny_model("llama")
    monkeypatch.setattr(row_segments, "_group_mask", lambda visible, prompt, group, device, is_joined: (
        torch.ones(prompt + sum(group), prompt + sum(group), dtype=torch.bool).tril()[0 if is_joined else prompt :]
    ))  # fmt: skip
    assert "gives log-probs that differ from" in str(problem(model))


def test_positions_that_run_on_are_found() -> None:
    """As if the rejected completion stood behind the chosen one."""
    model, shared = tiny_model("llama"), shared_batch()
    places = torch.arange(shared.inputs["position_ids"].shape[1]).expand_as(shared.inputs["position_ids"])
    wrong = replace(shared, inputs=shared.inputs | {"position_ids": places})
    with torch.no_grad():
        found = measured_problem(model, partial(logps_of, model), wrong, padded_batch())
    assert "gives log-probs that differ from" in str(found)


def test_the_tolerance_of_half_precision_is_a_mean() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).bfloat16()
    with torch.no_grad():
        compared = partial(measured_problem, model, partial(logps_of, model), shared_batch(), padded_batch())
        assert compared(is_half_precision=True) is None
        assert "5e-05 is rounding" in str(compared(is_half_precision=False))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_activation_checkpointing_computes_the_same_again(family: str, use_reentrant: bool) -> None:
    """The backward pass runs when the model's own attention is back in its place."""
    model, plain = tiny_model(family), tiny_model(family)
    recompute(model, use_reentrant)
    model.enable_input_require_grads()
    assert_same(model.train(), oracle_model=plain)


def test_lora() -> None:
    assert_same(get_peft_model(tiny_model("llama"), LoraConfig(r=4, init_lora_weights=False)).eval())


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_virtual_tokens_are_refused() -> None:
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(ValueError, match=r"rows of shared prompts of \d+ tokens; found \d+ queries.*Use the padded"):
        logps_of(model, shared_batch())


def test_ordinary_calls_are_untouched() -> None:
    model = tiny_model("gemma2")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    before, implementation = model(ids).logits, model.config._attn_implementation
    logps_of(model, shared_batch())
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 10)
    with attending(model, padded_batch().inputs) as inputs:
        assert model.config._attn_implementation == implementation
        assert inputs.keys() == {"input_ids", "attention_mask"}


def test_the_model_s_attention_is_back_after_a_failure() -> None:
    model, batch = tiny_model("llama"), shared_batch()
    recompute(model, False)
    functions = {name: vars(module).get("_gradient_checkpointing_func") for name, module in model.named_modules()}
    broken = replace(batch, inputs=batch.inputs | {"input_ids": batch.inputs["input_ids"] + VOCABULARY})
    with pytest.raises(IndexError):
        logps_of(model, broken)
    assert model.config._attn_implementation == "sdpa"
    after = {name: vars(module).get("_gradient_checkpointing_func") for name, module in model.named_modules()}
    assert after == functions


def test_it_is_refused_where_no_pieces_are() -> None:
    with pytest.raises(ValueError, match=r"works inside `attending` only; found a forward pass outside"):
        shared_mask()
    model = tiny_model("llama")
    model.config._attn_implementation = attention.NAME
    with pytest.raises(ValueError, match="Leave `attn_implementation` as it was"):
        model(torch.tensor([[5, 6, 7]]))


def test_no_other_attention_can_use_the_mask() -> None:
    """A layer that computes something again by other means than transformers' fails, and is not silently wrong."""
    model, batch = tiny_model("llama"), shared_batch()
    with attending(model, batch.inputs) as inputs:
        mask = shared_mask()
    num_rows, num_columns = inputs["input_ids"].shape
    states = torch.zeros(num_rows, 4, num_columns, 8)
    with pytest.raises((RuntimeError, IndexError)):
        torch.nn.functional.scaled_dot_product_attention(states, states, states, attn_mask=mask)


def test_what_is_attended_grows_with_the_tokens_and_not_with_their_square() -> None:
    """Twice the segments, twice the mask; and sixteen completions of 300 tokens are masked one by one."""
    visible, device = row_segments.causal_mask_function, torch.device("cpu")
    for prompt, queries in ((40, 70), (240, 30)):  # a short prompt is masked with its completions
        segment = [(0, prompt, True), (0, 20, False), (0, 10, False)]
        length = prompt + 30
        sizes = [Segments.of(segment * times, 1, length * times).masks(visible, device).numel() for times in (1, 2, 4)]
        assert sizes == [queries * length, 2 * queries * length, 4 * queries * length]
    long = [(0, 40, True), *[(0, 300, False)] * 16]
    assert Segments.of(long, 1, 40 + 16 * 300).masks(visible, device).numel() == 16 * 300 * 340


OFTEN_BY_FLEX = {"gpt_oss"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in OFTEN_BY_FLEX else pytest.mark.nightly) for name in EXACT]
)
def test_flex_attention_gives_the_same(family: str) -> None:
    """Values and gradients; soft-capped, with sinks, in windows and in grouped heads. Layers with windows and without
    are one graph with gradients and one without, and a batch of one row is none."""
    model = tiny_model(family)
    with flex_on_cpu():
        assert_same(model)
        assert problem(model) is None
        assert num_graphs() == 2
        assert_same(model, row_tokens=1_000)
        assert num_graphs() == 2


# --- FlashAttention, which is played by what it is defined as: it needs a GPU -----------------------------------------


def played_flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    sliding_window: int | None = None, *, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, max_length_q: int,
    max_length_k: int, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Each sequence for itself, in all rows laid end to end, as the lengths have it."""
    assert attention_mask is None
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert cu_seq_lens_q.dtype == torch.int32
    assert max_length_q == max_length_k == int(cu_seq_lens_q.diff().max())
    num_rows, num_heads, num_columns, width = query.shape
    ends = cu_seq_lens_q.tolist()
    assert ends[-1] == num_rows * num_columns
    laid = [state.transpose(1, 2).flatten(0, 1) for state in (query, key, value)]
    gathered = []
    for start, end in pairwise(ends):
        one = [state[start:end].transpose(0, 1)[None] for state in laid]
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if sliding_window is not None:
            seen = seen.triu(1 - sliding_window)
        attended = nn.functional.scaled_dot_product_attention(*one, attn_mask=seen, enable_gqa=True)
        gathered.append(attended[0].transpose(0, 1))
    return torch.cat(gathered).view(num_rows, num_columns, num_heads, width), None


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_flash_attention_attends_sequences_that_share_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model's own windows; shared prompts, and losses that need the mask, are attended piece by piece."""
    model, calls = tiny_model(family), []
    expected = oracle_logps(model)
    monkeypatch.setitem(tf.AttentionInterface._global_mapping, "flash_attention_2", lambda *given, **options: (
        calls.append(1) or played_flash_attention(*given, **options)
    ))  # fmt: skip
    for config in attention.configs_of(model):
        config._attn_implementation_internal = "flash_attention_2"
    packed = PairBatch.from_tensors(PackedLayout(0, row_tokens=40)(ROWS))
    assert (packed.inputs["attention_mask"] == 0).any()
    for batch, num_calls in ((packed, model.config.num_hidden_layers), (shared_batch(), 0)):
        calls.clear()
        found = logps_of(model, batch).per_token
        assert len(calls) == num_calls
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with attending(model, packed.inputs, needs_mask=True) as inputs:
        assert "attention_mask" in inputs
    assert model.config._attn_implementation == "flash_attention_2"
