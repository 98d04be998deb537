"""Engines of ZeRO-3 that only score: a frozen module in parts, without an optimizer.

A reference model beside a policy of ZeRO-3 has an engine of its own, with the policy's options: its parameters are
spread like the policy's, and each forward pass gathers what it needs. Given up: the module's dtype. It becomes that of
the options (bf16, fp16 or fp32), as the policy's does.
"""

import copy
from importlib import import_module
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn

from holdfast.internals.deepspeed import is_partitioned, spread_like, without_engine
from holdfast.policy.sharding import whole

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


def copy_in_parts(module: nn.Module) -> nn.Module:
    """A copy of a spread `module`, spread by an engine of its own. One whole tensor at a time is in memory.
    Collective."""
    spread = [parameter for parameter in module.parameters() if is_partitioned(parameter)]
    memo: Any = {id(parameter): spread_like(whole(parameter), parameter) for parameter in spread}
    return spread_by_own_engine(without_engine(copy.deepcopy(module, memo)))


def _width(module: nn.Module) -> int:
    """The width of a model's hidden states; 0 where its config names none."""
    config = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", 0)
