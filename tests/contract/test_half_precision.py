"""Half precision: it is recognised however it comes about, and wrong layouts are told from its rounding.

The gaps of right layouts and of wrong ones are those of `LayoutTrial`, on models whose weights are drawn with a scale
at which attention matters. fp16 is computed on the CPU as well.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

import holdfast.data.layouts.trial as trial
import holdfast.scoring.segments as row_segments
from families import CONFIGS, tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.base import Layout
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.data.layouts.trial import LayoutTrial
from holdfast.reference.identity.identity import Identity, numerics
from holdfast.scoring.frozen import Autocast
from holdfast.scoring.precision import fp32_products, is_half_precision, rounding_unit
from policies import POLICIES, config, logged, trainer
from shared_rows import ROWS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def autocast_to(dtype: torch.dtype | None) -> Autocast:
    return contextlib.nullcontext if dtype is None else lambda: torch.autocast("cpu", dtype)


# --- the precision of fp32 products ---------------------------------------------------------------------------------


def _old(value: str) -> None:
    torch.set_float32_matmul_precision(value)


def _new(value: str) -> None:  # as `tf32` of transformers does
    torch.backends.fp32_precision = value


def _of_cuda(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def _of_cpu(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value


def _allow(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


SETTINGS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "unset": (lambda: None, "ieee", "ieee"),
    "highest": (lambda: _old("highest"), "ieee", "ieee"),
    "high": (lambda: _old("high"), "tf32", "tf32"),
    "medium": (lambda: _old("medium"), "tf32", "bf16"),
    "allow_tf32": (lambda: _allow(True), "tf32", "ieee"),
    "allow_tf32=False": (lambda: _allow(False), "ieee", "ieee"),
    "tf32=True": (lambda: _new("tf32"), "tf32", "tf32"),
    "tf32=False": (lambda: _new("ieee"), "ieee", "ieee"),
    "cuda tf32": (lambda: _of_cuda("tf32"), "tf32", "ieee"),
    "cuda ieee": (lambda: _of_cuda("ieee"), "ieee", "ieee"),
    "cpu bf16": (lambda: _of_cpu("bf16"), "ieee", "bf16"),
    "cpu tf32": (lambda: _of_cpu("tf32"), "ieee", "tf32"),
    "all bf16": (lambda: _new("bf16"), "ieee", "bf16"),
    "old, then new": (lambda: (_old("high"), _new("ieee")), "tf32", "tf32"),
    "new, then old": (lambda: (_new("tf32"), _old("highest")), "ieee", "ieee"),
    "new, then cuda": (lambda: (_new("tf32"), _of_cuda("ieee")), "ieee", "tf32"),
}
"""How the precision of products is set, and what it is then on a GPU and on a CPU."""

OLD_KEYS = {
    "unset": False, "highest": False, "high": True, "medium": True, "allow_tf32": True, "allow_tf32=False": False,
    "tf32=False": False, "cuda ieee": False, "old, then new": True, "new, then old": False,
}  # fmt: skip
"""What the key of a store on a GPU has under `tf32` where the old functions of torch raise nothing."""


@pytest.fixture
def precision() -> Iterator[None]:
    """Afterwards torch computes as it did."""
    yield
    _old("highest")
    for names in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        names.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_precision_of_products_is_known_however_it_was_set(setting: str) -> None:
    change, on_gpu, on_cpu = SETTINGS[setting]
    change()
    assert (fp32_products(CUDA), fp32_products(CPU)) == (on_gpu, on_cpu)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("setting", SETTINGS)
def test_stores_are_found_again(setting: str) -> None:
    """The key's entry is what `torch.get_float32_matmul_precision() != "highest"` says where that raises nothing."""
    identity = Identity(tensors={}, settings={}, attention="sdpa", dtype="torch.float32")
    SETTINGS[setting][0]()
    found = [numerics(identity, device=device, mixed_precision="no", layout="padded")["tf32"] for device in (CUDA, CPU)]
    assert found == [SETTINGS[setting][1] != "ieee", False]
    if setting in OLD_KEYS:
        assert found[0] is OLD_KEYS[setting]
        assert found[0] is (torch.get_float32_matmul_precision() != "highest")


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("tf32=True", {}),
        ("tf32=True", {"precompute_ref_log_probs": True}),
        *(
            pytest.param(setting, options, marks=pytest.mark.nightly)
            for setting in ("tf32=False", "cuda tf32")
            for options in ({}, {"precompute_ref_log_probs": True}, {"reference": "model"})
        ),
    ],
    ids=str,
)
def test_runs_whose_products_were_set_by_the_new_names(setting: str, options: dict[str, Any], tmp_path: Any) -> None:
    """They share rows, store and train; a CPU without tf32 computes the same numbers."""
    options |= {"reference_store": str(tmp_path / "store")} if "precompute_ref_log_probs" in options else {}
    expected = trainer(POLICIES["full"](), config(tmp_path / "a", reference="model"))
    expected.train()
    SETTINGS[setting][0]()
    ours = trainer(POLICIES["full"](), config(tmp_path / "b", **options))
    assert ours._layout_name() == "prefix_shared"
    ours.train()
    assert logged(ours) == pytest.approx(logged(expected), rel=1e-6)


