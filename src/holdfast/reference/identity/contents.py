"""What a module computes with: its tensors and settings, under the names of the bare model.

A log-prob does not depend on which wrapper a weight is in. So a PEFT model is read as the bare model that computes the
same: names leave out the wrappers. Adapters that are off, inactive or add nothing are left out. Where an adapter has a
copy of a whole module (`modules_to_save`), the copy in use is read in place of the original.

A value is left out only if it is known to change no number. So every parameter and buffer is taken in, and every plain
number, text and truth value among a module's attributes. Code that is not a library's counts too (see `identity.code`).
Given up: settings inside attributes that are neither plain values nor modules.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from holdfast.internals.deepspeed import ENGINE_ATTRIBUTES, PARTITIONING_ATTRIBUTES
from holdfast.internals.peft import switched_layers
from holdfast.internals.torch import class_of, own_state, recomputed
from holdfast.policy.adapters import lora_adds_nothing
from holdfast.policy.rotations import has_moving_rotations
from holdfast.policy.sharding import gathered, whole
from holdfast.reference.identity.code import code_of, names_of_functions

Scalar = str | int | float | bool | torch.dtype | Enum

_ATTRIBUTES_WITHOUT_EFFECT = {
    "training", "inplace", "sparse", "scale_grad_by_freq", "padding_idx", "layer_idx", "vocab_size", "name_or_path",
    "in_features", "out_features", "num_embeddings", "embedding_dim", "fan_in_fan_out", "max_position_embeddings",
    "cast_input_dtype_enabled", "router_jitter_noise", "jitter_noise", "input_jitter_noise", "is_training",
    "is_target_conv_1d_layer", "ephemeral_gpu_offload", "router_aux_loss_coef", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
"""Attributes of modules that change no log-prob in eval mode, or that the shapes of tensors say already."""

_ROTARY_SETTINGS = {"max_seq_len_cached", "original_max_seq_len", "rope_init_fn"}
_ROTARY_FREQUENCIES = ("original_inv_freq", "long_inv_freq")
"""Attributes and buffers of rotary embeddings that are read only where frequencies change from batch to batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleContents:
    """Tensors and settings by name of one module without its children, and its config where it has one. `path` is the
    module's path in the bare model."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    config: PretrainedConfig | None = None


def module_contents(module: nn.Module, path: str = "") -> Iterator[ModuleContents]:
    """The contents of `module` and of all modules in it, as they compute now, in the order of the children. Collective
    where its weights are spread over processes."""
    module = recomputed(module)
    if isinstance(module, PeftModel):
        yield from _virtual_tokens(module, path)
        yield from module_contents(module.get_base_model(), path)
    elif isinstance(module, BaseTunerLayer):
        yield from _adapted(module, path)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _copy_in_use(module, path)
    elif "Dropout" not in type(module).__name__:  # a reference is in eval mode, so dropout does nothing
        yield _own_contents(module, path)
        for name, child in module.named_children():
            yield from module_contents(child, f"{path}.{name}" if path else name)


def _own_contents(module: nn.Module, path: str) -> ModuleContents:
    """The contents of a module of the bare model, without its children."""
    tensors = {f"{path}.{name}": tensor for name, tensor in _tensors(module).items()}
    settings: dict[str, Any] = {"class": class_of(module).__qualname__} | _scalars(module) | code_of(module)
    if not has_moving_rotations(module):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_ROTARY_FREQUENCIES)}
        settings = {name: value for name, value in settings.items() if name not in _ROTARY_SETTINGS}
    config = vars(module).get("config")
    return ModuleContents(
        path=path,
        tensors=tensors,
        settings=settings,
        config=config if isinstance(config, PretrainedConfig) else None,
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters, buffers and other tensors. A layer that keeps integers (a quantised one) has scales
    and code books as well: without them, W and 2 W would have the same codes."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if not all(tensor.is_floating_point() for tensor in (*own.values(), *module.buffers(recurse=False))):
        own |= {name: tensor for name, tensor in own_state(module).items() if name not in own}
    plain = {name: value for name, value in vars(module).items() if isinstance(value, Tensor) and _counts(name)}
    return own | dict(module.named_buffers(recurse=False)) | plain


def _scalars(module: nn.Module) -> dict[str, Any]:
    """The module's plain settings. A whole model has flags about training, so only its floats are taken."""
    if isinstance(module, PreTrainedModel):
        return {name: value for name, value in vars(module).items() if _counts(name) and isinstance(value, float)}
    settings = {name: value for name, value in vars(module).items() if _counts(name) and _is_plain(value)}
    settings |= {name: function for name, function in names_of_functions(module) if _counts(name)}
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        del settings["norm_type"]
    return settings


