"""The same weights in all processes, before a reference is captured from them.

DDP copies the main process's weights to the others too, but only when training begins. By then the reference has been
captured from the policy. The cost is one pass over the weights, where there are several processes.
"""

from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, parse_flag_from_env
from torch import nn

from holdfast.policy.sharding import is_part


def is_loaded_once() -> bool:
    """Whether one process has the weights of models, and the others get them when FSDP2 shards a model
    (`cpu_ram_efficient_loading`). Until then the values of the others mean nothing."""
    names = "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"
    return PartialState().num_processes > 1 and all(parse_flag_from_env(name) for name in names)


@torch.no_grad()
def broadcast_unlike_tensors(module: nn.Module) -> list[str]:
    """Gives all processes the main process's values of the tensors that differ between them; returns their names.

    ValueError where quantised weights differ: their scales are no tensors of the module, so they cannot be copied.
    """
    if PartialState().num_processes == 1:
        return []
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    sums = {
        name: (float(tensor.float().sum()), float(tensor.float().norm()))
        for name, tensor in tensors.items()
        if not tensor.is_meta and not is_part(tensor)  # parts differ between processes
    }
    first, *others = gather_object([sums])
    unlike = [name for name in first if any(name in other and other[name] != first[name] for other in others)]
    quantised = [name for name in unlike if not tensors[name].is_floating_point()]
    if quantised:
        raise ValueError(
            f"{type(module).__name__} is quantised, and its processes loaded different weights: `{quantised[0]}` "
            f"first of {len(quantised)}. Load the same files with the same quantization_config in all of them."
        )
    for name in unlike:
        from_main: Any = broadcast(tensors[name].contiguous().to(PartialState().device))
        tensors[name].copy_(from_main)
    return unlike
