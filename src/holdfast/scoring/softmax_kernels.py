"""The softmax over a chunk's logits in two Triton kernels, for GPUs.

Plain torch passes over fp32 logits about ten times. Here one kernel reads the logits once, as the matrix product left
them, and folds them into the log-prob and the statistics of each token; the other reads them once more and writes the
errors, in the dtype of the next matrix product and in place. Neither has an fp32 copy of the logits.

- One row to a program. A row is taken a block of the vocabulary at a time. The largest logit so far is the only number
  that all lanes share; of every sum each lane keeps its own part, and these are added at the end.
- The first kernel computes all columns, and its sums begin anew when a larger logit is found, whatever is asked for. So
  it is the same kernel with gradients, with statistics and without, and log-probs are equal to the last bit.
- Of each token the largest logit and the log of the sum are kept (fp32), so a trained head's backward pass computes
  its errors from its logits without folding them again.

This module needs Triton, which comes with the CUDA builds of torch, and is imported by `scoring.softmax_choice` alone.
Given up: fp64.
"""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.scoring.softmax import NUM_COLUMNS, Softmax
from holdfast.scoring.transform import LogitTransform

BLOCK = 2048
"""Tokens of the vocabulary that a program takes at a time."""

_NUM_WARPS = 8
"""So a thread has eight tokens of a block: 16 bytes in half precision, the widest read."""

_VARYING = ["first"]
_UNALIGNED = ["target", "factor"]
"""What differs from batch to batch, and is never a reason for another compiled kernel."""

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Where a row's largest logit begins: not at minus infinity, from which nothing can be subtracted."""


@triton.jit
def _decay(logits, inner):
    """exp(-2 |z|) of z, the argument of tanh, from which tanh and its slope are computed."""
    return tl.exp(-2.0 * tl.abs(logits * inner))