def _counts(name: str) -> bool:
    """Whether an attribute of this name may change a log-prob."""
    is_about_training = "drop" in name or "checkpoint" in name
    is_of_engine = name in ENGINE_ATTRIBUTES | PARTITIONING_ATTRIBUTES
    return not (name.startswith("_") or is_about_training or is_of_engine or name in _ATTRIBUTES_WITHOUT_EFFECT)


def _is_plain(value: Any) -> bool:
    """Whether `value` is a scalar, or a nest of mappings and sequences of scalars."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(key, Scalar) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_plain, value))
    return isinstance(value, Scalar)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _virtual_tokens(policy: PeftModel, path: str) -> Iterator[ModuleContents]:
    """The contents of the active adapter's virtual tokens, where it learns a prompt."""
    name: Any = policy.active_adapter
    config = policy.peft_config.get(name) if isinstance(name, str) else None
    if config is None or not config.is_prompt_learning:
        return
    yield ModuleContents(path=f"{path}|prompt", settings=adapter_settings(config.to_dict()))
    if name in policy.prompt_encoder:
        yield from module_contents(policy.prompt_encoder[name], f"{path}|prompt")


def _adapted(layer: Any, path: str) -> Iterator[ModuleContents]:
    """The contents of a layer with adapters: those of its base layer, and of each active adapter that adds something.
    An adapter goes by its position among these, since its name changes no number."""
    names = [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)
    if isinstance(layer, TrainableTokensLayer):
        yield from _replaced_rows(layer, path, [name for name in names if name in layer.trainable_tokens_delta])
        return
    if isinstance(layer, LNTuningLayer):
        name = next((name for name in names if name in layer.ln_tuning_layers), None)
        yield from module_contents(layer.base_layer if name is None else layer.ln_tuning_layers[name], path)
        return
    yield from module_contents(layer.base_layer, path)
    if layer.disable_adapters and layer.merged:  # peft unmerges such a layer in its next forward pass
        yield ModuleContents(path=f"{path}|merged", settings={"merged": list(layer.merged_adapters)})
    for position, name in enumerate(name for name in names if not _layer_adds_nothing(layer, name)):
        yield from _adapter(layer, name, f"{path}|{position}")


def _layer_adds_nothing(layer: Any, name: str) -> bool:
    """Whether the adapter `name` of a tuner layer changes no number of the layer's outputs. False if in doubt.

    True where one of two plain LoRA factors is zero, where (IA)3 vectors are ones, where the weight that peft would add
    is zero, and where the layer has nothing of that adapter.
    """
    if isinstance(layer, IA3Layer):
        return name not in layer.ia3_l or bool((whole(layer.ia3_l[name]) == 1).all())
    if not isinstance(layer, LoraLayer) or isinstance(layer, AdaLoraLayer):
        values = [getattr(layer, attribute, None) for attribute in layer.adapter_layer_names]
        by_adapter: list[Any] = [value for value in values if hasattr(value, "keys")]
        is_absent = bool(by_adapter) and not any(name in value for value in by_adapter)
        return is_absent or _adds_zero(layer, name)
    return lora_adds_nothing(layer, name)


