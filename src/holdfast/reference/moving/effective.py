"""The effective weights of a policy: those of the bare model that computes the same, with adapters merged in.

A mix of LoRA's factors A and B apart would be a different model. peft merges the layers of a copy. Where the policy is
sharded, one adapted layer after another is gathered and merged, and each process keeps its part of the result. Given
up: memory for a merged copy, of which a process of a sharded run has its part.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from holdfast.internals.peft import adapter_layers
from holdfast.policy.adapters import is_adapted
from holdfast.policy.second_module import blank_copy, filled, part_like, whole_copy
from holdfast.policy.sharding import is_sharded


def effective_copy(policy: PeftModel) -> nn.Module:
    """A copy of a PEFT policy with its active adapters merged into the weights, sharded where the policy is. ValueError
    for a learned prompt."""
    prompts = [name for name, config in policy.peft_config.items() if config.is_prompt_learning]
    if prompts:
        raise ValueError(
            f"sync_ref_model=True was asked for with the prompt-learning adapter {prompts[0]!r}, which cannot be "
            "merged into weights, so there is no mix of two such models. Use a fixed reference, or a LoRA."
        )
    if is_sharded(policy):
        return filled(_bare_and_blank(policy), policy, _effective_values(policy))
    duplicate: Any = copy.deepcopy(policy)
    return duplicate.merge_and_unload()


def effective_parameters(policy: nn.Module) -> Mapping[str, Tensor]:
    """The policy's parameters by name, with its adapters merged in. Where it is sharded and has adapters, they have
    shapes only."""
    if not is_adapted(policy):
        return dict(policy.named_parameters())
    module = _bare_and_blank(policy) if is_sharded(policy) else effective_copy(policy)
    return dict(module.named_parameters())


def effective_parts(policy: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """The policy's effective weights by the names of `like`'s parameters, each cut as that parameter is. Collective
    where the policy is sharded."""
    canonical = {id(parameter): name for name, parameter in like.named_parameters()}
    parts: dict[str, Tensor] = {}
    for name, value in _effective_values(policy):
        parameter = like.get_parameter(name)  # tied weights have several names
        parts[canonical[id(parameter)]] = part_like(value, parameter)
    return parts


def _bare_and_blank(policy: PeftModel) -> nn.Module:
    duplicate: Any = blank_copy(policy)
    return duplicate.unload()


@torch.no_grad()
def _effective_values(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The effective weights by their names in the bare model, one adapted layer at a time: those without adapters
    first, as the policy has them, then merged ones, whole. Collective where the policy is sharded."""
    base = policy.get_base_model() if is_adapted(policy) else policy
    layers: dict[str, Any] = {}
    for path, layer in adapter_layers(base).items():
        if not any(path.startswith(f"{outer}.") for outer in layers):
            layers[path] = layer
    for path, module in base.named_modules(remove_duplicate=False):
        if not any(path == outer or path.startswith(f"{outer}.") for outer in layers):
            yield from ((f"{path}.{name}" if path else name, p) for name, p in module.named_parameters(recurse=False))
    for path, layer in layers.items():
        yield from ((f"{path}.{name}", p) for name, p in _merged(whole_copy(layer)).named_parameters())


def _merged(layer: Any) -> nn.Module:
    """The module that computes what `layer` does with its active adapters. As peft unloads one layer."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    layer.merge()
    return layer.get_base_layer()
