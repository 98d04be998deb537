"""Which host memory counts as pinned: a CPU build of torch has none, so it is remembered here."""

import weakref

from torch import Tensor

_PINNED: dict[int, weakref.finalize] = {}
"""By the address of a storage."""


def pin(tensor: Tensor) -> Tensor:
    """`tensor`, whose memory counts as pinned from now on."""
    address = tensor.untyped_storage().data_ptr()
    if address and address not in _PINNED:
        _PINNED[address] = weakref.finalize(tensor.untyped_storage(), _PINNED.pop, address, None)
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Whether the tensor's memory counts as pinned. An empty tensor's does: nothing of it is copied."""
    return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in _PINNED


def pinned_copy(tensor: Tensor, *_: object) -> Tensor:
    """Takes the place of `Tensor.pin_memory`."""
    return tensor if tensor.device.type != "cpu" or is_pinned(tensor) else pin(tensor.clone())
