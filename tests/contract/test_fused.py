"""The pieces of a model's body that few operations compute, against the model's own code and against fp64."""

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import holdfast.scoring.attention as attention
from families import CONFIGS, tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.fused import norms, rotary
from holdfast.scoring.fused.body import Pieces, pieces_of, replaced
from recomputation import recompute
from shared_rows import ROWS, gradients, logps_of, shared_batch

WRONG_IN_SHARED_ROWS = {"lfm2", "falcon_h1"}
NUM_NORMS = {
    "llama": 5, "llama_tied": 5, "qwen2": 5, "qwen3": 9, "mistral": 5, "gemma2": 9, "gemma3": 13, "phi3": 5,
    "granite": 5, "mixtral": 5, "qwen3_moe": 9, "gpt_oss": 5,
    "gpt_neox": 0, "gpt2": 0, "opt": 0,  # torch's own LayerNorm
    "cohere2": 0,  # its norm subtracts the mean
}  # fmt: skip
"""Of a model of two layers."""
OWN_ROTATION = {"gpt2", "opt", "cohere2", "gpt_oss"}
"""No rotation, an interleaved one, and one that is called otherwise."""


@contextlib.contextmanager
def own_code() -> Iterator[None]:
    """Inside, filled rows are computed by the model's own norms and rotations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "pieces_of", lambda _: Pieces())
        yield


def numbers_of(model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradients of a random combination of them."""
    logps = logps_of(model, batch).per_token
    direction = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    return logps.detach(), gradients(logps @ direction, model)


def assert_as_own(model: nn.Module, batch: PairBatch) -> None:
    """Log-probs within 1e-5 nats of those of the model's own code, gradients within 1e-5 of the largest one."""
    logps, found = numbers_of(model, batch)
    with own_code():
        expected_logps, expected = numbers_of(model, batch)
    torch.testing.assert_close(logps, expected_logps, rtol=0, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * (1 + float(gradient.abs().max())))


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - WRONG_IN_SHARED_ROWS))
def test_as_the_models_own(family: str) -> None:
    model = tiny_model(family)
    pieces = pieces_of(model)
    assert len(pieces.forwards) == NUM_NORMS[family]
    assert len(pieces.rotations) == (0 if family in OWN_ROTATION else 1)
    assert_as_own(model, shared_batch())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_packed_rows_too(family: str) -> None:
    assert_as_own(tiny_model(family), PairBatch.from_tensors(PackedLayout(0, row_tokens=64)(ROWS)))


def _norms_tuned(model: PreTrainedModel) -> nn.Module:
    return get_peft_model(model, LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]))


def _norms_saved(model: PreTrainedModel) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"]))


def _frozen_norms(model: PreTrainedModel) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    return model


WRAPPED: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "tuned": _norms_tuned,
    "modules_to_save": _norms_saved,
    "frozen": _frozen_norms,
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # of peft, about tuned norms
@pytest.mark.parametrize("name", WRAPPED)
def test_norms_that_train_alone_and_norms_that_do_not(name: str) -> None:
    model = WRAPPED[name](tiny_model("llama"))
    assert_as_own(model, shared_batch())
    trains = any("norm" in n for n, _ in numbers_of(model, shared_batch())[1].items())
    assert trains == (name != "frozen")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputed_layers(family: str, use_reentrant: bool) -> None:
    model, batch = tiny_model(family), shared_batch()
    expected_logps, expected = numbers_of(model, batch)
    model.train()
    model.enable_input_require_grads()
    recompute(model, use_reentrant)
    logps, found = numbers_of(model, batch)
    assert torch.equal(logps, expected_logps)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * (1 + float(gradient.abs().max())))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_equal_with_and_without_gradients(family: str, autocast: bool) -> None:
    """A policy is scored with gradients and its reference without: equal models must get equal log-probs."""
    model, batch = tiny_model(family), shared_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with_gradients = logps_of(model, batch).per_token
        with torch.no_grad():
            without = logps_of(model, batch).per_token
    assert torch.equal(with_gradients, without)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_rounds_no_worse_than_the_models_own(family: str, way: str) -> None:
    """In bf16, the mean gap to fp32 over some models is at most 1.1 times that of the model's own code."""
    batch, ours, own = shared_batch(), 0.0, 0.0
    for seed in range(6):
        model = tiny_model(family, seed=seed)
        with torch.no_grad(), own_code():
            exact = logps_of(model, batch).per_token
        if way == "weights":
            model = model.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            ours += float((logps_of(model, batch).per_token - exact).abs().mean())
            with own_code():
                own += float((logps_of(model, batch).per_token - exact).abs().mean())
    assert 0 < ours <= 1.1 * own


# --- what is replaced, and put back -----------------------------------------------------------------------------------