@torch.no_grad()
def _adds_zero(layer: Any, name: str) -> bool:
    """Whether the weight that peft would add is zero, and the layer's outputs are its base layer's to the bit."""
    base: Any = layer.get_base_layer()
    make: Any = getattr(layer, "get_delta_weight", None)
    is_linear = class_of(base) is nn.Linear
    if make is None or not (is_linear or class_of(base) is nn.Embedding) or base.weight.is_meta:
        return False
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        with gathered(layer), switched_layers({name: layer}, name):
            added = make(name)
            if not isinstance(added, Tensor) or bool(added.any()):
                return False
            inputs: Tensor = torch.arange(min(8, len(base.weight)), device=base.weight.device)  # token ids
            if is_linear:
                inputs = torch.cos(torch.arange(8.0 * base.in_features).reshape(8, -1)).to(base.weight)
            return bool(torch.equal(layer(inputs), base(inputs)))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # a kind of adapter that adds no weight
        return False
    finally:
        for module, is_training in modes:
            module.training = is_training


def _adapter(layer: Any, name: str, path: str) -> Iterator[ModuleContents]:
    """The contents of a tuner layer that belong to its adapter `name`."""
    module: nn.Module = layer
    variant = getattr(layer, "lora_variant", {}).get(name)
    settings: dict[str, Any] = {"class": class_of(layer).__qualname__}
    if isinstance(layer, LoraLayer) and variant is None and not layer.use_dora.get(name):
        settings["scaling"] = float(layer.scaling[name])
    else:
        settings |= {"variant": type(variant).__qualname__} | _settings_of(layer, name)
    yield ModuleContents(path=path, settings=settings, tensors={f"{path}.{k}": t for k, t in _tensors(module).items()})
    children: Any = module.named_children()
    for attribute, child in children:
        if attribute == "base_layer" or "drop" in attribute:
            continue
        if isinstance(child, nn.ModuleDict | nn.ParameterDict) or type(child).__name__ == "BufferDict":
            child = child[name] if name in child else None  # noqa: SIM401  # a ModuleDict has no `get`
        if isinstance(child, Tensor):
            yield ModuleContents(path=path, tensors={f"{path}.{attribute}": child})
        elif child is not None:
            yield from module_contents(child, f"{path}.{attribute}")


def _settings_of(layer: Any, name: str) -> dict[str, Any]:
    """All plain settings of a tuner layer. Where a setting is a mapping by adapter, only the entry of `name` counts."""
    adapters = set(layer.active_adapters) | {name}
    settings: dict[str, Any] = {}
    for attribute, value in vars(layer).items():
        own = value.get(name) if isinstance(value, Mapping) and adapters & set(value) else value
        if _counts(attribute) and _is_plain(own):
            settings[attribute] = own
    return settings


def _replaced_rows(layer: Any, path: str, names: list[str]) -> Iterator[ModuleContents]:
    """The contents of an embedding or head whose adapter replaces some rows: its weight has the adapter's rows."""
    for contents in module_contents(layer.base_layer, path):
        if contents.path == path and names:
            name = f"{path}.weight"
            contents.tensors[name] = _merged_rows(layer, contents.tensors[name], names)
        yield contents


@torch.no_grad()
def _merged_rows(layer: Any, weight: Tensor, names: list[str]) -> Tensor:
    merged = whole(weight).clone()
    for name in names:
        rows = torch.as_tensor(list(layer.token_indices[name]), device=merged.device)
        merged[rows] = whole(layer.trainable_tokens_delta[name]).to(merged)
    return merged


def _copy_in_use(wrapper: Any, path: str) -> Iterator[ModuleContents]:
    """The contents of a module of which adapters have copies, or rows: those of the copy in use."""
    token_adapter = getattr(wrapper, "token_adapter", None)
    if token_adapter is not None:
        yield from module_contents(token_adapter, path)
        return
    copies: Any = getattr(wrapper, "modules_to_save", {})
    active = list(wrapper.active_adapters)
    is_original = wrapper.disable_adapters or not active or any(name not in copies for name in active)
    assert isinstance(wrapper, ModulesToSaveWrapper), type(wrapper)
    yield from module_contents(wrapper.original_module if is_original else copies[active[0]], path)


def adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an adapter's config that may change a number."""
    names = {
        "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "auto_mapping",
        "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    }  # fmt: skip
    return {name: value for name, value in config.items() if name not in names and "drop" not in name}
