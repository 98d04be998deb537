"""Engines of ZeRO-3 that only score: a frozen module in parts, without an optimizer.

A reference model beside a policy of ZeRO-3 has an engine of its own, with the policy's options: its parameters are
spread like the policy's, and each forward pass gathers what it needs. Given up: the module's dtype. It becomes that of
the options (bf16, fp16 or fp32), as the policy's does.
"""

import copy
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from accelerate.state import AcceleratorState
from torch import Tensor, nn

from holdfast.internals.deepspeed import is_partitioned, spread_like

_SIZES = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
"""The options of ZeRO that go by the width of the model where they are "auto", as transformers sets them."""


def spread_by_own_engine(module: nn.Module) -> nn.Module:
    """`module`, whose parameters are spread over all processes and gathered by forward passes. Collective."""
    plugin: Any = AcceleratorState().deepspeed_plugin
    config = copy.deepcopy(plugin.hf_ds_config.config)
    for section in ("optimizer", "scheduler"):
        config.pop(section, None)
    zero, hidden = config["zero_optimization"], _width(module)
    for name, size in _SIZES.items():
        if zero.get(name) == "auto":
            zero[name] = size(hidden)
    import_module("deepspeed").initialize(model=module.eval(), config=config)
    return module


def is_spread_by_zero(module: nn.Module) -> bool:
    """Whether ZeRO-3 spreads the module's parameters."""
    return any(map(is_partitioned, module.parameters()))


def filled_by_zero(blank: nn.Module, policy: nn.Module, values: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """The module `blank` with the whole `values` by name, spread as `policy` is by an engine of its own. One value at a
    time is whole in memory, if they come one by one. Collective."""
    like = next(filter(is_partitioned, policy.parameters()))
    spread: dict[int, nn.Parameter] = {}
    for name, value in values:
        spread[id(blank.get_parameter(name))] = spread_like(value, like)
    for child in blank.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            setattr(child, name, spread[id(parameter)])
    return spread_by_own_engine(blank)


def _width(module: nn.Module) -> int:
    """The width of a model's hidden states; 0 where its config names none."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", 0)