@triton.jit
def _transformed(logits, scale, inner, cap, HAS_CAP: tl.constexpr):
    """`cap * tanh(inner * logits)`, where `inner` is scale / cap; without a cap, `scale * logits`."""
    if HAS_CAP:
        decay = _decay(logits, inner)
        tanh = (1.0 - decay) / (1.0 + decay)
        return cap * tl.where(logits * inner < 0.0, -tanh, tanh)
    return logits * scale


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _fold_kernel(
    logits, target, log_probs, entropies, mean_logits, are_top1, log_sums_sq, tops, log_totals, first, vocabulary,
    row_stride, scale, inner, cap,
    HAS_CAP: tl.constexpr, IS_EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # a chunk may have more than 2^31 logits
    logits += row * row_stride
    label = tl.load(target + first + row).to(tl.int64)
    is_inside = (label >= 0) & (label < vocabulary)
    wanted = tl.load(logits + label, mask=is_inside, other=0.0).to(tl.float32)
    wanted = tl.where(is_inside, _transformed(wanted, scale, inner, cap, HAS_CAP), float("nan"))

    top = _LOWEST
    total = tl.zeros([BLOCK], tl.float32)  # of e^d, where d = logit - top
    weighted = tl.zeros([BLOCK], tl.float32)  # of d e^d
    squares = tl.zeros([BLOCK], tl.float32)  # of e^2d
    logit_sum = tl.zeros([BLOCK], tl.float32)
    is_earlier = tl.zeros([BLOCK], tl.int32)  # the target's logit, at a token that comes before it
    for begin in range(0, vocabulary, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        is_token = token < vocabulary
        logit = tl.load(logits + token, mask=is_token, other=0.0).to(tl.float32)
        logit = tl.where(is_token, _transformed(logit, scale, inner, cap, HAS_CAP), float("-inf"))
        largest = tl.maximum(top, tl.max(logit, axis=0))
        shift = top - largest
        ratio = tl.exp(shift)
        distance = logit - largest
        power = tl.exp(distance)
        weighted = tl.where(ratio > 0.0, ratio * (weighted + total * shift), 0.0)
        weighted += tl.where(power > 0.0, power * distance, 0.0)  # the limit, where -inf * 0 would be NaN
        total = total * ratio + power
        squares = squares * (ratio * ratio) + power * power
        logit_sum += tl.where(is_token, logit, 0.0)
        is_earlier |= ((logit == wanted) & (token < label)).to(tl.int32)
        top = largest

    sum_of_powers = tl.sum(total, axis=0)
    log_total = tl.log(sum_of_powers)
    log_prob = (wanted - top) - log_total
    is_top1 = (wanted == top) & (log_prob == log_prob)
    if not IS_EXACT:
        is_top1 = is_top1 & (tl.max(is_earlier, axis=0) == 0)
    place = first + row
    tl.store(log_probs + place, log_prob)
    tl.store(entropies + place, log_total - tl.sum(weighted, axis=0) / sum_of_powers)
    tl.store(mean_logits + place, tl.sum(logit_sum, axis=0) / vocabulary)
    tl.store(are_top1 + place, is_top1.to(tl.float32))
    tl.store(log_sums_sq + place, tl.log(tl.sum(squares, axis=0)) - 2.0 * log_total)
    tl.store(tops + place, top)
    tl.store(log_totals + place, log_total)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _errors_kernel(
    logits, target, tops, log_totals, factor, out, first, vocabulary, row_stride, out_stride, scale, inner, cap,
    HAS_CAP: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = first + row
    label = tl.load(target + place).to(tl.int64)
    top = tl.load(tops + place)
    log_total = tl.load(log_totals + place)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocabulary
    logit = tl.load(logits + row * row_stride + token, mask=is_token, other=0.0).to(tl.float32)
    error = tl.exp((_transformed(logit, scale, inner, cap, HAS_CAP) - top) - log_total)
    error = tl.where(token == label, error - 1.0, error)
    if HAS_CAP:
        decay = _decay(logit, inner)
        error *= 4.0 * decay / ((1.0 + decay) * (1.0 + decay))  # the slope of tanh
    error *= scale
    if HAS_FACTOR:
        error *= tl.load(factor + place).to(tl.float32)
    tl.store(out + row * out_stride + token, error.to(out.dtype.element_ty), mask=is_token)


@final
class KernelSoftmax(Softmax):
    """In two kernels. The columns are those of `Softmax`, and two more: a token's largest logit, and the log of the sum
    of exp(logit - largest). They are all computed, whether asked for or not."""

    keeps_errors = False

    def __init__(
        self, target: Int[Tensor, "N"], transform: LogitTransform, vocabulary: int, size: int, dtype: torch.dtype
    ) -> None:
        """See `Softmax`."""
        self._target = target.contiguous()
        self._vocabulary = vocabulary
        self.logits_dtype = dtype
        cap, scale = transform.cap, transform.scale
        self._has_cap = cap is not None
        self._transform = (scale, 1.0, 1.0) if cap is None else (scale, scale / cap, cap)

    def empty_columns(self, with_statistics: bool) -> list[Float[Tensor, "N"]]:
        """See `Softmax`."""
        like = {"dtype": torch.float32, "device": self._target.device}
        return [torch.empty(len(self._target), **like) for _ in range(NUM_COLUMNS + 2)]

    def write(
        self, logits: Float[Tensor, "n V"], here: slice, columns: Sequence[Float[Tensor, "N"]], *, with_errors: bool
    ) -> None:
        """See `Softmax`. A target outside the vocabulary has no log-prob: NaN, which no store takes."""
        assert logits.stride(1) == 1, logits.stride()
        sizes = (here.start, self._vocabulary, logits.stride(0))
        arguments: list[Any] = [logits, self._target, *columns, *sizes, *self._transform]
        self._launch(_fold_kernel, (len(logits),), arguments, IS_EXACT=logits.dtype == torch.float32)
        if with_errors:
            self._write_errors(logits, here, None, columns[NUM_COLUMNS:], out=logits)

    def scaled_errors(
        self,
        chunk: Float[Tensor, "n V"],
        here: slice,
        factor: Float[Tensor, "N"],
        columns: Sequence[Tensor],
        *,
        is_saved: bool,
    ) -> tuple[Float[Tensor, "n V"], None]:
        """See `Softmax`."""
        out = torch.empty_like(chunk) if is_saved else chunk
        self._write_errors(chunk, here, factor, columns, out=out)
        return out, None

    def _write_errors(
        self, logits: Tensor, here: slice, factor: Tensor | None, columns: Sequence[Tensor], *, out: Tensor
    ) -> None:
        """Writes a chunk's errors, times the tokens' factors, into `out`, which may be `logits`."""
        top, log_total = columns
        factors = top if factor is None else factor.contiguous()
        sizes = (here.start, self._vocabulary, logits.stride(0), out.stride(0))
        arguments: list[Any] = [logits, self._target, top, log_total, factors, out, *sizes, *self._transform]
        grid = (len(logits), math.ceil(self._vocabulary / BLOCK))
        self._launch(_errors_kernel, grid, arguments, HAS_FACTOR=factor is not None)

    def _launch(self, kernel: Any, grid: tuple[int, ...], arguments: list[Any], **constants: bool) -> None:
        """A product and a sum are rounded each, not fused: a logit is then the same number wherever in a kernel it is
        computed."""
        constants |= {"HAS_CAP": self._has_cap}
        with torch.cuda.device_of(self._target):
            kernel[grid](*arguments, **constants, BLOCK=BLOCK, num_warps=_NUM_WARPS, enable_fp_fusion=False)