# --- half precision is recognised -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "autocast", "unit"),
    [
        (torch.float32, None, 0.0),
        (torch.float32, torch.bfloat16, 2**-8),
        (torch.float32, torch.float16, 2**-11),
        (torch.bfloat16, None, 2**-8),
        (torch.float16, None, 2**-11),
        (torch.bfloat16, torch.bfloat16, 2**-8),
        (torch.float16, torch.bfloat16, 2**-8),
    ],
    ids=str,
)
def test_half_precision_is_known_by_weights_and_autocast(
    weights: torch.dtype, autocast: torch.dtype | None, unit: float
) -> None:
    model = tiny_model().to(weights)
    assert rounding_unit(model, autocast_to(autocast)) == unit
    assert is_half_precision(model, autocast_to(autocast)) is (unit > 0)


@pytest.mark.usefixtures("precision")
def test_half_precision_is_known_by_products() -> None:
    model = tiny_model()
    _of_cpu("tf32")
    assert rounding_unit(model, contextlib.nullcontext) == 2**-11
    _of_cpu("bf16")
    assert rounding_unit(model, contextlib.nullcontext) == 2**-8


def half_only_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Like FlashAttention it refuses fp32; what rotations made fp32 under autocast is cast."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if dtype == torch.float32:
        raise RuntimeError("it only supports fp16 and bf16")
    states = [state.to(dtype) for state in (query, key, value)]
    return sdpa_attention_forward(module, *states, *args, **kwargs)


@pytest.fixture
def half_only(monkeypatch: pytest.MonkeyPatch) -> str:
    AttentionInterface.register("half_only", half_only_attention)
    AttentionMaskInterface.register("half_only", sdpa_mask)
    yield "half_only"
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("half_only")


def tried(
    model: nn.Module, layout: Layout, autocast: Autocast, change: Callable[[PairBatch], PairBatch] = lambda batch: batch
) -> str | None:
    """What is found wrong with `layout` where its batches come out as `change` makes them."""

    def pair_batch(tensors: Any) -> PairBatch:
        batch = PairBatch.from_tensors(tensors)
        return change(batch) if row_segments.SEGMENTS in tensors else batch

    accelerator: Any = SimpleNamespace(autocast=autocast, is_main_process=True)
    return LayoutTrial(
        models=[model], first_pairs=lambda: ROWS, pair_batch=pair_batch, accelerator=accelerator
    ).problem(layout)


@pytest.mark.parametrize("layout", [SharedLayout(0), PackedLayout(0)], ids=lambda layout: layout.name)
@pytest.mark.parametrize("autocast", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.nightly)], ids=str)
@pytest.mark.parametrize(
    "weights", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.nightly)], ids=str
)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "half_only"])
def test_every_attention_is_compared_in_the_precision_it_runs_in(
    attention: str, weights: torch.dtype, autocast: torch.dtype, layout: Layout, half_only: str
) -> None:
    model = tiny_model().to(weights)
    model.set_attn_implementation(attention)
    assert tried(model, layout, autocast_to(autocast)) is None


