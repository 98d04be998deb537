"""Private names of peft: the flags that say which adapters a layer computes with, and the check that they do.

peft's own `disable_adapter()` and `set_adapter()` change `requires_grad` of every factor, also of those that a user had
frozen, and search the whole model on each call. Both end in setting two private flags, which is all that is needed
here. But if a release renamed a flag, setting the old one would have no effect, and the reference would silently be the
policy. So there are two checks. After every switch, peft's public properties must say of each layer what it computes
with. Once per process, a small layer made for it must give the right numbers. Given up: adapters of other libraries.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from holdfast.internals.moved import MovedError
from holdfast.internals.torch import is_bare, is_wrapper, modules_of

_FLAGS = ("_disable_adapters", "_active_adapter")


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of `model` that have adapters, by path. Modules that an adapter saves whole are among them."""
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def adapters_of(layer: Any) -> set[str]:
    """The names of the adapters that have tensors in a layer."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        by_adapter: list[Any] = [getattr(layer, "modules_to_save", None)]
    else:
        by_adapter = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return {name for tensors in by_adapter if isinstance(tensors, nn.ModuleDict | nn.ParameterDict) for name in tensors}


@contextlib.contextmanager
def switched(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Inside, the layers of `model` compute with `adapter` alone, or with no adapter where it is None.

    On leaving they compute as before. No `requires_grad` changes. MovedError where peft does not switch as expected.
    ValueError where an adapter is merged into the weights: peft would unmerge it in the next forward pass, or compute
    with it and the other adapter together.
    """
    layers = adapter_layers(model)
    check_unmerged(layers)
    check_switching()
    with switched_layers(layers, adapter):
        yield


def check_unmerged(layers: dict[str, Any]) -> None:
    """ValueError where a layer has adapters merged into its weight."""
    merged = {path: list(layer.merged_adapters) for path, layer in layers.items() if layer.merged_adapters}
    if merged:
        path, names = next(iter(merged.items()))
        raise ValueError(
            f"The model was to compute with other adapters than it does, but {names} are merged into `{path}` (and "
            f"{len(merged) - 1} more layers), so it would lose them. Call `model.unmerge_adapter()` first, or "
            "`model.merge_and_unload()` and train a fresh adapter."
        )


@contextlib.contextmanager
def switched_layers(layers: dict[str, Any], adapter: str | None) -> Iterator[None]:
    """`switched`, for these layers only."""
    before = {path: _state(path, layer) for path, layer in layers.items()}
    is_off, active = (True, None) if adapter is None else (False, [adapter])
    try:
        for path, layer in layers.items():
            _set(layer, is_off, before[path][1] if adapter is None else active)
        for path, layer in layers.items():
            _check_state(path, layer, is_off, active)
        yield
    finally:
        for path, layer in layers.items():
            was_off, previous = before[path]
            _set(layer, was_off, previous)
    for path, layer in layers.items():
        was_off, previous = before[path]
        _check_state(path, layer, was_off, previous)


def _state(path: str, layer: Any) -> tuple[bool, Any]:
    """The layer's two flags: whether its adapters are off, and which are active. Its properties must say the same."""
    missing = [flag for flag in _FLAGS if flag not in vars(layer) and not hasattr(type(layer), flag)]
    if missing:
        raise MovedError("peft", f"{type(layer).__name__}.{missing[0]}", f"`{path}` has no such attribute")
    is_off, active = (getattr(layer, flag) for flag in _FLAGS)
    _check_state(path, layer, is_off, active)
    return is_off, active


def _set(layer: Any, is_off: bool, active: Any) -> None:
    for flag, value in zip(_FLAGS, (is_off, active), strict=True):
        try:
            setattr(layer, flag, value)
        except AttributeError as error:
            raise MovedError("peft", f"{type(layer).__name__}.{flag}", str(error)) from None


def _check_state(path: str, layer: Any, is_off: bool, active: Any) -> None:
    """MovedError where the layer's properties do not say what was set. None for `active` means any."""
    kind = type(layer).__name__
    if layer.disable_adapters is not is_off:
        said = f"`{path}` says disable_adapters={layer.disable_adapters} after it was set to {is_off}"
        raise MovedError("peft", f"{kind}._disable_adapters", said)
    names = [active] if isinstance(active, str) else active
    if names is not None and list(layer.active_adapters) != list(names):
        said = f"`{path}` says active_adapters={layer.active_adapters} after they were set to {names}"
        raise MovedError("peft", f"{kind}._active_adapter", said)


def untargeted_layers(policy: PeftModel) -> list[str]:
    """The paths of adapter layers that no adapter of `policy` targets: the model had them before peft wrapped it."""
    tuner = policy.base_model
    if not isinstance(tuner, BaseTuner):  # prompts have no layers
        return []
    parameters = (name.rpartition(".")[0] for name in tuner.targeted_parameter_names)
    targets = {f"base_model.model.{name}" for name in (*tuner.targeted_module_names, *parameters)}
    layers = adapter_layers(policy)
    return [
        path
        for path, layer in layers.items()
        if isinstance(layer, BaseTunerLayer) and path not in targets and not _ancestors(path) & layers.keys()
    ]


