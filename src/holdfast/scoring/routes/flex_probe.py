"""Whether FlexAttention is right on a device: the compiled kernel is tried once, forward and backward.

Its output and gradients are compared with those of plain products in fp32 from the same inputs. What plain products in
the kernel's own dtype differ by is rounding, and the kernel may differ three times as much. The functions compiled here
are a probe's own and take none of the run's versions.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from jaxtyping import Bool
from torch import Tensor

from holdfast.scoring.routes.flex_kernel import FlexMask, flex
from holdfast.scoring.segments import Segments

logger = logging.getLogger(__name__)

NOISE_FACTOR = 3.0
"""How many times the rounding of plain products the kernel's may be."""

LEAST_TOLERANCE = 1e-3
"""A relative difference that is rounding in any dtype."""

SCALE = 0.2
"""Of the scores of a probe."""

PIECES = ((0, 70, True), (0, 40, False), (0, 30, False), (1, 10, True), (1, 35, False), (1, 90, False))
"""The rows of a probe, as `Segments.of` takes them."""


def is_right(device: torch.device, dtype: torch.dtype, mask: FlexMask) -> bool:
    """Whether the compiled kernel works on `device` under the mask of `probe_segments`, forward and backward."""
    try:
        found, noise = _gaps(device, dtype, mask)
    except Exception as error:
        logger.warning("flex attention is not used: %s: %s", type(error).__name__, str(error).splitlines()[0])
        return False
    tolerance = max(LEAST_TOLERANCE, NOISE_FACTOR * noise)
    if not found <= tolerance:  # NaN is neither
        logger.warning("flex attention is not used: it differs by %.2g (%.2g is rounding)", found, tolerance)
    return found <= tolerance


def probe_segments() -> Segments:
    """Two rows of several blocks, with padding."""
    return Segments.of(PIECES, num_rows=2, num_columns=150)


def _gaps(device: torch.device, dtype: torch.dtype, mask: FlexMask) -> tuple[float, float]:
    """The kernel's and plain products' largest difference of output and gradients from those in fp32."""
    draw = torch.Generator().manual_seed(0)
    num_tokens = mask.num_tokens
    shapes = [(1, num_tokens, heads, 32) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    upstream = torch.randn(1, num_tokens, 4, 32, generator=draw).to(device, dtype)
    seen = dense(probe_segments()).to(device)

    def by_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex(query, key, value, mask, scale=SCALE, purpose="probe")

    def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _plain(query, key, value, seen)

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        exact = _with_gradients(by_products, [state.float() for state in inputs], upstream)
        plain = _with_gradients(by_products, inputs, upstream)
        kernel = _with_gradients(by_kernel, inputs, upstream)
    return _largest_gap(kernel, exact), _largest_gap(plain, exact)


def _with_gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output of `attend`, and the gradients of its inputs."""
    leaves = [state.detach().requires_grad_(True) for state in inputs]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def _plain(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """softmax(scale q k^T) v, each product in the dtype of its inputs."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    key, value = (states.repeat_interleave(2, dim=1) for states in (key, value))
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _largest_gap(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    pairs = zip(found, exact, strict=True)
    return max(float((one.float() - other).abs().max() / other.abs().max()) for one, other in pairs)


def dense(segments: Segments) -> Bool[Tensor, "T T"]:
    """Which keys each query sees under causal attention, all rows laid end to end, worked out one piece after another
    and independently of `routes.blocks`."""
    num_columns = segments.num_columns
    seen = torch.eye(len(segments.rows) * num_columns, dtype=torch.bool)
    for row, row_segments in enumerate(segments.rows):
        start = row * num_columns
        for segment in row_segments:
            end = start + segment.prompt
            seen[start:end, start:end] = torch.ones(segment.prompt, segment.prompt, dtype=torch.bool).tril()
            for length in chain.from_iterable(segment.groups):
                seen[end : end + length, start : start + segment.prompt] = True
                seen[end : end + length, end : end + length] = torch.ones(length, length, dtype=torch.bool).tril()
                end += length
            start = end
    return seen
