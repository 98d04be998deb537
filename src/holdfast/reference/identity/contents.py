"""What a module computes with, under the names of the bare model: its tensors and the settings beside them.

A log-prob does not depend on where a weight is kept. So a PEFT model is read as the model it computes as: wrappers are
left out of names, adapters that are off, inactive or add nothing are left out whole, and of a module that an adapter
saves as a whole the copy in use stands for the original. Whatever is not known to change no number is taken in: every
parameter, every buffer, and every plain number, text and truth value that a module carries.

Code that is no library's counts too (see `reference.identity.code`).

Given up: settings in objects that are neither plain nor modules.
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

from holdfast.internals.peft import switched_layers
from holdfast.internals.torch import own_state
from holdfast.policy.adapters import lora_adds_nothing
from holdfast.policy.rotations import has_moving_rotations
from holdfast.reference.identity.code import code_of, names_of_functions

Scalar = str | int | float | bool | torch.dtype | Enum

_OF_NO_ACCOUNT = {
    "training", "inplace", "sparse", "scale_grad_by_freq", "padding_idx", "layer_idx", "vocab_size", "name_or_path",
    "in_features", "out_features", "num_embeddings", "embedding_dim", "fan_in_fan_out", "max_position_embeddings",
    "cast_input_dtype_enabled", "router_jitter_noise", "jitter_noise", "input_jitter_noise", "is_training",
    "is_target_conv_1d_layer", "ephemeral_gpu_offload", "router_aux_loss_coef", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
"""Attributes of modules that change no log-prob in eval mode, or that shapes of tensors say already."""

_LENGTHS_OF_ROTATIONS = {"max_seq_len_cached", "original_max_seq_len", "rope_init_fn"}
_SOURCES_OF_ROTATIONS = ("original_inv_freq", "long_inv_freq")
"""What rotary embeddings make new frequencies from, where these change from batch to batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A module's own share, without its children's: tensors and settings by name, and its config where it has one."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    config: PretrainedConfig | None = None


def parts(module: nn.Module, path: str = "") -> Iterator[Part]:
    """The parts of `module` as it computes now, in the order of its children, each under its path in the bare model."""
    if isinstance(module, PeftModel):
        yield from _prompt(module, path)
        yield from parts(module.get_base_model(), path)
    elif isinstance(module, BaseTunerLayer):
        yield from _adapted(module, path)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _saved_whole(module, path)
    elif "Dropout" not in type(module).__name__:  # which a reference never has
        yield _own(module, path)
        for name, child in module.named_children():
            yield from parts(child, f"{path}.{name}" if path else name)


