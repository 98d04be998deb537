"""Copies of tensors in host memory, many of them in one buffer.

A copy from pinned memory need not be waited for. torch's allocator of pinned memory rounds every request up to a power
of two: an embedding of 2.1 GB, pinned alone, takes 4 GB. So tensors of one dtype share buffers. One buffer for all of
them would be rounded as well (17 GB to 32 GB), so what is large is spread over a few buffers, each filled to just below
a power of two.

Given up: freeing one of the tensors before the others.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SMALL_BYTES = 2**20
"""Up to here, tensors share one buffer whatever it is rounded to."""


def host_copies(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of `values` in host memory, by name. Those of tensors on an accelerator are pinned, so that they return
    without anybody waiting. All copies are complete."""
    groups: dict[tuple[torch.dtype, bool], list[str]] = {}
    for name, value in values.items():
        groups.setdefault((value.dtype, value.is_cuda), []).append(name)
    copies: dict[str, Tensor] = {}
    for (dtype, is_pinned), names in groups.items():
        sizes = [values[name].nbytes for name in names]
        for members in buffers_of(sizes) if is_pinned else [range(len(names))]:
            own = [names[member] for member in members]
            lengths = [values[name].numel() for name in own]
            buffer = torch.empty(sum(lengths), dtype=dtype, pin_memory=is_pinned)
            for name, part in zip(own, buffer.split(lengths), strict=True):
                copies[name] = part.view(values[name].shape).copy_(values[name], non_blocking=True)
    for device in {value.device for value in values.values() if value.is_cuda}:
        torch.accelerator.current_stream(device).synchronize()  # once for all
    return {name: copies[name] for name in values}


def buffers_of(sizes: Sequence[int]) -> list[list[int]]:
    """The numbers of the tensors that share each buffer, where `sizes` are the tensors' bytes.

    A buffer has at most the largest power of two of bytes that what is left would fill, and always the largest tensor
    that is left; what fits is put beside it, the largest first.
    """
    left = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    buffers: list[list[int]] = []
    while left:
        num_bytes = sum(sizes[number] for number in left)
        if num_bytes <= SMALL_BYTES:
            return [*buffers, sorted(left)]
        room = max(_power_up_to(num_bytes), _power_from(sizes[left[0]]))
        members: list[int] = []
        for number in left:
            if sizes[number] <= room:
                members.append(number)
                room -= sizes[number]
        left = [number for number in left if number not in {*members}]
        buffers.append(sorted(members))
    return buffers


def _power_up_to(number: int) -> int:
    """The largest power of two that is not above `number`, which is at least 1."""
    return 1 << (number.bit_length() - 1)


def _power_from(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
