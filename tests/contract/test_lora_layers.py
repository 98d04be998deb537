"""LoRA layers computed with fewer operations: which are, and that the numbers and gradients are those of peft's own.

peft's own forward is what `score` runs where no layer is found. In half precision both are compared with the
same layer in fp64.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import holdfast.scoring.fused.lora as fused
from families import tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.internals.peft import lora_linears, plain_lora, switched
from holdfast.policy.prepare import disable_dropout
from holdfast.scoring.attention import attending
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.fused.body import Pieces, replaced
from recomputation import recompute
from shared_rows import ROWS, gradients, logps_of, padded_batch, shared_batch

ATTENTION = ["q_proj", "v_proj"]


def adapted(family: str = "llama", *, seed: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A LoRA of which no factor is zero."""
    options = {"r": 4, "target_modules": ATTENTION, "init_lora_weights": False} | options
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base: Any = tiny_model(family)
        return get_peft_model(base.to(dtype), LoraConfig(**options)).eval()


def _two(active: list[str]) -> PeftModel:
    model: Any = adapted()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=2, target_modules=[*ATTENTION, "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(active)
    return model.eval()


def _with_hook(of: str) -> PeftModel:
    model = adapted()
    for layer in lora_linears(model):
        parts = {"A": layer.lora_A.default, "B": layer.lora_B.default, "the map": layer.base_layer}
        parts[of].register_forward_hook(lambda module, given, output: 2 * output)
    return model


def _with_own_forward() -> PeftModel:
    model = adapted()
    for layer in lora_linears(model):
        layer.forward = lambda x, own=layer.forward: 2 * own(x)
    return model


def _training_base() -> PeftModel:
    model = adapted("qwen2")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _frozen(name: str) -> PeftModel:
    model = adapted()
    for path, parameter in model.named_parameters():
        if name in path:
            parameter.requires_grad_(False)
    return model


def _scaled() -> PeftModel:
    model = adapted()
    for layer in lora_linears(model):
        layer.set_scale("default", 0.3)
    return model


@dataclass(frozen=True)
class Kind:
    make: Callable[[], PeftModel]
    num_replaced: int = 4
    """Layers that are computed with fewer operations; by default q and v of two layers."""


KINDS = {
    "plain": Kind(adapted),
    "all_linear": Kind(lambda: adapted(target_modules="all-linear"), 14),
    "biases_of_the_maps": Kind(lambda: adapted("qwen2", target_modules="all-linear"), 14),
    "rslora": Kind(lambda: adapted(use_rslora=True)),
    "scaled": Kind(_scaled),
    "scaling_of_one": Kind(lambda: adapted(lora_alpha=4)),
    "bias_lora_only": Kind(lambda: adapted("qwen2", bias="lora_only")),
    "bias_all": Kind(lambda: adapted("qwen2", bias="all")),
    "rank_and_alpha_patterns": Kind(lambda: adapted(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})),
    "one_layer": Kind(lambda: adapted(layers_to_transform=[1]), 2),
    "modules_to_save": Kind(lambda: adapted(modules_to_save=["lm_head"])),
    "trainable_tokens": Kind(lambda: adapted("llama_tied", trainable_token_indices=[5, 6])),
    "embeddings": Kind(lambda: adapted(target_modules=["q_proj", "embed_tokens"]), 2),
    "layer_replication": Kind(lambda: adapted(layer_replication=[(0, 2), (1, 2)]), 6),
    "pissa": Kind(lambda: adapted(init_lora_weights="pissa")),
    "olora": Kind(lambda: adapted(init_lora_weights="olora")),
    "orthogonal": Kind(lambda: adapted(init_lora_weights="orthogonal")),
    "gaussian": Kind(lambda: adapted(init_lora_weights="gaussian")),
    "experts": Kind(lambda: adapted("mixtral")),
    "training_base": Kind(_training_base),
    "frozen_A": Kind(lambda: _frozen("lora_A")),
    "frozen_B": Kind(lambda: _frozen("lora_B")),
    "one_of_two": Kind(lambda: _two(["default"])),
    "the_other_of_two": Kind(lambda: _two(["second"]), 6),
    "dropout_off": Kind(lambda: adapted(lora_dropout=0.5)),
    "two_at_once": Kind(lambda: _two(["default", "second"]), 2),
    "dora": Kind(lambda: adapted(use_dora=True), 0),
    "lora_bias": Kind(lambda: adapted("qwen2", lora_bias=True), 0),
    "conv1d": Kind(lambda: adapted("gpt2", target_modules=["c_attn"], fan_in_fan_out=True), 0),
    "hook_on_A": Kind(lambda: _with_hook("A"), 0),
    "hook_on_B": Kind(lambda: _with_hook("B"), 0),
    "hook_on_the_map": Kind(lambda: _with_hook("the map"), 0),
    "own_forward": Kind(_with_own_forward, 0),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each layer that is computed with fewer operations."""
    found: list[int] = []
    plain = fused._output
    monkeypatch.setattr(fused, "_output", lambda *given: found.append(1) or plain(*given))
    return found


def installed(layer: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, the layer is computed with fewer operations."""
    return replaced(Pieces(forwards=tuple(fused.fused_forwards(layer))))


@contextlib.contextmanager
def by_peft() -> Iterator[None]:
    """Inside, peft's own forward runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "lora_linears", lambda model: [])
        yield


def loss_of(model: nn.Module, batch: PairBatch) -> Tensor:
    logps = logps_of(model, batch).per_token
    return logps.float() @ torch.randn(len(logps), generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    gap = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    assert gap < 3e-6, (what, gap)


@pytest.mark.parametrize("name", KINDS)
def test_log_probs_and_gradients_are_those_of_peft(name: str, calls: list[int]) -> None:
    kind, batch = KINDS[name], shared_batch()
    model = kind.make()
    with by_peft():
        expected_logps = logps_of(model, batch).per_token.detach()
        expected = gradients(loss_of(model, batch), model)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(logps_of(model, batch).per_token, expected_logps, rtol=1e-6, atol=1e-5)
    assert len(calls) == kind.num_replaced
    found = gradients(loss_of(model, batch), model)
    assert found.keys() == expected.keys()
    assert any("lora" in parameter for parameter in found)
    for parameter, gradient in expected.items():
        assert_close(found[parameter], gradient, parameter)


def test_every_plain_layer_is_replaced_once_a_pass(calls: list[int]) -> None:
    model = adapted(target_modules="all-linear")
    logps_of(model, shared_batch())
    assert len(calls) == len(lora_linears(model)) == 14


# --- one layer --------------------------------------------------------------------------------------------------------

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, torch.float32, None),
    "fp64": (torch.float64, torch.float64, None),
    "bf16_autocast": (torch.float32, torch.float32, torch.bfloat16),
    "fp16_autocast": (torch.float32, torch.float32, torch.float16),
    "bf16_weights_fp32_factors": (torch.bfloat16, torch.float32, None),
    "bf16_weights": (torch.bfloat16, torch.bfloat16, None),
    "bf16_weights_fp32_factors_autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
}
"""By name: the dtypes of the weight and of the factors, and that of autocast."""


def _layer(dtype: torch.dtype, factor_dtype: torch.dtype, *, has_bias: bool) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        body = nn.Sequential(nn.Linear(48, 64, bias=has_bias)).to(dtype)
        model: Any = get_peft_model(body, LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights=False))  # pyright: ignore[reportArgumentType]
    (layer,) = lora_linears(model)
    for factor in (layer.lora_A, layer.lora_B):
        factor.to(factor_dtype)
    return layer


def _numbers(layer: Any, x: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """The output and the gradients for the input, the factors and the bias."""
    x = x.clone().requires_grad_(True)
    layer.base_layer.weight.requires_grad_(False)
    layer.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = layer(x)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(direction.to(output.dtype))
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), "x": x.grad} | grads


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("precision", "x_dtype"),
    [(name, dtypes[2] or dtypes[0]) for name, dtypes in PRECISIONS.items()]
    + [(name, torch.float32) for name, dtypes in PRECISIONS.items() if dtypes[2]],
)
def test_a_layer_is_as_near_to_fp64_as_peft(
    precision: str, x_dtype: torch.dtype, has_bias: bool, calls: list[int]
) -> None:
    """By the root mean square of the error of the output, and of each gradient."""
    dtype, factor_dtype, autocast = PRECISIONS[precision]
    layer = _layer(dtype, factor_dtype, has_bias=has_bias)
    x = torch.randn(3, 50, 48, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(x_dtype)
    by_peft_itself = _numbers(layer, x, autocast)
    with installed(layer):
        found = _numbers(layer, x, autocast)
    assert len(calls) == 1
    exact = _numbers(layer.to(torch.float64), x.double(), None)
    assert found.keys() == by_peft_itself.keys() == exact.keys()
    for name, value in found.items():
        theirs = by_peft_itself[name]
        assert (value.dtype, value.shape) == (theirs.dtype, theirs.shape)
        errors = [float((each.double() - exact[name]).pow(2).mean().sqrt()) for each in (value, theirs)]
        size = float(exact[name].pow(2).mean().sqrt())
        assert errors[0] <= 1.02 * errors[1] + 1e-7 * size, (name, errors, size)
        if dtype.itemsize >= 4 and autocast is None:
            assert errors[0] <= 1e-6 * size


@pytest.mark.parametrize("shape", [(7, 48), (1, 1, 48), (2, 3, 4, 48), (0, 48), (2, 0, 48)])
def test_inputs_of_any_shape(shape: tuple[int, ...], calls: list[int]) -> None:
    layer, x = _layer(torch.float32, torch.float32, has_bias=True), torch.randn(shape)
    expected = _numbers(layer, x, None)
    with installed(layer):
        found = _numbers(layer, x, None)
    assert len(calls) == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_an_input_without_contiguous_rows() -> None:
    layer, x = _layer(torch.float32, torch.float32, has_bias=False), torch.randn(48, 5, 3).permute(2, 1, 0)
    expected = _numbers(layer, x, None)
    with installed(layer):
        found = _numbers(layer, x, None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_what_is_handed_on_besides_the_input_is_peft_s_affair(calls: list[int]) -> None:
    layer, x = _layer(torch.float32, torch.float32, has_bias=False), torch.randn(2, 3, 48)
    expected = layer(x, adapter_names=["__base__", "default"])
    with installed(layer):
        assert torch.equal(layer(x, adapter_names=["__base__", "default"]), expected)
    assert not calls


def test_inputs_of_a_wrong_dtype_are_refused_by_peft_s_own_forward() -> None:
    layer = _layer(torch.bfloat16, torch.float32, has_bias=False)
    with installed(layer), pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 48))


@torch.no_grad()
def test_merged_layers_are_peft_s_affair(calls: list[int]) -> None:
    model = adapted()
    model.merge_adapter()
    with by_peft():
        expected = logps_of(model, shared_batch()).per_token
    assert torch.equal(logps_of(model, shared_batch()).per_token, expected)
    assert not calls


def test_dropout_in_training_is_peft_s_affair(calls: list[int]) -> None:
    model = adapted(lora_dropout=0.5)
    logps_of(model.train(), shared_batch())
    assert not calls
    logps_of(model.eval(), shared_batch())
    assert calls


# --- equal models give equal log-probs --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
@pytest.mark.parametrize("kind", [*KINDS, "dropout_of_zero"])
def test_log_probs_are_those_of_every_mode(kind: str, precision: str) -> None:
    """A policy trains, with gradients; the same model as a reference evaluates, without. Both compute alike, to the
    bit, also where dropout was set to zero."""
    model = adapted(lora_dropout=0.5) if kind == "dropout_of_zero" else KINDS[kind].make()
    disable_dropout(model)
    found = []
    with _precision(precision):
        for is_training, has_gradients in itertools.product((False, True), repeat=2):
            with torch.set_grad_enabled(has_gradients):
                found.append(logps_of(model.train(is_training), shared_batch()).per_token.detach())
    assert all(torch.equal(logps, found[0]) for logps in found)


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    autocast = PRECISIONS[name][2]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        yield


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp64"])
def test_a_fresh_lora_gives_bitwise_what_the_bare_base_gives(family: str, precision: str, calls: list[int]) -> None:
    dtype, factor_dtype, _ = PRECISIONS[precision]
    model = adapted(family, dtype=dtype, target_modules="all-linear", init_lora_weights=True)
    for layer in lora_linears(model):
        layer.lora_A.to(factor_dtype)
        layer.lora_B.to(factor_dtype)
    base: Any = tiny_model(family)
    base.to(dtype)
    for batch in (shared_batch(), PairBatch.from_tensors(PackedLayout(0, row_tokens=40)(ROWS))):
        with _precision(precision):
            found = logps_of(model, batch).per_token
            assert calls
            with torch.no_grad(), switched(model, None):
                calls.clear()
                assert torch.equal(logps_of(model, batch).per_token, found)
                assert not calls
            with torch.no_grad():
                assert torch.equal(logps_of(base, batch).per_token, found)
                assert torch.equal(logps_of(model, batch).per_token, found)


# --- for the length of a forward pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
def test_recomputed_layers_are_computed_the_same_way(precision: str, use_reentrant: bool, calls: list[int]) -> None:
    model = adapted(target_modules="all-linear").train()
    model.enable_input_require_grads()
    with _precision(precision):
        expected = gradients(loss_of(model, shared_batch()), model)
    num_calls = len(calls)
    recompute(unwrap(model), use_reentrant)
    with _precision(precision):
        loss = loss_of(model, shared_batch())
    found = gradients(loss, model)
    assert len(calls) == 3 * num_calls == 3 * 14
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_adapters_switched_between_the_passes() -> None:
    """As a reference does, before the layers are computed again."""
    model = adapted(target_modules="all-linear").train()
    expected = gradients(loss_of(model, shared_batch()), model)
    recompute(unwrap(model), False)
    loss = loss_of(model, shared_batch())
    with torch.no_grad(), switched(model, None):
        logps_of(model, shared_batch())
    found = gradients(loss, model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("fails", [False, True])
def test_the_layers_are_as_they_were_afterwards(fails: bool) -> None:
    model, batch = adapted(target_modules="all-linear"), shared_batch()
    layers = lora_linears(model)
    with contextlib.suppress(ArithmeticError), attending(unwrap(model), batch.inputs):
        assert all("forward" in vars(layer) for layer in layers)
        if fails:
            raise ArithmeticError
    assert layers == lora_linears(model)
    assert not any("forward" in vars(layer) for layer in layers)


def test_hooks_on_a_layer_run(calls: list[int]) -> None:
    model = adapted()
    with by_peft():
        plain = logps_of(model, shared_batch()).per_token
    for layer in lora_linears(model):
        layer.register_forward_hook(lambda module, given, output: 2 * output)
    with by_peft():
        expected = logps_of(model, shared_batch()).per_token
    assert not torch.allclose(plain, expected)
    torch.testing.assert_close(logps_of(model, shared_batch()).per_token, expected, rtol=1e-6, atol=1e-5)
    assert calls


def test_a_hook_on_every_module_sees_the_factors(calls: list[int]) -> None:
    model, seen = adapted(), set[str]()
    names = {module: name for name, module in model.named_modules()}
    hook = register_module_forward_hook(lambda module, given, output: seen.add(names.get(module, "")))
    try:
        logps_of(model, shared_batch())
    finally:
        hook.remove()
    assert any(name.endswith("lora_A.default") for name in seen)
    assert not calls


def test_padded_rows_run_peft_s_own_code(calls: list[int]) -> None:
    logps_of(adapted(), padded_batch())
    assert not calls


def test_factors_are_cast_together_and_an_input_that_layers_share_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, casts, inputs = adapted(target_modules="all-linear"), list[int](), list[Tensor]()
    cast, output_of = fused.cast_at_once, fused._output
    monkeypatch.setattr(
        fused, "cast_at_once", lambda tensors, dtype: casts.append(len(tensors)) or cast(tensors, dtype)
    )
    monkeypatch.setattr(fused, "_output", lambda operands: inputs.append(operands.x) or output_of(operands))
    with torch.autocast("cpu", torch.bfloat16):
        logps_of(model, shared_batch())
    assert casts == [28]
    query, key, value, output, gate, up, down = inputs[:7]
    assert query is key is value is not output
    assert gate is up is not down


def test_what_a_layer_computes_with() -> None:
    layer = _layer(torch.float32, torch.float32, has_bias=True)
    lora = plain_lora(layer)
    assert lora is not None
    assert lora.bias is not None
    x = torch.randn(4, 48)
    by_hand = x @ lora.weight.T + lora.bias + lora.scaling * (x @ lora.down.T @ lora.up.T)
    torch.testing.assert_close(by_hand, layer(x))
    assert lora.scaling == 12 / 8
