"""A batch that no data loader made goes to a GPU like one of a loader's: from pinned memory, and nobody waits for it.

A copy from other host memory waits until the GPU has done all that it was asked before, so it would stand still while
the next batch is laid out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor


def copied_ahead(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on `device` where that is a GPU and the batch is in host memory, else as it is."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if device.type != "cuda" or any(tensor.device.type != "cpu" for tensor in tensors):
        return dict(batch)
    pinned = {name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in batch.items()}
    moved: Any = send_to_device(pinned, device, non_blocking=True)
    return moved
