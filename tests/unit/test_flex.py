"""Blocks against masks worked out pair by pair; the kernel against plain products; its graphs, counted."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import holdfast.scoring.routes.flex as flex_route
from flex_on_cpu import flex_on_cpu, num_graphs
from holdfast.scoring.routes import choice, flex_kernel
from holdfast.scoring.routes.base import AttentionCall, Needs
from holdfast.scoring.routes.blocks import BLOCK, Blocks, Pieces
from holdfast.scoring.routes.choice import FLEX
from holdfast.scoring.routes.flex import flex_mask
from holdfast.scoring.routes.flex_kernel import FlexMask, flex
from holdfast.scoring.routes.rules import ALLOWS, FARTHEST, Rule, recognised
from holdfast.scoring.segments import Segments

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")

CPU = torch.device("cpu")
LEFT_PADDING = torch.zeros(3, dtype=torch.int64)


def later_in_the_same_word(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask function of nobody's: causal, but words of four tokens see each other whole."""
    return (key <= query) | (key // 4 == query // 4)


VISIBLE: dict[str, Callable[..., Any]] = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(50),
    "short window": sliding_window_causal_mask_function(3),
    "window of a block": sliding_window_causal_mask_function(128),
    "long window": sliding_window_causal_mask_function(333),
    "chunks": chunked_causal_mask_function(64, LEFT_PADDING),
    "odd chunks": chunked_causal_mask_function(77, LEFT_PADDING),
    "long chunks": chunked_causal_mask_function(300, LEFT_PADDING),
    "another": later_in_the_same_word,
}

SHAPES = [(1, 20), (1, 128), (1, 129), (3, 43), (2, 300), (4, 99), (3, 128), (1, 1500), (2, 1024), (5, 256)]
"""Rows and columns."""


