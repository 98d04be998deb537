"""On which device a model is, and that all processes have the same values of it."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from torch import nn


@torch.no_grad()
def same_on_all_processes(module: nn.Module) -> list[str]:
    """The names of the tensors that processes had unlike values of: now they all have the main process's.

    DDP does the same to the policy, but only once training begins, when its reference is captured already. Costs one
    pass over the weights; nothing where there is one process.
    """
    if PartialState().num_processes == 1:
        return []
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    sums = {
        name: (float(tensor.float().sum()), float(tensor.float().norm()))
        for name, tensor in tensors.items()
        if not tensor.is_meta and not hasattr(tensor, "full_tensor")  # the parts of a sharded tensor differ
    }
    first, *others = gather_object([sums])
    unlike = [name for name in first if any(name in other and other[name] != first[name] for other in others)]
    codes = [name for name in unlike if not tensors[name].is_floating_point()]
    if codes:  # their scales are no tensors of the module
        raise ValueError(
            f"{type(module).__name__} is quantised, and its processes loaded different weights: `{codes[0]}` first of "
            f"{len(codes)}. Load the same files with the same quantization_config in all of them."
        )
    for name in unlike:
        from_main: Any = broadcast(tensors[name].contiguous())
        tensors[name].copy_(from_main)
    return unlike


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`, unless it has places of its own (`device_map`) or is quantised, which fixes its place."""
    is_quantised = getattr(module, "is_quantized", False)
    return module if is_quantised or getattr(module, "hf_device_map", None) else module.to(device)


def placed_alike(modules: Sequence[nn.Module | None], device: torch.device) -> list[nn.Module | None]:
    """The reference modules on `device` (see `placed`), with the same values in all processes."""
    on_device = [None if module is None else placed(module, device) for module in modules]
    for module in on_device:
        if module is not None:
            same_on_all_processes(module)
    return on_device
