"""Which softmax a head takes: the kernels of `scoring.softmax_kernels` where they work, else plain torch.

They are tried once for each device, dtype and transform, on small random logits, against plain torch: with tails, ties
and logits of minus infinity, and targets outside the vocabulary. Where Triton is missing, or they fail or differ, a
warning says so, and plain torch does the same. Policy and reference of a run get the same choice. Given up: kernels on
CPUs.
"""

import functools
import importlib
import logging

import torch
from torch import Tensor

from holdfast.scoring.softmax import NUM_COLUMNS, Softmax, TorchSoftmax
from holdfast.scoring.transform import LogitTransform

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Largest difference of a column that is rounding."""


def softmax_class(device: torch.device, dtype: torch.dtype, transform: LogitTransform) -> type[Softmax]:
    """The softmax for matrix products of `dtype` on `device`."""
    if device.type != "cuda" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return TorchSoftmax
    return _tried_kernels(device, dtype, transform) or TorchSoftmax


@functools.cache
def _tried_kernels(device: torch.device, dtype: torch.dtype, transform: LogitTransform) -> type[Softmax] | None:
    """The kernels, where they work and are right to rounding; else None, and a warning says why."""
    try:
        kernels = importlib.import_module("holdfast.scoring.softmax_kernels").KernelSoftmax
        fault = difference(kernels, device, dtype, transform)
    except Exception as error:
        kernels, fault = None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if fault is None:
        return kernels
    logger.warning("the head's log-probs on %s in %s come from plain torch, not from its kernels: %s", device, dtype,
                   fault)  # fmt: skip
    return None


def difference(
    kernels: type[Softmax], device: torch.device, dtype: torch.dtype, transform: LogitTransform
) -> str | None:
    """How the answers of `kernels` differ from those of plain torch, beyond rounding; None where they do not."""
    num_tokens, vocabulary = 9, 2500
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(num_tokens, vocabulary, generator=draw)
    logits[-3:, [7, 2077]] = 20.0  # the largest, twice, in two blocks
    logits[1, 100:2300] = float("-inf")
    target = torch.randint(vocabulary, (num_tokens,), generator=draw)
    target[-3:] = torch.tensor([vocabulary - 1, 7, 2077])
    outside = target.clone()
    outside[2], outside[3] = vocabulary, -1
    factor = torch.linspace(-1.5, 1.5, num_tokens, device=device)
    logits = logits.to(device, dtype)
    found = _answers(kernels, logits, outside.to(device), transform, factor)
    expected = _answers(TorchSoftmax, logits, target.to(device), transform, factor)
    is_inside = outside == target
    gaps = [_gap(one[..., is_inside], other[..., is_inside]) for one, other in zip(found, expected, strict=True)]
    num_nan = found[0][0].isnan().sum()
    *errors_gaps, num_without = torch.stack([*gaps, num_nan]).tolist()
    gap, errors_gap = errors_gaps[0], max(errors_gaps[1:])
    if num_without != 2:
        return f"of 9 targets, {num_without:.0f} have no log-prob (2 lie outside the vocabulary)"
    if not gap <= _TOLERANCE:
        return f"log-probs or statistics differ by {gap:.2g} ({_TOLERANCE:.2g} is rounding)"
    tolerance = max(torch.finfo(dtype).eps, _TOLERANCE)
    return None if errors_gap <= tolerance else f"gradients differ by {errors_gap:.2g} ({tolerance:.2g} is rounding)"


def _answers(
    kind: type[Softmax], logits: Tensor, target: Tensor, transform: LogitTransform, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns, and the errors without and with factors, as [V n]; all in fp32."""
    num_tokens, vocabulary = logits.shape
    softmax, here = kind(target, transform, vocabulary, num_tokens, logits.dtype), slice(0, num_tokens)
    columns = softmax.empty_columns(True)
    errors, again = (logits.to(softmax.logits_dtype, copy=True) for _ in range(2))
    softmax.write(errors, here, columns, with_errors=True)
    scaled, rest = softmax.scaled_errors(again, here, factor, columns[NUM_COLUMNS:], is_saved=False)
    scaled = scaled.float() if rest is None else scaled * rest[:, None]
    return torch.stack(columns[:NUM_COLUMNS]), errors.float().T, scaled.T


def _gap(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference where a finite number is expected, relative to the largest one above 1."""
    expected_size = torch.where(expected.isfinite(), expected.abs(), 0.0).max().clamp(min=1.0)
    return torch.where(expected.isfinite(), (found - expected).abs(), 0.0).max() / expected_size
