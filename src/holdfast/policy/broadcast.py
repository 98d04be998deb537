"""The same weights in all processes, before a reference is captured from them.

DDP copies the main process's weights to the others too, but only when training begins. By then the reference has been
captured from the policy. The cost is one pass over the weights, where there are several processes.
"""

from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from torch import nn


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
        if not tensor.is_meta and not hasattr(tensor, "full_tensor")  # shards differ between processes
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