def made_segments(num_rows: int, num_columns: int, seed: int = 0) -> Segments:
    """Rows of prompts with up to four completions, some without a prompt, one whole sequence, and padding."""
    draw = torch.Generator().manual_seed(seed)

    def upto(most: int) -> int:
        return int(torch.randint(0, max(1, most) + 1, (), generator=draw))

    pieces: list[tuple[int, int, bool]] = []
    for row in range(num_rows):
        left = num_columns
        while left > 12:
            lengths = [upto(left // 2), *(upto(left // 8) for _ in range(upto(4)))]
            pieces += [(row, length, place == 0) for place, length in enumerate(lengths)]
            left -= sum(lengths)
    return Segments.of(pieces, num_rows, num_columns)


def seen_by_hand(segments: Segments, visible: Callable[..., Any]) -> Tensor:
    """Sees: its own segment, there its prompt or its own completion, positions that `visible` allows; and itself."""
    num_tokens = max(BLOCK + 1, len(segments.rows) * segments.num_columns)
    segment, completion, position = (torch.full((num_tokens,), fill) for fill in (-1, 0, 0))
    number = 0
    for row, row_segments in enumerate(segments.rows):
        start = row * segments.num_columns
        for one in row_segments:
            number += 1
            for which, length in enumerate([one.prompt, *chain.from_iterable(one.groups)]):
                here = slice(start, start + length)
                segment[here], completion[here] = number, which
                position[here] = torch.arange(length) + (one.prompt if which else 0)
                start += length
    is_one_segment = (segment[:, None] == segment) & (segment >= 0)
    is_own = (completion == 0) | (completion[:, None] == completion)
    zero = torch.zeros((), dtype=torch.int64)
    is_allowed = visible(zero, zero, position[:, None], position[None, :])
    return (is_one_segment & is_own & is_allowed) | torch.eye(num_tokens, dtype=torch.bool)


def seen_by_the_kernel(mask: FlexMask) -> Tensor:
    """What the function in the kernel says of every pair of tokens."""
    piece, prompt, position = mask.ids
    zero = torch.zeros((), dtype=torch.int64)
    is_own = (piece == piece[:, None]) | (piece == prompt[:, None])
    allowed = ALLOWS[mask.rule](zero, zero, position[:, None], position[None, :], mask.reach, mask.visible)
    return (is_own & allowed) | torch.eye(mask.num_tokens, dtype=torch.bool)


def listed(counts: Tensor, places: Tensor) -> Tensor:
    """The blocks of a list, as booleans [B B]."""
    dense = torch.zeros(places.shape[-2:], dtype=torch.bool)
    for line, (count, row) in enumerate(zip(counts.flatten().tolist(), places[0, 0].tolist(), strict=True)):
        assert len(set(row[:count])) == count
        dense[line, row[:count]] = True
    return dense


# --- which blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISIBLE)
def test_the_mask(name: str) -> None:
    """No block too few, none too many under a rule that is known, and those that are full are full."""
    visible = VISIBLE[name]
    for seed, (num_rows, num_columns) in enumerate(SHAPES):
        segments = made_segments(num_rows, num_columns, seed)
        mask = flex_mask(segments, visible, CPU)
        expected = seen_by_hand(segments, visible)
        assert torch.equal(seen_by_the_kernel(mask), expected)
        num_blocks = -(-len(expected) // BLOCK)
        assert mask.lists[0].shape == (1, 1, num_blocks)
        padded = torch.zeros(2 * (num_blocks * BLOCK,), dtype=torch.bool)
        padded[: len(expected), : len(expected)] = expected
        num_seen = padded.view(num_blocks, BLOCK, num_blocks, BLOCK).sum((1, 3))
        partial, full = (listed(*mask.lists[2 * which : 2 * which + 2]) for which in (0, 1))
        assert not (partial & full).any()
        if mask.rule is Rule.OTHER:
            assert not full.any()
            assert not ((num_seen > 0) & ~partial).any()
        else:
            assert torch.equal(full, num_seen == BLOCK * BLOCK)
            assert torch.equal(partial | full, num_seen > 0)
        assert torch.equal(listed(*mask.lists[4:6]), partial.T)
        assert torch.equal(listed(*mask.lists[6:8]), full.T)


def test_blocks_in_which_nobody_sees_anybody_are_skipped() -> None:
    """Eight segments of 128 tokens: of 64 blocks only those on the diagonal are computed. Of one sequence of 1024 those
    below it are full; in a window of 128, one beside each is computed."""
    eight = Segments.of([(0, 100, True), (0, 28, False)] * 8, 1, 1024)
    one = Segments.of([(0, 1024, True)], 1, 1024)
    for segments, reach, num_partial, num_full in ((eight, FARTHEST, 8, 0), (one, FARTHEST, 8, 28), (one, 128, 15, 0)):
        made = Blocks.of(Pieces.of(segments), Rule.NEAR, reach)
        assert (made.is_partial.sum(), made.is_full.sum()) == (num_partial, num_full)


def test_what_is_recognised() -> None:
    window, chunk = sliding_window_causal_mask_function, chunked_causal_mask_function
    table = [
        (causal_mask_function, (Rule.NEAR, FARTHEST)),
        (window(7), (Rule.NEAR, 7)),
        (chunk(9, LEFT_PADDING), (Rule.CHUNK, 9)),
        (and_masks(sliding_window_overlay(7)), (Rule.OTHER, 0)),  # sees later tokens
        (and_masks(window(7), chunk(7, LEFT_PADDING)), (Rule.OTHER, 0)),
        (or_masks(causal_mask_function, window(7)), (Rule.OTHER, 0)),
        (later_in_the_same_word, (Rule.OTHER, 0)),
        (window(0), (Rule.OTHER, 0)),
    ]
    for visible, expected in table:
        assert recognised(visible) == expected


def test_one_mask_a_batch_for_all_models_and_layers_of_a_kind() -> None:
    """Mask functions are made anew in every forward pass."""
    segments = made_segments(2, 300)
    one, other = (flex_mask(segments, sliding_window_causal_mask_function(5), CPU) for _ in range(2))
    assert all(a is b for a, b in zip(one.lists + one.ids, other.lists + other.ids, strict=True))
    assert flex_mask(segments, causal_mask_function, CPU).lists[0] is not one.lists[0]
    assert flex_mask(made_segments(2, 300), causal_mask_function, CPU).lists[0] is not one.lists[0]


# --- the kernel -------------------------------------------------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"has_sinks": True},
    "all at once": {"softcap": 2.0, "has_sinks": True, "num_key_heads": 2, "visible": "window"},
    "grouped heads": {"num_key_heads": 2},
    "three query heads": {"num_heads": 3, "num_key_heads": 1},
    "another scale": {"scaling": 0.3},
    "wider values": {"value_width": 24},
    "window": {"visible": "window"},
    "chunks": {"visible": "chunks"},
    "another rule": {"visible": "another"},
    "few tokens": {"shape": (2, 30)},
}

OFTEN = {"all at once", "few tokens"}


def made_call(
    *,
    shape: tuple[int, int] = (2, 170),
    num_heads: int = 4,
    num_key_heads: int | None = None,
    value_width: int = 16,
    has_sinks: bool = False,
    seed: int = 0,
    **options: Any,
) -> AttentionCall:
    draw = torch.Generator().manual_seed(seed)
    num_rows, num_columns = shape
    heads, widths = (num_heads, num_key_heads or num_heads, num_key_heads or num_heads), (16, 16, value_width)
    query, key, value = (
        torch.randn(num_rows, num_columns, count, width, generator=draw).transpose(1, 2).requires_grad_(True)
        for count, width in zip(heads, widths, strict=True)
    )
    sinks = torch.randn(num_heads, generator=draw).requires_grad_(True) if has_sinks else None
    segments = made_segments(*shape, seed)
    return AttentionCall(
        module=torch.nn.Identity(), query=query, key=key, value=value, segments=segments, sinks=sinks, **options
    )


def by_hand(call: AttentionCall, visible: Callable[..., Any]) -> Tensor:
    """The output [R T H dv] of `call`, row by row, by plain products in fp64."""
    num_tokens = call.query.shape[0] * call.query.shape[2]
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (call.query, call.key, call.value))
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * (call.scaling or query.shape[-1] ** -0.5)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    seen = seen_by_hand(call.segments, visible)[:num_tokens, :num_tokens]
    exponents = scores.exp() * seen
    sums = exponents.sum(-1) + (0 if call.sinks is None else call.sinks.double().exp()[:, None])
    output = torch.einsum("hqk,khd->qhd", exponents / sums[..., None], value.double())
    return output.unflatten(0, (call.query.shape[0], -1))


def by_flex(call: AttentionCall, visible: Callable[..., Any]) -> Tensor:
    prepared = FLEX.prepared(call.segments, visible, call.query.device, call.query.dtype)
    return FLEX.attend(call, prepared)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.nightly) for name in CALLS]
)
def test_output_and_gradients(name: str) -> None:
    """Padding, too, gets what is defined: its own values."""
    options = dict(CALLS[name])
    visible = VISIBLE[options.pop("visible", "causal")]
    call = made_call(**options)
    leaves = [tensor for tensor in (call.query, call.key, call.value, call.sinks) if tensor is not None]
    expected = by_hand(call, visible)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    with flex_on_cpu():
        found = by_flex(call, visible)
        gradients = torch.autograd.grad(found, leaves, direction)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(expected, leaves, direction.double()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_three_have_its_dtype() -> None:
    """Queries and keys may come in fp32 and values in bf16, from norms of their own."""
    call = made_call(num_key_heads=2)
    mixed = AttentionCall(
        module=call.module, query=call.query, key=call.key, value=call.value.bfloat16(), segments=call.segments
    )
    with flex_on_cpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = by_flex(mixed, causal_mask_function)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), by_hand(call, causal_mask_function), rtol=0.02, atol=0.03)


