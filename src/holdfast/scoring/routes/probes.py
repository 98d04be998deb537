"""Whether a route works on a device, tried once in a process. Everybody asks `works`, so a test can answer for it."""

import functools

import torch

from holdfast.scoring.routes.base import Route


def works(route: Route, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `route` was seen to give the right output and gradients on `device` in `dtype`."""
    return _tried(route, device, dtype)


@functools.cache
def _tried(route: Route, device: torch.device, dtype: torch.dtype) -> bool:
    return route.works_on(device, dtype)
