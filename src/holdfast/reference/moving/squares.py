"""The length of a move, from sums of squares on the device that are read at once.

Each read waits for the device. A sync moves tensor after tensor, so it keeps what it sums up there, and reads in the
end.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def read(values: Sequence[Tensor]) -> list[float]:
    """The values of tensors with one number each, in their order: one wait for each device that they are on."""
    places: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value.device, []).append(place)
    found = [0.0] * len(values)
    for of_device in places.values():
        numbers = torch.stack([values[place] for place in of_device]).tolist()
        for place, number in zip(of_device, numbers, strict=True):
            found[place] = number
    return found


def lengths(squares: Mapping[str, Sequence[Tensor]], alpha: float) -> dict[str, float]:
    """By name: `alpha` times the root of the sum of the squares."""
    numbers = iter(read([square for of_name in squares.values() for square in of_name]))
    return {name: alpha * math.sqrt(sum(next(numbers) for _ in of_name)) for name, of_name in squares.items()}
