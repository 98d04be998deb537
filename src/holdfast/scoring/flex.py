"""The attention of `holdfast.scoring.attention` in one kernel a layer: FlexAttention with a block mask, for GPUs.

Span by span, a GPU would wait for one small kernel after another. Here the mask is a function of (row, query, key) that
reads each token's segment, completion and position. Blocks of 128 x 128 in which no query sees a key are skipped. So
rows do not pay for their neighbours here either, and no [T T] mask exists. The kernel is the one that transformers
calls for `attn_implementation="flex_attention"`, which handles soft-capping, sinks and grouped heads.

The kernel is compiled when it is first used. `is_usable` tries it once per device, forward and backward, against plain
products. Where it fails or differs, attention goes span by span. Given up: CPUs, for which it has no backward pass in
torch 2.13; attention dropout, which it cannot do; and fp64.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import causal_mask_function

from holdfast.internals.torch import compiled_block_mask

logger = logging.getLogger(__name__)

RowLengths = Sequence[tuple[int, Sequence[int]]]
"""Of each segment of a row: the number of tokens of its prompt, and of each of its completions."""

PADDING = -1
"""The segment of a padding token."""


def block_mask(
    rows: Sequence[RowLengths], num_columns: int, visible: Callable[..., Any], device: torch.device
) -> BlockMask:
    """Which keys each query sees: those of its prompt and of its own completion, at positions that `visible` allows.

    `visible` is a mask function of transformers. Padding sees itself.
    """
    segment, completion, position = (torch.from_numpy(ids).to(device) for ids in _token_ids(rows, num_columns))

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_own = (completion[row, key] == 0) | (completion[row, key] == completion[row, query])
        is_near = (segment[row, key] == segment[row, query]) & is_own & (segment[row, query] != PADDING)
        is_seen = is_near & visible(row, head, position[row, query], position[row, key])
        return is_seen | (query == key)

    return compiled_block_mask(sees, len(rows), num_columns, device)


def _token_ids(rows: Sequence[RowLengths], num_columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token [R T] its segment, its completion (0 for a prompt's), and its position."""
    segment = np.full((len(rows), num_columns), PADDING, dtype=np.int32)
    completion, position = np.zeros_like(segment), np.zeros_like(segment)
    for row, segments in enumerate(rows):
        start = 0
        for number, (prompt, completions) in enumerate(segments):
            for which, (length, first) in enumerate([(prompt, 0), *((length, prompt) for length in completions)]):
                here = slice(start, start + length)
                segment[row, here], completion[row, here] = number, which
                position[row, here] = first + np.arange(length)
                start += length
    return segment, completion, position


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The attention's output `[R T H dv]`. ValueError with dropout.

    `softcap` bounds the scores, and `s_aux` [H] are sinks, as in `scoring.attention.shared_attention`.
    """
    if dropout > 0:
        raise ValueError(
            f"{type(module).__name__} drops attention weights with a probability of {dropout}, which flex attention "
            "cannot. Use disable_dropout=True, or layout='padded'."
        )
    # Scaled here: the kernel would be compiled anew for another factor.
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return flex_attention_forward(module, query, key, value, mask, scaling=1.0, softcap=softcap, s_aux=s_aux)[0]


@functools.cache
def is_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled kernel works on `device`, forward and backward, and is right to rounding. Tried once."""
    if device.type != "cuda":
        return False
    try:
        gap = _gap(device, dtype)
    except Exception as error:
        logger.warning("flex attention is not used: %s: %s", type(error).__name__, str(error).splitlines()[0])
        return False
    tolerance = 1e-2 if dtype != torch.float32 else 1e-3
    if not gap <= tolerance:
        logger.warning("flex attention is not used: it differs by %.2g (%.2g is rounding)", gap, tolerance)
    return gap <= tolerance


def _gap(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of output and gradients from those of softmax(q k^T) v, relative to the largest value."""
    draw = torch.Generator().manual_seed(0)
    shape = (3, 2, 4, 160, 32)  # query, key and value; rows, heads, tokens
    leaves = [leaf.to(device, dtype).requires_grad_(True) for leaf in torch.randn(shape, generator=draw)]
    rows: list[RowLengths] = [[(40, (30, 20)), (10, (25, 35))], [(70, (40,))]]
    mask = block_mask(rows, 160, causal_mask_function, device)
    upstream = torch.randn(2, 160, 4, 32, generator=draw).to(device, dtype)
    query, key, value = leaves
    output = flex_attention(nn.Identity().train(), query, key, value, mask, scaling=0.2)
    gradients = torch.autograd.grad(output, leaves, upstream)
    wide = [leaf.detach().float().requires_grad_(True) for leaf in leaves]
    scores = (wide[0] @ wide[1].transpose(-1, -2) * 0.2).masked_fill(~dense(rows, 160, device), float("-inf"))
    expected = (scores.softmax(-1) @ wide[2]).transpose(1, 2)
    pairs = zip((output, *gradients), (expected, *torch.autograd.grad(expected, wide, upstream.float())), strict=True)
    return max(float((one.float() - other).abs().max() / other.abs().max()) for one, other in pairs)


def dense(rows: Sequence[RowLengths], num_columns: int, device: torch.device) -> Int[Tensor, "R 1 T T"]:
    """The same mask under causal attention, as booleans, computed independently of `block_mask`: for comparison."""
    mask = torch.eye(num_columns, dtype=torch.bool).repeat(len(rows), 1, 1)
    for row, segments in enumerate(rows):
        start = 0
        for prompt, completions in segments:
            end = start + prompt
            mask[row, start:end, start:end] = torch.ones(prompt, prompt, dtype=torch.bool).tril()
            for length in completions:
                mask[row, end : end + length, start : start + prompt] = True
                mask[row, end : end + length, end : end + length] = torch.ones(length, length, dtype=torch.bool).tril()
                end += length
            start = end
    return mask[:, None].to(device)
