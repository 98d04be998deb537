"""Reference models moved to the device of the run."""

from collections.abc import Sequence

import torch
from torch import nn

from holdfast.policy.broadcast import broadcast_unlike_tensors
from holdfast.policy.scoring_engine import is_partly_here, spread_by_own_engine


def move_to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`. It stays where it is if it was loaded with a `device_map`, or is quantised."""
    is_quantised = getattr(module, "is_quantized", False)
    return module if is_quantised or getattr(module, "hf_device_map", None) else module.to(device)


def move_all_to_device(
    modules: Sequence[nn.Module | None], policy: nn.Module, device: torch.device
) -> list[nn.Module | None]:
    """The reference modules on `device` (see `move_to_device`), with the same values in all processes."""
    if is_partly_here(policy):
        return [None if module is None else spread_by_own_engine(module) for module in modules]
    on_device = [None if module is None else move_to_device(module, device) for module in modules]
    for module in on_device:
        if module is not None:
            broadcast_unlike_tensors(module)
    return on_device
