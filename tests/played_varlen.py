"""`torch.nn.attention.varlen.varlen_attn` as its documentation defines it, in plain torch: it runs on GPUs only.

Sequence by sequence, in the dtype of its inputs, with gradients by autograd. Each way in which it may be wrong is a
mistake that a probe of the kernel must find.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def played_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    is_aligned_at_the_top: bool = False,
    heeds_windows: bool = True,
    wrong_window: int = 0,
    swaps_heads: bool = False,
    wrong_scale: float = 1.0,
) -> Tensor:
    """[T_q H d] from [T_q H d], [T_k Hkv d] and the places at which sequences begin and end."""
    assert return_aux is None
    check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa)
    num_groups = query.shape[1] // key.shape[1]
    repeated = [
        states.repeat(1, num_groups, 1) if swaps_heads else states.repeat_interleave(num_groups, 1)
        for states in (key, value)
    ]
    left, right = window_size if heeds_windows else (-1, window_size[1])
    left = left + wrong_window if left >= 0 else left
    scale = wrong_scale * (query.shape[-1] ** -0.5 if scale is None else scale)
    outputs = []
    for (q_start, q_end), (k_start, k_end) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        own = query[q_start:q_end].transpose(0, 1)
        keys, values = (states[k_start:k_end].transpose(0, 1) for states in repeated)
        shift = 0 if is_aligned_at_the_top else (k_end - k_start) - (q_end - q_start)
        places = torch.arange(q_end - q_start)[:, None] + shift
        others = torch.arange(k_end - k_start)
        seen = torch.ones(q_end - q_start, k_end - k_start, dtype=torch.bool)
        if right >= 0:
            seen &= others <= places + right
        if left >= 0:
            seen &= others >= places - left
        scores = (own @ keys.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def check(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, gqa: bool
) -> None:
    """What the kernel asks of its arguments."""
    assert query.ndim == key.ndim == value.ndim == 3
    assert query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape
    assert query.shape[-1] == key.shape[-1] <= 256
    assert query.shape[-1] % 8 == 0
    assert query.shape[1] == key.shape[1] or (gqa and query.shape[1] % key.shape[1] == 0)
    assert all(states.stride(-1) == 1 for states in (query, key, value))
    for ends, states, longest in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert int(ends[0]) == 0
        assert int(ends[-1]) == len(states)
        assert int(ends.diff().max()) == longest
        assert int(ends.diff().min()) > 0


class _Scaled(torch.autograd.Function):
    """The same output, and a gradient that is too large by a factor."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, factor: float) -> Tensor:  # ty: ignore
        ctx.factor = factor
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # ty: ignore
        return grad * ctx.factor, None


def with_wrong_gradient(which: int, factor: float) -> Callable[..., Tensor]:
    """The kernel with the gradient of query, key or value (0, 1, 2) too large by `factor`."""

    def attend(*states_and_more: Any, **options: Any) -> Tensor:
        states = [*states_and_more[:3]]
        states[which] = _Scaled.apply(states[which], factor)
        return played_varlen_attn(*states, *states_and_more[3:], **options)

    return attend


def failing(*_: Any, **__: Any) -> Tensor:
    """The kernel on a device that it is not made for."""
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nMore lines.")


def not_a_number(*given: Any, **options: Any) -> Tensor:
    """The kernel with outputs that are no numbers."""
    return played_varlen_attn(*given, **options) * float("nan")


def not_a_number_under_a_window(*given: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    """The kernel with outputs that are no numbers where there is a window."""
    output = played_varlen_attn(*given, window_size=window_size, **options)
    return output * float("nan") if window_size[0] >= 0 else output