def _state(model: PreTrainedModel) -> list[Any]:
    modules = list(unwrap(model).modules())
    return [llama.apply_rotary_pos_emb, *(module.__dict__.get("forward") for module in modules)]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails: bool) -> None:
    model = tiny_model("llama")
    before = _state(model)
    if fails:
        model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logps_of(model, shared_batch())
    else:
        logps_of(model, shared_batch()).per_token.sum().backward()
    assert _state(model) == before


def test_may_be_entered_again_within() -> None:
    model = tiny_model("llama")
    before, pieces = _state(model), pieces_of(model)
    with replaced(pieces):
        inside = _state(model)
        with replaced(pieces):
            assert _state(model) == inside != before
        assert _state(model) == inside
    assert _state(model) == before


def test_hooks_run_and_a_forward_of_others_stays() -> None:
    model = tiny_model("llama")
    norm, calls = model.model.norm, []
    norm.register_forward_hook(lambda *_: calls.append("hook"))
    other = model.model.layers[0].input_layernorm
    own = type(other).forward
    other.forward = MethodType(lambda self, states: calls.append("other") or own(self, states), other)
    assert other not in [module for module, _ in pieces_of(model).forwards]
    logps_of(model, shared_batch())
    assert calls.count("hook") >= 1
    assert calls.count("other") >= 1


# --- norms ------------------------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    """x / RMS(x) * weight; the table below varies it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.eps = 1e-5

    def of(self, x: Tensor) -> Tensor:
        return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.of(x).to(x.dtype)


def _variant(change: Callable[[Any, Tensor], Tensor], **attributes: Any) -> _Norm:
    norm = type("Variant", (_Norm,), {"forward": change})()
    vars(norm).update(attributes)
    return norm


NORMS: dict[str, tuple[nn.Module, norms.Kind | None]] = {
    "weight": (_Norm(), norms.Kind(1e-5, 0.0, False)),
    "in the dtype of the input": (
        _variant(lambda s, x: (s.weight * s.of(x)).to(x.dtype)), norms.Kind(1e-5, 0.0, True),
    ),
    "added to one": (_variant(lambda s, x: (s.of(x) * (1 + s.weight.float())).type_as(x)), norms.Kind(1e-5, 1.0, True)),
    "epsilon by another name": (
        _variant(lambda s, x: s.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, True) + s.tiny)), tiny=1e-4, eps=3),
        norms.Kind(1e-4, 0.0, False),
    ),
    "of torch": (nn.RMSNorm(6, eps=1e-6), None),
    "subtracts the mean": (_variant(lambda s, x: s.weight * s.of(x - x.mean(-1, keepdim=True))), None),
    "adds something": (_variant(lambda s, x: s.weight * s.of(x) + 0.01), None),
    "weight squared": (_variant(lambda s, x: s.weight.square() * s.of(x)), None),
    "epsilon outside of the root": (
        _variant(lambda s, x: s.weight * x / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + s.eps)), None,
    ),
    "over all tokens": (_variant(lambda s, x: s.weight * x * torch.rsqrt(x.pow(2).mean() + s.eps)), None),
    "no epsilon": (_variant(lambda s, x: s.weight * s.of(x), eps=0.0), None),
    "fails": (_variant(lambda s, x: s.missing), None),
    "layer norm": (nn.LayerNorm(6), None),
    "layer norm without bias": (nn.LayerNorm(6, bias=False), None),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_known_by_what_it_computes(name: str) -> None:
    module, expected = NORMS[name]
    assert norms.kind_of(module) == expected


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("function", ["passes", "kernel"])
def test_norms_and_their_gradients(function: str, dtypes: tuple[torch.dtype, torch.dtype], offset: float) -> None:
    """Against fp64, on rows of unlike sizes: fp32 to 1e-6, bf16 to a rounding of the result."""
    draw = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    states = (torch.randn(3, 4, 10, generator=draw) * scales).to(dtypes[0]).requires_grad_()
    weight = torch.randn(10, generator=draw).to(dtypes[1]).requires_grad_()
    kind = norms.Kind(1e-6, offset, False)
    upstream = torch.randn(3, 4, 10, generator=draw)
    found = norms.rms_norm(states, weight, kind) if function == "passes" else norms._by_one_kernel(states, weight, kind)
    ours = torch.autograd.grad((found.float() * upstream).sum(), (states, weight))
    wide, wide_weight = states.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (offset + wide_weight)
    expected = torch.autograd.grad((exact * upstream).sum(), (wide, wide_weight))
    if function == "passes":
        assert found.dtype == torch.promote_types(*dtypes)
    for value, other, dtype in zip((found, *ours), (exact, *expected), (found.dtype, *dtypes), strict=True):
        tolerance = 1e-6 if dtypes == (torch.float32,) * 2 else 2e-2 if dtypes[1] == torch.bfloat16 else 1e-2
        assert value.dtype == dtype or function == "kernel"
        size = other.abs().amax(-1, keepdim=True) + 1e-12
        torch.testing.assert_close(value.double() / size, other / size, rtol=0, atol=tolerance)


