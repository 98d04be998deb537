"""The routes that attention over filled rows takes on GPUs, against the oracle, which has one row a completion.

The kernel of `varlen` is played by what it is defined as; `dense` is torch's own SDPA. Both are given a CPU here.
"""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import holdfast.scoring.routes.choice as choice
import holdfast.scoring.routes.dense as dense
import holdfast.scoring.routes.pieces as pieces
import holdfast.scoring.routes.probes as probes
import holdfast.scoring.routes.varlen as varlen
import oracle
import played_varlen
from families import CONFIGS, VOCABULARY, tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.scoring.routes.base import AttentionCall, Needs, Route
from holdfast.scoring.score import score
from holdfast.scoring.segments import SEGMENTS, Segments
from holdfast.scoring.token_limit import score_within_limit
from played_varlen import played_varlen_attn
from recomputation import recompute
from shared_rows import ROWS, assert_equal_logps, assert_same, logps_of, oracle_logps, problem, shared_batch

CPU = torch.device("cpu")
ATTENDED_BY: dict[str, str] = {
    "llama": "varlen", "llama_tied": "varlen", "qwen2": "varlen", "qwen3": "varlen", "mistral": "varlen",
    "gemma3": "varlen", "gpt_neox": "varlen", "gpt2": "varlen", "phi3": "varlen", "cohere2": "varlen",
    "granite": "varlen", "mixtral": "varlen", "qwen3_moe": "varlen", "opt": "varlen",
    "gemma2": "pieces", "gpt_oss": "pieces", "llama4": "dense varlen",
}  # fmt: skip
"""By family the routes of its layers where there is no FlexAttention: soft-caps, sinks and chunks are beyond `varlen`,
the first two beyond `dense` as well."""
CONFIGS_MORE = {
    "llama4": lambda: tf.Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        attention_chunk_size=6, layer_types=["chunked_attention", "full_attention"], max_position_embeddings=128,
        no_rope_layers=[1, 0],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The routes of GPUs on a CPU, but for FlexAttention; the kernel of `varlen` is tried as it is there."""
    monkeypatch.setattr(varlen, "varlen_attn", played_varlen_attn)
    monkeypatch.setitem(CONFIGS, "llama4", CONFIGS_MORE["llama4"])
    take(monkeypatch, choice.VARLEN, choice.WIDE_VARLEN, choice.DENSE, choice.PIECES)
    monkeypatch.setattr(probes, "_REFUSED", set())
    probes._tried.cache_clear()
    yield
    probes._tried.cache_clear()


def take(monkeypatch: pytest.MonkeyPatch, *routes: Route) -> None:
    monkeypatch.setattr(choice, "candidates", lambda device, dtype: list(routes))


def names_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[str]:
    return [route.name for route in choice.routes_of(model, CPU, dtype)]


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("family", ATTENDED_BY)
def test_equals_the_oracle(family: str, row_tokens: int) -> None:
    """With padding, windows shorter than prompts, up to four completions of a prompt; a row each, and all in one."""
    model = tiny_model(family)
    assert_same(model, row_tokens=row_tokens)
    assert " ".join(dict.fromkeys(names_of(model))) == ATTENDED_BY[family]


@pytest.mark.parametrize("family", ATTENDED_BY)
def test_one_call_under_a_mask_equals_the_oracle(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, choice.DENSE, choice.PIECES)
    model = tiny_model(family)
    assert_same(model)
    assert set(names_of(model)) == ({"pieces"} if family in ("gemma2", "gpt_oss") else {"dense"})


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_layout_s_trial_finds_nothing(family: str) -> None:
    assert problem(tiny_model(family)) is None


def edge_rows() -> dict[str, list[dict[str, list[int]]]]:
    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()

    prompt = ids(13)
    return {
        "one token each": [{"prompt_ids": ids(1), "chosen_ids": [5], "rejected_ids": [6]}],
        "completions of one token": [{"prompt_ids": ids(9), "chosen_ids": [5], "rejected_ids": ids(4)}],
        "many completions": [
            {"prompt_ids": prompt, "chosen_ids": ids(2 + place), "rejected_ids": ids(20 - place)} for place in range(8)
        ],
        "a completion of two pairs": [
            {"prompt_ids": prompt, "chosen_ids": ids(5), "rejected_ids": other} for other in (ids(3), ids(4))
        ],
        "long beside short": [
            {"prompt_ids": ids(40), "chosen_ids": ids(30), "rejected_ids": ids(1)},
            {"prompt_ids": ids(1), "chosen_ids": ids(1), "rejected_ids": ids(2)},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("route", [choice.VARLEN, choice.DENSE], ids=lambda route: route.name)
@pytest.mark.parametrize("case", edge_rows())
def test_rows_at_the_edges(case: str, route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, route)
    rows, model = edge_rows()[case], tiny_model("mistral")
    found = logps_of(model, shared_batch(rows)).per_token
    assert_equal_logps(found, oracle_logps(model, rows), model, model)


@pytest.mark.parametrize("route", [choice.VARLEN, choice.DENSE], ids=lambda route: route.name)
def test_rows_without_a_prompt(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, route)
    rows, model = [{**row, "prompt_ids": []} for row in ROWS[-2:]], tiny_model("mistral")
    completions = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    expected = torch.cat([oracle.sequence_logps(model, ids[:1], ids[1:]) for ids in completions])
    assert_equal_logps(logps_of(model, shared_batch(rows)).per_token, expected, model, model)


@pytest.mark.parametrize("route", [choice.VARLEN, choice.DENSE], ids=lambda route: route.name)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_that_share_no_prompt(family: str, route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, route)
    batch, model = PairBatch.from_tensors(PackedLayout(0, row_tokens=40)(ROWS)), tiny_model(family)
    assert (batch.inputs["attention_mask"] == 0).any()
    assert_equal_logps(logps_of(model, batch).per_token, oracle_logps(model), model, model)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("route", [choice.VARLEN, choice.DENSE], ids=lambda route: route.name)
def test_activation_checkpointing_computes_the_same_again(
    route: Route, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, route)
    model, plain = tiny_model("mistral"), tiny_model("mistral")
    recompute(model, use_reentrant)
    model.enable_input_require_grads()
    assert_same(model.train(), oracle_model=plain)


@pytest.mark.parametrize("route", [choice.VARLEN, choice.DENSE], ids=lambda route: route.name)
def test_rows_that_are_scored_a_few_at_a_time(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, route)
    model, batch = tiny_model("mistral"), shared_batch(row_tokens=1)
    assert len(batch.inputs["input_ids"]) == 4
    found = score_within_limit(model, batch, 2 * batch.inputs["input_ids"].shape[1]).logps.per_token
    assert_equal_logps(found, oracle_logps(model), model, model)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_under_autocast(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries come in fp32 there and values in bf16; the kernel takes one dtype. As near to the oracle as pieces."""
    model, gaps = tiny_model(family), []
    expected = oracle_logps(model)
    for routes in ((choice.VARLEN,), (choice.DENSE,), (choice.PIECES,)):
        take(monkeypatch, *routes)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = logps_of(model, shared_batch()).per_token
        gaps.append((found - expected).abs().mean().item())
    assert max(gaps[:2]) < 1.5 * gaps[2]
    assert gaps[2] > 1e-3  # it is half precision


@pytest.mark.parametrize("route", [choice.VARLEN, choice.DENSE], ids=lambda route: route.name)
def test_equal_models_give_equal_log_probs(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients and without."""
    take(monkeypatch, route)
    policy, reference, batch = tiny_model("mistral"), tiny_model("mistral"), shared_batch()
    with torch.no_grad():
        expected = logps_of(reference, batch).per_token
    assert torch.equal(logps_of(policy.train(), batch).per_token, expected)


# --- what it costs ----------------------------------------------------------------------------------------------------


def num_calls(model: nn.Module, batch: PairBatch, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How often the kernel is called in a forward pass, and how often keys or values are gathered for it."""
    calls, gathered = [], []
    plain = Tensor.index_select
    monkeypatch.setattr(varlen, "varlen_attn", lambda *given, **options: (
        calls.append(1) or played_varlen_attn(*given, **options)
    ))  # fmt: skip
    monkeypatch.setattr(Tensor, "index_select", lambda *given: gathered.append(1) or plain(*given))
    with torch.no_grad():
        score(model, batch)
    return len(calls), len(gathered)


def test_one_call_a_layer_and_two_gathers_where_prompts_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mistral")
    logps_of(model, shared_batch())  # the kernel is tried
    assert num_calls(model, shared_batch(), monkeypatch) == (2, 4)
    packed = PairBatch.from_tensors(PackedLayout(0, row_tokens=40)(ROWS))
    assert num_calls(model, packed, monkeypatch) == (2, 0)


def test_what_a_route_prepares_is_made_once_a_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohere 2 has layers with and without a window: two masks, however many layers."""
    made, plain = [], dense.DenseRoute.prepared
    take(monkeypatch, choice.DENSE)
    monkeypatch.setattr(dense.DenseRoute, "prepared", lambda *given: made.append(1) or plain(*given))
    model = tiny_model("cohere2", num_hidden_layers=8)
    assert len(set(model.config.layer_types)) == 2
    logps_of(model, shared_batch())
    assert len(made) == 2


def test_grouped_heads_meet_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs the fast kernels take no grouped heads under a mask: each head gets keys and values of its own."""
    heads, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        assert not options.get("enable_gqa")
        heads.append((query.shape[1], key.shape[1], value.shape[1]))
        return plain(query, key, value, **options)

    take(monkeypatch, choice.DENSE)
    monkeypatch.setattr(dense, "scaled_dot_product_attention", watched)
    logps_of(tiny_model("llama"), shared_batch())
    assert heads == [(4, 4, 4)] * 2


def test_rows_of_a_mask_begin_where_no_copy_is_needed() -> None:
    batch = shared_batch()
    assert batch.inputs["input_ids"].shape[1] % 8 != 0
    mask = choice.DENSE.prepared(batch.inputs[SEGMENTS], causal_mask_function, CPU, torch.float32)
    assert mask.stride(2) % 8 == 0
    assert mask.shape[1:] == (1, *batch.inputs["input_ids"].shape[1:] * 2)


# --- which route ------------------------------------------------------------------------------------------------------

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "names"),
    [
        ("cpu", torch.float32, "pieces"), ("cpu", BF16, "pieces"), ("cuda", BF16, "varlen varlen flex dense pieces"),
        ("cuda", torch.float16, "varlen varlen flex dense pieces"), ("cuda", torch.float32, "flex dense pieces"),
        ("xpu", BF16, "dense pieces"), ("mps", torch.float32, "dense pieces"),
    ],
)  # fmt: skip
def test_which_routes_a_device_has(
    device: str, dtype: torch.dtype, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert " ".join(route.name for route in choice.candidates(torch.device(device), dtype)) == names


def test_nothing_is_compiled_for_a_dtype_that_the_run_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout is tried in fp32, where it can be; FlexAttention compiled for that would never be used again."""
    monkeypatch.undo()
    with choice.compiling_only_in({BF16}):
        assert choice.FLEX not in choice.candidates(CUDA, torch.float32)
        assert choice.FLEX in choice.candidates(CUDA, BF16)
    assert choice.FLEX in choice.candidates(CUDA, torch.float32)


PLAIN = Needs(key_width=64, value_width=64, num_scores=10**6)
CHUNKS = chunked_causal_mask_function(6, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("needs", "visible", "works", "name"),
    [
        (PLAIN, causal_mask_function, "varlen flex", "varlen"),
        (PLAIN, sliding_window_causal_mask_function(5), "varlen flex", "varlen"),
        (PLAIN, causal_mask_function, "flex", "flex"),
        (PLAIN, causal_mask_function, "", "dense"),
        (PLAIN, CHUNKS, "varlen flex", "flex"),
        (PLAIN, CHUNKS, "varlen", "dense"),
        (replace(PLAIN, caps_scores=True), causal_mask_function, "varlen flex", "flex"),
        (replace(PLAIN, caps_scores=True), causal_mask_function, "varlen", "pieces"),
        (replace(PLAIN, has_sinks=True), causal_mask_function, "varlen flex", "flex"),
        (replace(PLAIN, has_sinks=True), causal_mask_function, "varlen", "pieces"),
        (replace(PLAIN, drops=True), causal_mask_function, "varlen flex", "dense"),
        (replace(PLAIN, value_width=32), causal_mask_function, "varlen flex", "flex"),
        (replace(PLAIN, key_width=60, value_width=60), causal_mask_function, "varlen flex", "flex"),
        (replace(PLAIN, key_width=264, value_width=264), causal_mask_function, "varlen flex", "flex"),
        (replace(PLAIN, key_width=256, value_width=256), causal_mask_function, "varlen flex", "varlen"),
        (replace(PLAIN, num_scores=2**31), causal_mask_function, "", "pieces"),
    ],
)
def test_a_layer_takes_the_first_route_that_can_do_what_it_needs(
    needs: Needs, visible: Callable[..., Any], works: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(probes, "works", lambda route, device, dtype: route.name in (*works.split(), "dense", "pieces"))
    assert choice.choose(needs, visible, CUDA, BF16).name == name


def test_a_layer_that_drops_attention_weights_goes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    expected = logps_of(model, shared_batch()).per_token
    assert set(names_of(model)) == {"varlen"}
    found = logps_of(model.train(), shared_batch()).per_token
    assert set(names_of(model)) == {"dense"}
    assert (found - expected).abs().max() > 1e-2
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("visible", "takes"),
    [
        (causal_mask_function, True),
        (sliding_window_causal_mask_function(5), True),
        (sliding_window_causal_mask_function(4096), True),
        (and_masks(sliding_window_overlay(7), causal_mask_function), True),
        (and_masks(causal_mask_function, sliding_window_overlay(7)), False),  # the same band, written otherwise
        (sliding_window_overlay(7), False),
        (or_masks(sliding_window_overlay(7), causal_mask_function), False),
        (or_masks(sliding_window_causal_mask_function(5), sliding_window_overlay(7)), False),
        (and_masks(sliding_window_causal_mask_function(5), sliding_window_overlay(3)), False),
        (CHUNKS, False),
        (lambda row, head, query, key: key <= query, False),
        (partial(causal_mask_function), False),
    ],
)
def test_masks_that_the_kernel_takes_as_a_number(visible: Callable[..., Any], takes: bool) -> None:
    assert (choice.VARLEN.problem(PLAIN, visible) is None) == takes


@pytest.mark.parametrize("window", [1, 5, 300])
def test_the_number_is_what_the_mask_function_says(window: int) -> None:
    visible = sliding_window_causal_mask_function(window)
    places = torch.arange(200)
    seen = visible(places[0], places[0], places[:, None], places)
    prepared = choice.VARLEN.prepared(shared_batch().inputs[SEGMENTS], visible, CPU, BF16)
    distance = places[:, None] - places
    assert torch.equal(seen, (distance >= 0) & (distance <= prepared.num_before))


# --- a kernel that is wrong -------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "aligned at the top": (partial(played_varlen_attn, is_aligned_at_the_top=True), "differ by|NaN|nan"),
    "windows ignored": (partial(played_varlen_attn, heeds_windows=False), r"results there differ by 0\.\d+ of"),
    "a window of one more": (partial(played_varlen_attn, wrong_window=1), r"results there differ by 0\.\d+ of"),
    "a window of one less": (partial(played_varlen_attn, wrong_window=-1), r"results there differ by 0\.\d+ of"),
    "another scale": (partial(played_varlen_attn, wrong_scale=1.2), r"results there differ by 0\.\d+ of"),
    "heads of other groups": (partial(played_varlen_attn, swaps_heads=True), "results there differ by"),
    "gradient of queries": (played_varlen.with_wrong_gradient(0, 1.05), r"differ by 0\.0[45]\d* of"),
    "gradient of keys": (played_varlen.with_wrong_gradient(1, 1.05), r"differ by 0\.0[45]\d* of"),
    "gradient of values": (played_varlen.with_wrong_gradient(2, -1.0), r"differ by 2 of"),
    "an error": (played_varlen.failing, r"fails there \(RuntimeError: FlashAttention only supports Ampere GPUs or"),
    "no numbers": (played_varlen.not_a_number, "differ by nan of"),
    "no numbers under a window": (played_varlen.not_a_number_under_a_window, "differ by nan of"),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_kernel_that_is_wrong_is_not_used(
    mistake: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning says why; the next route is taken, and its numbers are right."""
    kernel, message = MISTAKES[mistake]
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choice.choose(PLAIN, causal_mask_function, CPU, dtype) is choice.DENSE
    (record,) = caplog.records
    assert record.getMessage().startswith(f"attention: varlen is not used on cpu in {str(dtype)[6:]}: ")
    caplog.clear()
    assert re.search(message, record.getMessage()), record.getMessage()
    if dtype == torch.float32:
        model = tiny_model("mistral")
        assert_same(model)
        assert set(names_of(model)) == {"dense"}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_kernel_that_is_right_is_used(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """In half precision it computes in half precision, and is well within what is rounding."""
    assert choice.choose(PLAIN, causal_mask_function, CPU, dtype) is choice.VARLEN
    assert not caplog.records
    gap = max(probes.largest_gap(choice.VARLEN, CPU, dtype, window) for window in (None, 7))
    assert gap < {BF16: 0.02, torch.float16: 0.003, torch.float32: 1e-5, torch.float64: 1e-5}[dtype]


@pytest.mark.parametrize("route", [choice.DENSE, choice.PIECES], ids=lambda route: route.name)
def test_the_other_routes_pass_the_same_trial(route: Route) -> None:
    for dtype, largest in ((torch.float32, 1e-5), (BF16, 0.02)):
        for window in (None, 7):
            assert probes.largest_gap(route, CPU, dtype, window) < largest


def test_wide_heads_are_tried_by_themselves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A device may have no gradients for them alone."""

    def narrow_only(query: Tensor, *given: Any, **options: Any) -> Tensor:
        if query.shape[-1] > 192:
            raise RuntimeError("head dim > 192")
        return played_varlen_attn(query, *given, **options)

    monkeypatch.setattr(varlen, "varlen_attn", narrow_only)
    wide = replace(PLAIN, key_width=256, value_width=256)
    assert choice.choose(wide, causal_mask_function, CPU, BF16) is choice.DENSE
    assert choice.choose(PLAIN, causal_mask_function, CPU, BF16) is choice.VARLEN
    assert len(caplog.records) == 1


# --- pieces on a GPU --------------------------------------------------------------------------------------------------


def test_pieces_repeat_keys_under_a_mask_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There SDPA's fast kernels take no grouped heads together with a mask. The device is `meta`, without values."""
    asked: list[tuple[bool, bool]] = []

    def played(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, enable_gqa: bool, **_: Any):
        asked.append((attn_mask is not None, enable_gqa))
        assert key.shape[1] == (2 if enable_gqa else 4)
        return torch.empty_like(query)

    monkeypatch.setattr(pieces, "scaled_dot_product_attention", played)
    segments = Segments.of([(0, 300, True), (0, 20, False), (0, 10, False)], 1, 340)
    states = [torch.empty(1, heads, 340, 16, device="meta") for heads in (4, 2, 2)]
    call = AttentionCall(module=nn.Identity(), query=states[0], key=states[1], value=states[2], segments=segments)
    masks = choice.PIECES.prepared(segments, causal_mask_function, CPU, torch.float32).to("meta")
    assert choice.PIECES.attend(call, masks).shape == (1, 340, 4, 16)
    assert asked == [(False, True), (True, False)]


# --- compiled bodies --------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")
@pytest.mark.parametrize("route", [choice.VARLEN, choice.DENSE], ids=lambda route: route.name)
def test_a_compiled_body_has_as_many_graphs_as_with_pieces(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    num_graphs = []
    for taken in (choice.PIECES, route):
        take(monkeypatch, taken)
        torch._dynamo.reset()
        counters.clear()
        model = tiny_model("mistral")
        compiled = torch.compile(model, backend="eager")
        for place, row_tokens in ((2, 30), (3, 1000), (1, 30), (0, 40), (2, 1000), (4, 40)):
            batch = shared_batch(ROWS[place:], row_tokens=row_tokens)
            with torch.no_grad():
                torch.testing.assert_close(
                    logps_of(compiled, batch).per_token, logps_of(model, batch).per_token, rtol=0, atol=1e-5
                )
        num_graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert num_graphs[0] == num_graphs[1] > 0