def _own(module: nn.Module, path: str) -> Part:
    tensors = {f"{path}.{name}": tensor for name, tensor in _tensors(module).items()}
    settings: dict[str, Any] = {"class": type(module).__qualname__} | _scalars(module) | code_of(module)
    if not has_moving_rotations(module):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SOURCES_OF_ROTATIONS)}
        settings = {name: value for name, value in settings.items() if name not in _LENGTHS_OF_ROTATIONS}
    config = vars(module).get("config")
    return Part(
        path=path,
        tensors=tensors,
        settings=settings,
        config=config if isinstance(config, PretrainedConfig) else None,
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers; of a layer that keeps integers (a quantised one) its scales and code
    books too, without which W and 2 W would be the same codes."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if not all(tensor.is_floating_point() for tensor in (*own.values(), *module.buffers(recurse=False))):
        own |= {name: tensor for name, tensor in own_state(module).items() if name not in own}
    held = {name: value for name, value in vars(module).items() if isinstance(value, Tensor) and _counts(name)}
    return own | dict(module.named_buffers(recurse=False)) | held


def _scalars(module: nn.Module) -> dict[str, Any]:
    """The module's plain settings. Of a whole model only numbers with a point: its flags are about training."""
    if isinstance(module, PreTrainedModel):
        return {name: value for name, value in vars(module).items() if _counts(name) and isinstance(value, float)}
    settings = {name: value for name, value in vars(module).items() if _counts(name) and _is_plain(value)}
    settings |= {name: function for name, function in names_of_functions(module) if _counts(name)}
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        del settings["norm_type"]
    return settings


def _counts(name: str) -> bool:
    is_about_training = "drop" in name or "checkpoint" in name
    return not (name.startswith("_") or is_about_training or name in _OF_NO_ACCOUNT)


def _is_plain(value: Any) -> bool:
    """Whether it is a nest of settings without a tensor or an object in it."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(key, Scalar) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_plain, value))
    return isinstance(value, Scalar)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _prompt(policy: PeftModel, path: str) -> Iterator[Part]:
    """The virtual tokens of the active adapter, where it learns a prompt."""
    name: Any = policy.active_adapter
    config = policy.peft_config.get(name) if isinstance(name, str) else None
    if config is None or not config.is_prompt_learning:
        return
    yield Part(path=f"{path}|prompt", settings=plain_config(config.to_dict()))
    if name in policy.prompt_encoder:
        yield from parts(policy.prompt_encoder[name], f"{path}|prompt")


def _adapted(layer: Any, path: str) -> Iterator[Part]:
    """A layer with adapters: what is under them, and what each active one adds to it, by its place and not its name."""
    names = [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)
    if isinstance(layer, TrainableTokensLayer):
        yield from _replaced_rows(layer, path, [name for name in names if name in layer.trainable_tokens_delta])
        return
    if isinstance(layer, LNTuningLayer):
        name = next((name for name in names if name in layer.ln_tuning_layers), None)
        yield from parts(layer.base_layer if name is None else layer.ln_tuning_layers[name], path)
        return
    yield from parts(layer.base_layer, path)
    if layer.disable_adapters and layer.merged:  # a forward pass would unmerge it
        yield Part(path=f"{path}|merged", settings={"merged": list(layer.merged_adapters)})
    for place, name in enumerate(name for name in names if not adds_nothing(layer, name)):
        yield from _adapter(layer, name, f"{path}|{place}")


def adds_nothing(layer: Any, name: str) -> bool:
    """Whether the adapter `name` of a tuner layer leaves every number of it as it is; if in doubt, not.

    True for plain LoRA factors of which one is all zero, for (IA)3 vectors of ones, for weights that would be added and
    are zero, and where the layer has no part of that adapter.
    """
    if isinstance(layer, IA3Layer):
        return name not in layer.ia3_l or bool((layer.ia3_l[name].detach() == 1).all())
    if not isinstance(layer, LoraLayer) or isinstance(layer, AdaLoraLayer):
        keyed = [getattr(layer, part, None) for part in layer.adapter_layer_names]
        tables: list[Any] = [part for part in keyed if hasattr(part, "keys")]
        return (bool(tables) and not any(name in part for part in tables)) or _adds_zero(layer, name)
    return lora_adds_nothing(layer, name)


@torch.no_grad()
def _adds_zero(layer: Any, name: str) -> bool:
    """Whether what peft would add to the layer's weight is zero, and the layer gives its base's numbers to the bit."""
    base: Any = layer.get_base_layer()
    make: Any = getattr(layer, "get_delta_weight", None)
    is_linear = type(base) is nn.Linear
    if make is None or not (is_linear or type(base) is nn.Embedding) or base.weight.is_meta:
        return False
    modes = [(part, part.training) for part in layer.modules()]
    layer.eval()
    try:
        with switched_layers({name: layer}, name):
            added = make(name)
            if not isinstance(added, Tensor) or bool(added.any()):
                return False
            tried: Tensor = torch.arange(min(8, len(base.weight)), device=base.weight.device)  # token ids
            if is_linear:
                tried = torch.cos(torch.arange(8.0 * base.in_features).reshape(8, -1)).to(base.weight)
            return bool(torch.equal(layer(tried), base(tried)))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # a kind that has no such weight
        return False
    finally:
        for part, is_training in modes:
            part.training = is_training


def _adapter(layer: Any, name: str, path: str) -> Iterator[Part]:
    """What the adapter `name` of a tuner layer computes with."""
    module: nn.Module = layer
    variant = getattr(layer, "lora_variant", {}).get(name)
    settings: dict[str, Any] = {"class": type(layer).__qualname__}
    if isinstance(layer, LoraLayer) and variant is None and not layer.use_dora.get(name):
        settings["scaling"] = float(layer.scaling[name])
    else:
        settings |= {"variant": type(variant).__qualname__} | _settings_of(layer, name)
    yield Part(path=path, settings=settings, tensors={f"{path}.{k}": t for k, t in _tensors(module).items()})
    children: Any = module.named_children()
    for attribute, child in children:
        if attribute == "base_layer" or "drop" in attribute:
            continue
        if isinstance(child, nn.ModuleDict | nn.ParameterDict) or type(child).__name__ == "BufferDict":
            child = child[name] if name in child else None  # noqa: SIM401  # a ModuleDict has no `get`
        if isinstance(child, Tensor):
            yield Part(path=path, tensors={f"{path}.{attribute}": child})
        elif child is not None:
            yield from parts(child, f"{path}.{attribute}")


def _settings_of(layer: Any, name: str) -> dict[str, Any]:
    """All plain settings of a tuner layer of a kind that is not known here, those by adapter for `name` alone."""
    known = set(layer.active_adapters) | {name}
    settings: dict[str, Any] = {}
    for attribute, value in vars(layer).items():
        own = value.get(name) if isinstance(value, Mapping) and known & set(value) else value
        if _counts(attribute) and _is_plain(own):
            settings[attribute] = own
    return settings


def _replaced_rows(layer: Any, path: str, names: list[str]) -> Iterator[Part]:
    """An embedding or head some of whose rows are an adapter's own: its weight as it is used."""
    for part in parts(layer.base_layer, path):
        if part.path == path and names:
            part.tensors[f"{path}.weight"] = _merged_rows(layer, part.tensors[f"{path}.weight"], names)
        yield part


@torch.no_grad()
def _merged_rows(layer: Any, weight: Tensor, names: list[str]) -> Tensor:
    merged = weight.detach().clone()
    for name in names:
        rows = torch.as_tensor(list(layer.token_indices[name]), device=merged.device)
        merged[rows] = layer.trainable_tokens_delta[name].detach().to(merged)
    return merged


def _saved_whole(wrapper: Any, path: str) -> Iterator[Part]:
    """A module that adapters have copies of, or rows of: the one that is in use."""
    token_adapter = getattr(wrapper, "token_adapter", None)
    if token_adapter is not None:
        yield from parts(token_adapter, path)
        return
    copies: Any = getattr(wrapper, "modules_to_save", {})
    active = list(wrapper.active_adapters)
    is_passed_through = wrapper.disable_adapters or not active or any(name not in copies for name in active)
    assert isinstance(wrapper, ModulesToSaveWrapper), type(wrapper)
    yield from parts(wrapper.original_module if is_passed_through else copies[active[0]], path)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter's config that may change a number."""
    names = {
        "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "auto_mapping",
        "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    }  # fmt: skip
    return {name: value for name, value in config.items() if name not in names and "drop" not in name}
