"""A policy's adapters: whether they can be trained as they are, and whether a LoRA adds nothing yet.

The checks run before anything is scored. Their main case: adapter layers in a model that is no `PeftModel`.
transformers makes such models (`from_pretrained` of an adapter's folder, `add_adapter`, `load_adapter`), and so does
peft's `inject_adapter_in_model`. Base and adapter would both train, only the adapter would be saved, and a fresh one of
the same name would overwrite it.
"""

import difflib
from typing import Any, TypeGuard

from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from holdfast.internals.peft import adapter_layers, adapters_of, check_switching, untargeted_layers
from holdfast.internals.transformers import has_own_adapters
from holdfast.policy.sharding import whole


def check_policy_adapters(policy: nn.Module) -> None:
    """ValueError where `policy` has adapter layers that no `PeftModel` around it manages, or merged ones. MovedError
    where this version of peft switches adapters in another way than the code knows."""
    layers = adapter_layers(policy)
    if not layers:
        return
    path = next(iter(layers))
    if not isinstance(policy, PeftModel):
        raise ValueError(
            f"The policy is a {type(policy).__name__} with adapter layers in it (`{path}` and {len(layers) - 1} more, "
            f"with {sorted(_names(layers))}), but no PeftModel: base and adapters would train, and the adapters alone "
            "be saved. Load it with `PeftModel.from_pretrained(base, folder, is_trainable=True)`, or merge them into "
            "the base and pass a `peft_config`."
        )
    check_switching()
    computing = {name for layer in layers.values() for name in adapters_of(layer) & {*layer.active_adapters}}
    unknown = sorted((_names(layers) - policy.peft_config.keys()) | (computing - {*policy.active_adapters}))
    unknown = unknown or untargeted_layers(policy)
    if unknown or has_own_adapters(policy.get_base_model()):
        raise ValueError(
            f"The policy is a PeftModel of {sorted(policy.peft_config)} around a model that had adapter layers before "
            f"({unknown or 'loaded by transformers'}), which the new ones overwrite or which compute unseen. Make the "
            "PeftModel from the bare base, or from the base with those adapters merged into it."
        )
    merged = {path: list(layer.merged_adapters) for path, layer in layers.items() if layer.merged_adapters}
    if merged:
        path, names = next(iter(merged.items()))
        raise ValueError(
            f"The policy's adapters {names} are merged into its weights (`{path}` and {len(merged) - 1} more), so "
            "they would not train, and could not be switched off for the reference. Call `model.unmerge_adapter()`, "
            "or `model.merge_and_unload()` and pass a `peft_config`."
        )


def _names(layers: dict[str, Any]) -> set[str]:
    return {name for layer in layers.values() for name in adapters_of(layer)}


def check_adapter(option: str, name: str, policy: PeftModel) -> None:
    """ValueError where the policy has no adapter `name`. The message names them, and the nearest one."""
    if name in policy.peft_config:
        return
    names = sorted(policy.peft_config)
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(
        f"{option}={name!r} was asked for, but the model's adapters are {names}. "
        f"{f'Did you mean {near[0]!r}? ' if near else ''}Name one of them, or load it with `model.load_adapter`."
    )


def is_adapted(policy: nn.Module) -> TypeGuard[PeftModel]:
    """Whether `policy` is a PEFT model."""
    return isinstance(policy, PeftModel)


def lora_factors(layer: LoraLayer, adapter: str) -> list[tuple[Tensor, Tensor]]:
    """The pairs (A, B) of LoRA factors that the layer has for `adapter`: one pair at most for a weight, one for an
    embedding."""
    tables: Any = ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B))
    return [(_weight(down[adapter]), _weight(up[adapter])) for down, up in tables if adapter in down and adapter in up]


def lora_adds_nothing(layer: LoraLayer, adapter: str) -> bool:
    """Whether the LoRA `adapter` leaves every number of `layer` as it is.

    True only for plain factors of which one is all zero in each pair, as in a fresh LoRA, and without a bias. DoRA,
    AdaLoRA and other variants count as adding something: they compute more than the product of two factors. Collective
    where the factors are spread over processes.
    """
    variants: Any = getattr(layer, "lora_variant", {})
    if isinstance(layer, AdaLoraLayer) or variants.get(adapter) is not None or layer.use_dora.get(adapter):
        return False
    if any(bool(whole(down).any()) and bool(whole(up).any()) for down, up in lora_factors(layer, adapter)):
        return False
    ups: Any = (layer.lora_B, layer.lora_embedding_B)
    biases = [getattr(up[adapter], "bias", None) for up in ups if adapter in up]
    return not any(bool(whole(bias).any()) for bias in biases if bias is not None)


def _weight(factor: Any) -> Tensor:
    return factor if isinstance(factor, Tensor) else factor.weight