# --- what is compiled -------------------------------------------------------------------------------------------------


def attended(
    seed: int, *, is_training: bool, visible: Callable[..., Any] = causal_mask_function, **options: Any
) -> None:
    """One layer's call for a batch of any shape, with gradients or without."""
    draw = torch.Generator().manual_seed(seed)
    shape = (int(torch.randint(1, 5, (), generator=draw)), int(torch.randint(5, 80, (), generator=draw)))
    call = made_call(shape=shape, seed=seed, **options)
    call.module.train(is_training)
    with torch.set_grad_enabled(is_training):
        by_flex(call, visible)


KINDS_OF_LAYER: list[dict[str, Any]] = [
    {},
    {"visible": sliding_window_causal_mask_function(30)},
    {"visible": sliding_window_causal_mask_function(31)},
    {"visible": chunked_causal_mask_function(30, LEFT_PADDING)},
    {"softcap": 2.0},
    {"has_sinks": True, "scaling": 0.3},
    {"num_key_heads": 2},
]


@pytest.mark.parametrize("num_kinds", [3, pytest.param(len(KINDS_OF_LAYER), marks=pytest.mark.nightly)])
def test_two_graphs_a_kind_of_layer_and_none_for_another_batch(num_kinds: int) -> None:
    """Windows of any length and full attention are one kind. More kinds than the compiler's limit of versions, 8, have
    two graphs each; no other shape, number of rows or mode of the module has one."""
    kinds = KINDS_OF_LAYER[:num_kinds]
    with flex_on_cpu("eager"):
        for is_training in (True, False):
            for options in kinds:
                attended(0, is_training=is_training, **options)
        assert num_graphs() == 2 * (num_kinds - 2)
        for seed in range(1, 51):
            attended(seed, is_training=seed % 3 > 0, **kinds[seed % num_kinds])
        assert num_graphs() == 2 * (num_kinds - 2)


