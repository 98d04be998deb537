"""Whether a route works on a device, tried once in a process. Everybody asks `works`, so a test can answer for it.

A route is tried on a few short rows: several completions of a prompt, a prompt of no tokens, completions of one token,
padding, grouped heads, with and without a window. Its output and gradients are compared with plain products in fp32 of
the same rounded numbers, sequence by sequence. So what is left is the rounding of one layer.
"""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from holdfast.scoring.routes.base import AttentionCall, Route
from holdfast.scoring.segments import Segments

logger = logging.getLogger(__name__)

TOLERANCE = 0.03
"""Largest gap that is rounding in half precision, as a share of the largest value."""

TOLERANCE_FP32 = 1e-3
"""The same in fp32, which devices may round to tf32."""

_ROWS = ([(40, [30, 20, 1]), (0, [35, 1])], [(70, [40]), (9, [])])
"""Of two rows the numbers of tokens of each segment's prompt, and of each of its completions."""
_COLUMNS = 131
_WINDOW = 7
_SCALING = 0.1


def works(route: Route, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `route` was seen to give the right output and gradients on `device` in `dtype`."""
    device = _numbered(device)
    return (route, device, dtype) not in _REFUSED and _tried(route, device, dtype)


def refuse(route: Route, device: torch.device, dtype: torch.dtype) -> None:
    """From now on `route` does not work on `device` in `dtype`: it does not on another process of the run."""
    _REFUSED.add((route, _numbered(device), dtype))


_REFUSED: set[tuple[Route, torch.device, torch.dtype]] = set()


def _numbered(device: torch.device) -> torch.device:
    """The device by its number, where it is the current one of its kind."""
    is_current = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_current else device


@functools.cache
def _tried(route: Route, device: torch.device, dtype: torch.dtype) -> bool:
    # In a thread of its own: the layer that asks may be under autocast, without gradients, or in a recomputation that
    # counts what is saved for the backward pass. All of that holds for one thread.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(route.works_on, device, dtype).result()


def is_right(route: Route, device: torch.device, dtype: torch.dtype, width: int = 64) -> bool:
    """Whether `route` computes without an error what plain products compute, for heads of this width; a warning says
    what it does otherwise."""
    tolerance = TOLERANCE_FP32 if dtype.itemsize > 2 else TOLERANCE
    try:
        gaps = [largest_gap(route, device, dtype, window, width) for window in (None, _WINDOW)]
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "no message")
        found = f"it fails there ({type(error).__name__}: {line})"
    else:
        wrong = [gap for gap in gaps if not gap <= tolerance]  # NaN is wrong
        if not wrong:
            return True
        found = f"its results there differ by {wrong[0]:.2g} of the largest one ({tolerance:g} is rounding)"
    logger.warning("attention: %s is not used on %s in %s: %s", route.name, device, str(dtype).split(".")[-1], found)
    return False


def largest_gap(route: Route, device: torch.device, dtype: torch.dtype, window: int | None, width: int = 64) -> float:
    """The largest difference of outputs and gradients from those of plain products, each relative to the largest, for
    heads of this width."""
    draw = torch.Generator().manual_seed(0)
    segments = Segments.of(_lengths(), len(_ROWS), _COLUMNS)
    shape = (len(_ROWS), 4, _COLUMNS, width)
    query, key, value, upstream = torch.randn(4, *shape, generator=draw).to(dtype)
    leaves = [query, key[:, :2], value[:, :2]]  # grouped heads
    visible = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    own = [_laid_like_a_model(leaf).to(device).requires_grad_(True) for leaf in leaves]
    call = AttentionCall(
        module=nn.Identity().train(), query=own[0], key=own[1], value=own[2], segments=segments, scaling=_SCALING
    )
    places = _read_places()
    output = route.attend(call, route.prepared(segments.to(device), visible, device, dtype)).flatten(0, 1)
    upstream = upstream.transpose(1, 2).flatten(0, 1)[places]
    gradients = torch.autograd.grad(output[places.to(device)], own, upstream.to(device))
    wide = [leaf.float().requires_grad_(True) for leaf in leaves]
    expected = _plain_products(wide[0], wide[1], wide[2], window)
    expected_gradients = torch.autograd.grad(expected, wide, upstream.float())
    found = (output.detach()[places.to(device)], *gradients)
    pairs = zip(found, (expected.detach(), *expected_gradients), strict=True)
    gaps = [(one.float().cpu() - other).abs().max() / other.abs().max() for one, other in pairs]
    return float(torch.stack(gaps).max())


def _lengths() -> list[tuple[int, int, bool]]:
    pieces = []
    for row, segments in enumerate(_ROWS):
        for prompt, completions in segments:
            pieces += [(row, prompt, True), *((row, length, False) for length in completions)]
    return pieces


def _laid_like_a_model(states: Tensor) -> Tensor:
    """The same numbers, with the heads of a token side by side in memory, as projections leave them."""
    return states.transpose(1, 2).contiguous().transpose(1, 2)


def _sequences() -> list[tuple[int, int, int, int]]:
    """Of each sequence of tokens that is attended by itself: the place and the number of tokens of its prompt, and of
    what follows it. A prompt alone has no prompt before it."""
    sequences = []
    for row, segments in enumerate(_ROWS):
        start = row * _COLUMNS
        for prompt, completions in segments:
            first = start
            sequences.append((first, 0, first, prompt))
            start += prompt
            for length in completions:
                sequences.append((first, prompt, start, length))
                start += length
    return [sequence for sequence in sequences if sequence[-1] > 0]


def _read_places() -> Tensor:
    """The places of all tokens but padding, in the order of `_sequences`."""
    return torch.cat([torch.arange(start, start + length) for _, _, start, length in _sequences()])


def _plain_products(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """The outputs at `_read_places`, sequence by sequence, from softmax(scaling q k^T) v."""
    num_groups = query.shape[1] // key.shape[1]
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    queries, keys, values = flat[0], *(states.repeat_interleave(num_groups, 1) for states in flat[1:])
    outputs = []
    for prompt_start, num_prompt, start, length in _sequences():
        places = [*range(prompt_start, prompt_start + num_prompt), *range(start, start + length)]
        scores = torch.einsum("qhd,khd->hqk", queries[start : start + length], keys[places]) * _SCALING
        distance = torch.arange(num_prompt, num_prompt + length)[:, None] - torch.arange(len(places))
        hidden = (distance < 0) | (distance >= (window or len(places)))
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, values[places]))
    return torch.cat(outputs)