def test_a_norm_leaves_to_the_module_what_it_does_not_know() -> None:
    norm = _Norm()
    kind = norms.kind_of(norm)
    assert kind is not None
    forward = norms.fused_forward(norm, kind)
    states = torch.randn(2, 6, dtype=torch.float64)
    assert torch.equal(forward(states), norm(states))  # fp64
    with pytest.raises(TypeError):
        forward(states, None)  # as the module's own does


# --- rotations --------------------------------------------------------------------------------------------------------


def _rotation(turn: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(finish(x * cos + turn(x) * sin) for x in (q, k))

    return apply_rotary_pos_emb


def _interleaved(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _partial(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos[..., :4].unsqueeze(unsqueeze_dim), sin[..., :4].unsqueeze(unsqueeze_dim)
    turned = [x[..., :4] * cos + llama.rotate_half(x[..., :4]) * sin for x in (q, k)]
    return tuple(torch.cat([t, x[..., 4:]], -1) for t, x in zip(turned, (q, k), strict=True))


def _positional(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Any:
    return q, k


ROTATIONS: dict[str, tuple[Callable[..., Any], rotary.Kind | None]] = {
    "llama": (llama.apply_rotary_pos_emb, rotary.Kind(keeps_dtype=False)),
    "in the dtype of the queries": (
        lambda q, k, cos, sin, unsqueeze_dim=1: tuple(
            x.to(q.dtype) for x in llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        ),
        rotary.Kind(keeps_dtype=True),
    ),
    "interleaved": (_rotation(_interleaved), None),
    "the other way round": (_rotation(lambda x: -llama.rotate_half(x)), None),
    "scaled": (_rotation(llama.rotate_half, lambda x: x * 1.1), None),
    "partial": (_partial, None),
    "other arguments": (_positional, None),
    "fails": (_rotation(lambda x: x[..., :3]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_is_known_by_what_it_computes(name: str) -> None:
    function, expected = ROTATIONS[name]
    assert rotary.kind_of(function) == expected


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
def test_rotations_and_their_gradients(dtypes: tuple[torch.dtype, torch.dtype], head_dim: int) -> None:
    """Against the model's own code in fp64, with unlike halves of the cosines."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 5, 8), (2, 2, 5, 8)] if head_dim == 1 else [(2, 5, 4, 8), (2, 5, 2, 8)]
    states = [torch.randn(shape, generator=draw).to(dtypes[0]).requires_grad_() for shape in shapes]
    cos, sin = (torch.randn(2, 5, 8, generator=draw).to(dtypes[1]) for _ in range(2))
    query, key = states
    found = rotary.rotated(query, key, cos, sin, head_dim=head_dim, kind=rotary.Kind(keeps_dtype=False))
    assert {x.dtype for x in found} == {torch.promote_types(*dtypes)}
    wide = [x.detach().double().requires_grad_() for x in states]
    exact: Any = llama.apply_rotary_pos_emb(wide[0], wide[1], cos.double(), sin.double(), unsqueeze_dim=head_dim)
    upstream = [torch.randn(shape, generator=draw) for shape in shapes]
    ours = torch.autograd.grad([x.float() for x in found], states, upstream)
    expected = torch.autograd.grad(exact, wide, [x.double() for x in upstream])
    tolerance = 1e-6 if dtypes == (torch.float32,) * 2 else 2e-2
    for value, other in zip((*found, *ours), (*exact, *expected), strict=True):
        torch.testing.assert_close(value.double(), other, rtol=tolerance, atol=tolerance)


def test_a_rotation_rounds_once() -> None:
    """On an accelerator under autocast the result leaves in bf16: that of fp32, rounded."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 4, 5, 8, generator=draw).bfloat16()
    cos, sin = (torch.randn(2, 1, 5, 8, generator=draw) for _ in range(2))
    wide, narrow = (rotary._Rotation.apply(states, cos, sin, dtype) for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0)


def test_a_rotation_leaves_to_the_model_what_it_does_not_know() -> None:
    """Cosines narrower than the heads: a partial rotation, which the function may do by itself."""
    calls: list[dict[str, Any]] = []

    def own(*tensors: Tensor, **options: Any) -> str:
        calls.append(options)
        return "own"

    fused = rotary.fused_function(own, rotary.Kind(keeps_dtype=False))
    states, narrow, cosines = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4), torch.randn(1, 3, 8)
    assert fused(states, states, narrow, narrow) == "own"
    assert fused(states, states, cosines, cosines, position_ids=None) == "own"
    assert calls == [{"unsqueeze_dim": 1}, {"unsqueeze_dim": 1, "position_ids": None}]