def test_which_inputs_want_gradients_is_another_graph() -> None:
    """As in the first layer of a policy with a LoRA on some of its maps."""
    with flex_on_cpu("eager"):
        for frozen in ("key", "value"):
            for seed in (0, 1, 2):
                call = made_call(shape=(1 + seed, 150 + seed), seed=seed)
                getattr(call, frozen).requires_grad_(False)
                by_flex(call, causal_mask_function)
        assert num_graphs() == 2


def test_one_version_too_many_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of all T x T scores. Here each batch is a version, because the shapes are not marked."""

    def many_batches() -> None:
        for seed in range(12):
            attended(seed, is_training=False)

    monkeypatch.setattr(flex_kernel, "_mark", lambda *_: None)
    limits = torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2)
    with flex_on_cpu("eager"), limits, pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        many_batches()


def test_a_process_without_compiler_is_an_error() -> None:
    with (
        flex_on_cpu("eager"),
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match=r"FlexAttention needs torch.compile, which is switched off"),
    ):
        attended(0, is_training=False)


# --- what it is tried on ----------------------------------------------------------------------------------------------


HALF_AND_MORE = [
    torch.bfloat16,
    *(pytest.param(dtype, marks=pytest.mark.nightly) for dtype in (torch.float32, torch.float16)),
]


@pytest.mark.parametrize("dtype", HALF_AND_MORE)
def test_the_probe_finds_it_right(dtype: torch.dtype) -> None:
    """With gradients, and with a window and without, in one graph. It takes none of the run's versions."""
    with flex_on_cpu():
        assert FLEX.works_on(CPU, dtype)
        assert num_graphs() == 1
        attended(0, is_training=True)
        assert num_graphs() == 2


def _without_completions(mask: FlexMask) -> FlexMask:
    return replace(mask, ids=(mask.ids[1], mask.ids[1], mask.ids[2]))


FAULTS: dict[str, Callable[..., Any]] = {
    "another mask": lambda q, k, v, mask, **given: flex(q, k, v, _without_completions(mask), **given),
    "another scale": lambda q, k, v, mask, **given: flex(q, k, v, mask, **given | {"scale": 0.25}),
    "keys exchanged": lambda q, k, v, mask, **given: flex(q, k.flip(2), v, mask, **given),
    "no gradient of keys": lambda q, k, v, mask, **given: flex(q, k * 0.5 + k.detach() * 0.5, v, mask, **given),
    "no number": lambda q, k, v, mask, **given: flex(q, k, v, mask, **given) * float("nan"),
}
FAULT_ROWS = [pytest.param(name, marks=[] if name == "another mask" else pytest.mark.nightly) for name in FAULTS]


@pytest.mark.parametrize("dtype", HALF_AND_MORE[:2])
@pytest.mark.parametrize("fault", FAULT_ROWS)
def test_the_probe_finds_faults(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flex_route, "flex", FAULTS[fault])
    with flex_on_cpu("aot_eager"), caplog.at_level(logging.WARNING):
        assert not FLEX.works_on(CPU, dtype)
    assert "attention: flex is not used on cpu in " in caplog.text
    assert "its results there differ by" in caplog.text


def test_a_kernel_that_cannot_be_compiled_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """Here, because torch has no gradients of it on CPUs."""
    with caplog.at_level(logging.WARNING):
        assert not FLEX.works_on(CPU, torch.float32)
    assert "attention: flex is not used on cpu in float32: it fails there (Unsupported" in caplog.text


def test_where_it_is_meant_for() -> None:
    cuda = torch.device("cuda", 0)
    assert not FLEX.runs_on(CPU, torch.float32)
    assert [FLEX.runs_on(cuda, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)] == [
        True,
        True,
        False,
    ]
    widths = {"key_width": 8, "value_width": 8, "num_scores": 1}
    assert FLEX.problem(Needs(**widths, caps_scores=True, has_sinks=True), causal_mask_function) is None
    assert FLEX.problem(Needs(**widths, drops=True), causal_mask_function) is not None
    assert choice.FLEX in choice.ROUTES


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel is compiled")
def test_the_compiled_kernel_gives_what_plain_products_give() -> None:
    """By the compiler that GPUs have, forward only."""
    call = made_call(num_key_heads=2, softcap=2.0)
    with flex_on_cpu("inductor"), torch.no_grad():
        found = by_flex(call, causal_mask_function)
    torch.testing.assert_close(found.double(), by_hand(call, causal_mask_function).detach(), rtol=0, atol=1e-5)