def _ancestors(path: str) -> set[str]:
    names = path.split(".")
    return {".".join(names[:length]) for length in range(1, len(names))}


def activate(policy: PeftModel, adapter: str) -> None:
    """Makes `adapter` the one that `policy` computes with and trains. MovedError where peft does not make it so."""
    policy.set_adapter(adapter)
    for path, layer in adapter_layers(policy).items():
        if adapter in adapters_of(layer) and list(layer.active_adapters) != [adapter]:
            said = f"`{path}` says active_adapters={layer.active_adapters} after {adapter!r} was set"
            raise MovedError("peft", "PeftModel.set_adapter", said)


# --- plain LoRA -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLora:
    """The tensors of a layer that computes y = x W^T + b + scaling * (x A^T) B^T."""

    weight: Tensor
    """W, [out in]."""
    bias: Tensor | None
    down: Tensor
    """A, [r in]."""
    up: Tensor
    """B, [out r]."""
    scaling: float


def lora_linears(model: nn.Module) -> list[Any]:
    """The LoRA layers of `model` around linear maps that run peft's own forward; none where FSDP shards it."""
    modules = modules_of(model)
    layers = [module for module in modules if type(module) is LoraLinear and "forward" not in vars(module)]
    is_sharded = layers and any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in modules)
    return [] if is_sharded else layers


def plain_lora(layer: Any) -> PlainLora | None:
    """What the layer computes with at this moment, if it is plain LoRA; else None.

    None with adapters off or merged, with none or several active ones, under dropout, with a bias of the factors' own,
    for a variant such as DoRA, and where something must run besides the products: hooks of a layer within it, another
    forward, a quantised or sharded weight. Of the map under the adapter only `nn.Linear` is known.
    """
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant or not layer.cast_input_dtype_enabled:
        return None
    down, up, dropout = (table[names[0]] for table in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    maps = (layer.base_layer, down, up)
    if any(type(each) is not nn.Linear or not is_bare(each) for each in maps):
        return None
    if type(dropout) not in (nn.Identity, nn.Dropout) or (dropout.training and getattr(dropout, "p", 0.0) > 0):
        return None  # dropout of probability 0 drops nothing, so training and evaluating are one
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    if up.bias is not None or down.bias is not None or not is_bare(dropout):
        return None
    if any(is_wrapper(tensor) for tensor in (weight, bias, down.weight, up.weight) if tensor is not None):
        return None
    shapes = (*weight.shape, *down.weight.shape, *up.weight.shape)
    if len(shapes) != 6 or (shapes[1], shapes[2], shapes[0]) != (shapes[3], shapes[5], shapes[4]):
        return None  # a part of a weight, as ZeRO leaves it
    return PlainLora(weight=weight, bias=bias, down=down.weight, up=up.weight, scaling=layer.scaling[names[0]])


# --- checked in numbers -----------------------------------------------------------------------------------------------


class _Tiny(nn.Module):
    """Two linear maps. An adapter has LoRA factors for the first, and a whole copy of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@functools.cache
def check_switching() -> None:
    """MovedError where a small model gives the wrong numbers with its adapters off, or with one of two adapters on.

    Checked once per process: the result is cached.
    """
    try:
        _check_tiny()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        said = f"a layer made to try it failed with {type(error).__name__}: {error}"
        raise MovedError("peft", "LoraLayer", said) from error


def _check_tiny() -> None:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        tiny = _Tiny().float()
        config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"], init_lora_weights=False)
        model: Any = get_peft_model(tiny, config, adapter_name="first")  # type: ignore[arg-type]
        model.add_adapter("second", config)
        for number, parameter in enumerate(model.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
            parameter.copy_(torch.cos(ramp + number))
        model.eval()
        _check_numbers(model, torch.tensor([[1.0, -2.0, 0.5]]))


def _check_numbers(model: Any, x: Tensor) -> None:
    """Compares the tiny model's output in each state with the output computed by hand from its weights."""
    layers = adapter_layers(model)
    for path, layer in layers.items():
        _state(path, layer)
    body, head = model.base_model.model.body, model.base_model.model.head
    before = model(x)
    base = x @ body.base_layer.weight.T @ head.original_module.weight.T
    by_hand: dict[str | None, Tensor] = {None: base}
    for name in ("first", "second"):
        product = body.scaling[name] * body.lora_B[name].weight @ body.lora_A[name].weight
        by_hand[name] = x @ (body.base_layer.weight + product).T @ head.modules_to_save[name].weight.T
    gaps = {}
    for adapter, expected in by_hand.items():
        with switched_layers(layers, adapter):
            gaps[adapter] = float((model(x) - expected).abs().max())
    gaps["before"] = float((before - by_hand["first"]).abs().max())
    gaps["after"] = float((model(x) - before).abs().max())
    for state, gap in gaps.items():
        if not gap < 1e-4:
            which = "without adapters" if state is None else state
            raise MovedError("peft", "LoraLayer.forward", f"{which} a layer's output is wrong by {gap:.3g}")
    if float((before - base).abs().max()) < 1e-2:
        raise MovedError("peft", "LoraLayer.forward", "a layer gives the base's output with its adapter on")