# --- a layout is judged by the noise of padded rows -----------------------------------------------------------------

MODES = {
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "bf16 weights": (torch.bfloat16, None),
    "fp16 autocast": (torch.float32, torch.float16),
    "fp16 weights": (torch.float16, None),
}
"""Dtypes of weights and autocast."""

_right_mask = row_segments._group_mask


def _see_each_other(visible: Any, prompt: int, group: Any, device: Any, *, is_joined: bool) -> Tensor:
    length = prompt + sum(group)
    return torch.ones(length, length, dtype=torch.bool).tril()[0 if is_joined else prompt :]


def _without_window(visible: Any, prompt: int, group: Any, device: Any, *, is_joined: bool) -> Tensor:
    return _right_mask(causal_mask_function, prompt, group, device, is_joined=is_joined)


def _without_prompt(visible: Any, prompt: int, group: Any, device: Any, *, is_joined: bool) -> Tensor:
    mask = _right_mask(visible, prompt, group, device, is_joined=is_joined).clone()
    mask[prompt if is_joined else 0 :, :prompt] = False
    return mask


def _one_further(batch: PairBatch) -> PairBatch:
    """The positions of completion tokens are off by one."""
    positions = batch.inputs["position_ids"].clone()
    positions.view(-1)[batch.source] += 1
    return replace(batch, inputs=batch.inputs | {"position_ids": positions})


MASK_MUTATIONS = {"see each other": _see_each_other, "no window": _without_window, "no prompt": _without_prompt}
WINDOWED = {"mistral", "gemma2", "gemma3", "gpt_oss", "cohere2"}
BELOW_ROUNDING = {("position", "gemma2", "bf16 autocast"), ("position", "gemma2", "bf16 weights")}
"""What changes a log-prob by no more than rounding does: its scores are soft-capped at 3."""
RIGHT = sorted(CONFIGS.keys() - {"lfm2", "falcon_h1"})
FOUND = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_oss", "cohere2"]
FAST = {"bf16 autocast": {"llama", "mistral", "gpt_oss"}, "bf16 weights": {"llama"}}
"""The families that every test run tries, by mode."""


def cells(families: Sequence[str]) -> list[Any]:
    """Each of the families in each of the modes."""
    return [
        pytest.param(family, mode, marks=[] if family in FAST.get(mode, ()) else pytest.mark.nightly)
        for family in families
        for mode in MODES
    ]


@pytest.fixture
def under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an attention that only runs under autocast: nothing is compared without it."""
    monkeypatch.setattr(trial, "_most_exact", lambda model, accelerator: accelerator.autocast)


@pytest.mark.usefixtures("under_autocast")
@pytest.mark.parametrize(("family", "mode"), cells(RIGHT))
def test_right_layouts_are_no_false_alarm(family: str, mode: str) -> None:
    weights, autocast = MODES[mode]
    for attention in ("sdpa", "eager"):
        model = tiny_model(family).to(weights)
        with contextlib.suppress(ValueError):  # a family without SDPA
            model.set_attn_implementation(attention)
        for layout in (SharedLayout(0), PackedLayout(0)):
            assert tried(model, layout, autocast_to(autocast)) is None


@pytest.mark.usefixtures("under_autocast")
@pytest.mark.parametrize(("family", "mode"), cells(FOUND))
@pytest.mark.parametrize("mutation", [*MASK_MUTATIONS, "position"])
def test_wrong_layouts_are_found(mutation: str, family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation == "no window" and family not in WINDOWED:
        pytest.skip("the family has no window")
    if (mutation, family, mode) in BELOW_ROUNDING:
        pytest.skip("rounding changes as much")
    weights, autocast = MODES[mode]
    if mutation in MASK_MUTATIONS:
        monkeypatch.setattr(row_segments, "_group_mask", MASK_MUTATIONS[mutation])
    change = _one_further if mutation == "position" else lambda batch: batch
    found = tried(tiny_model(family).to(weights), SharedLayout(0), autocast_to(autocast), change)
    assert "gives log-probs that differ from" in str(found), found
