"""From hidden states to log-probs through a head that is a plain matrix: softmax and both gradients, in chunks.

`linear_logps` is one differentiable operation, and no `[N V]` tensor beyond a chunk of tokens is alive in its forward
or backward pass. A chunk's logits are computed in a buffer. They are overwritten by the error p - 1[y] of each token
(`scoring.softmax`), from which both gradients are computed.

- A frozen head: the gradient of the hidden states is computed in the forward pass. A loss reaches the hidden state h_n
  through one number, logp_n, so d logp_n / d h_n = W[y_n] - sum_v p_n(v) W[v] is saved (`[N h]`), and the backward pass
  scales its rows.
- A trained head: its gradient mixes the tokens, so the backward pass computes each chunk's logits again. Only the
  last chunk is saved. The weight's gradient is added up in fp32 (`scoring.weight_gradient`).
- Log-probs alone, on a CPU, where `any_order` allows it: the vocabulary is taken in parts, and all tokens at once.

Given up: gradients of gradients (they raise), and one more matrix product of a trained head than with all logits saved.
"""

import math
from functools import cached_property
from typing import Any, NamedTuple, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from holdfast.scoring.softmax import NUM_COLUMNS, log_sum_sq
from holdfast.scoring.softmax_choice import softmax_class
from holdfast.scoring.transform import LogitTransform
from holdfast.scoring.weight_gradient import add_product

_CPU_LOGITS = 2**21
"""Most logits of a chunk on a CPU without gradients: 8 MiB in fp32."""
_CPU_TOKENS = 128
"""Fewest tokens of such a chunk."""
_CPU_VOCABULARY = 2**11
"""Tokens of the vocabulary that are taken at a time on a CPU, where log-probs are computed alone and in any order."""


def token_logps(logits: Float[Tensor, "n V"], target: Int[Tensor, "n"], with_statistics: bool) -> tuple[Tensor, ...]:
    """The log-prob of each target (`[n]`, fp32) from final logits; with statistics, four more `[n]` without gradients.

    These are the entropy, the mean logit, whether the target is the most likely token, and log sum_v p(v)^2.
    """
    logits = logits.float()
    logps = logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1)
    if not with_statistics:
        return (logps,)
    with torch.no_grad():
        probs = torch.softmax(logits, -1)
        is_top1 = (logits.argmax(-1) == target).to(logits.dtype)
        return logps, torch.special.entr(probs).sum(-1), logits.mean(-1), is_top1, log_sum_sq(probs)


def linear_logps(
    states: Float[Tensor, "N h"],
    weight: Float[Tensor, "V h"],
    bias: Float[Tensor, "V"] | None,
    target: Int[Tensor, "N"],
    transform: LogitTransform,
    *,
    chunk_tokens: int,
    with_statistics: bool = False,
    any_order: bool = False,
) -> tuple[Tensor, ...]:
    """`token_logps` of `transform(states @ weight.T + bias)`, in fp32 (fp64 from fp64), `chunk_tokens` at a time.

    The matrix products are taken in the autocast dtype where autocast is on, the softmax never. Gradients reach
    `states`, `weight` and `bias` where these require them; the weight's is added up in fp32. A gradient of a gradient
    raises RuntimeError. Log-probs come from the same sums with gradients, with statistics and without either, so equal
    models get equal log-probs. `any_order` allows sums in another order, which is faster, for log-probs that are
    compared with no policy.
    """
    options = _Options(transform, chunk_tokens, with_statistics, _autocast_dtype(states))
    if torch.is_grad_enabled():
        return cast(tuple[Tensor, ...], _LinearLogps.apply(states, weight, bias, target, options))
    if states.device.type == "cpu":
        is_wide = options.autocast_dtype is None and states.dtype.itemsize >= 4
        if any_order and is_wide and not with_statistics and len(weight) > _CPU_VOCABULARY:
            chunks = zip(states.split(chunk_tokens), target.split(chunk_tokens), strict=True)
            logps = [_logps_by_vocabulary(states, target, weight, bias, transform) for states, target in chunks]
            return (torch.cat(logps),)
        options = options._replace(chunk_tokens=min(chunk_tokens, max(_CPU_LOGITS // len(weight), _CPU_TOKENS)))
    with torch.autocast(states.device.type, enabled=False):
        columns = _forward(_Chunks(states, weight, bias, target, options), with_statistics)
    return tuple(columns[: NUM_COLUMNS if with_statistics else 1])


class _Options(NamedTuple):
    """The arguments of `linear_logps` that are no tensors, and the dtype of its matrix products under autocast."""

    transform: LogitTransform
    chunk_tokens: int
    with_statistics: bool
    autocast_dtype: torch.dtype | None


def _autocast_dtype(states: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts the arguments of a matrix product; None where it casts nothing."""
    device = states.device.type
    is_cast = torch.is_autocast_enabled(device) and states.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else None


@final
class _Chunks:
    """The tokens cut into chunks (`slices`), and the logits of one chunk at a time in a buffer that all share."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: _Options) -> None:
        # Cast here and not by autocast, whose cache would keep a weight cast without a graph for later calls.
        dtype = options.autocast_dtype
        self.states = states if dtype is None else states.to(dtype)
        self.weight = weight if dtype is None else weight.to(dtype)
        self.bias = bias if dtype is None or bias is None else bias.to(dtype)
        self.target = target
        self.transform = options.transform
        num_chunks = math.ceil(len(states) / options.chunk_tokens)
        self.size = math.ceil(len(states) / max(1, num_chunks))  # alike, so that one buffer fits all
        self.slices = [slice(i, min(i + self.size, len(states))) for i in range(0, len(states), max(1, self.size))]
        self.wide_dtype = torch.promote_types(self.states.dtype, torch.float32)
        softmax = softmax_class(states.device, self.states.dtype, options.transform)
        self.softmax = softmax(target, options.transform, len(weight), self.size, self.states.dtype)

    @cached_property
    def buffer(self) -> Float[Tensor, "n V"]:
        """A chunk's logits, later its errors."""
        shape = (self.size, len(self.weight))
        return torch.empty(shape, dtype=self.softmax.logits_dtype, device=self.states.device)

    def logits(self, here: slice) -> Float[Tensor, "n V"]:
        """The head's output for a chunk, before the transform; the next call overwrites it."""
        states, logits = self.states[here], self.buffer[: here.stop - here.start]
        if states.dtype != logits.dtype:
            logits.copy_(nn.functional.linear(states, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(states, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, states, self.weight.T, out=logits)
        return logits


def _forward(
    chunks: _Chunks, with_statistics: bool, states_gradient: Tensor | None = None, *, keeps_last: bool = False
) -> list[Float[Tensor, "N"]]:
    """The columns of `scoring.softmax`. On the way `states_gradient` is filled with the gradient of each token's
    log-prob with respect to its hidden state, and with `keeps_last`, the buffer is left with what the backward pass
    needs of the last chunk.
    """
    softmax, num_tokens = chunks.softmax, len(chunks.target)
    columns = softmax.empty_columns(with_statistics)
    for here in chunks.slices:
        chunk = chunks.logits(here)
        is_saved = keeps_last and here.stop == num_tokens and softmax.keeps_errors
        softmax.write(chunk, here, columns, with_errors=is_saved or states_gradient is not None)
        if states_gradient is not None:
            torch.mm(chunk.to(chunks.states.dtype), chunks.weight, out=states_gradient[here])
    if states_gradient is not None:
        states_gradient.neg_()
    return columns


def _logps_by_vocabulary(
    states: Float[Tensor, "n h"],
    target: Int[Tensor, "n"],
    weight: Float[Tensor, "V h"],
    bias: Float[Tensor, "V"] | None,
    transform: LogitTransform,
) -> Float[Tensor, "n"]:
    """The log-probs alone, from one part of the vocabulary after another.

    So a CPU reads the weights once for all tokens, and its caches hold the logits of a part.
    """
    parts = weight.split(_CPU_VOCABULARY)
    largest, total = states.new_empty(2, len(parts), len(states))
    of_target = states.new_full((len(states),), float("nan"))  # stays so for a target outside the vocabulary
    buffer = states.new_empty(len(states), len(parts[0]))
    for index, part in enumerate(parts):
        start = index * _CPU_VOCABULARY
        logits = buffer.view(-1)[: len(states) * len(part)].view(len(states), len(part))
        if bias is None:
            torch.mm(states, part.T, out=logits)
        else:
            torch.addmm(bias[start : start + len(part)], states, part.T, out=logits)
        transform.apply_(logits)
        row = (target - start).clamp(0, len(part) - 1)
        logit = logits.gather(-1, row[:, None]).squeeze(-1)
        of_target = torch.where(row == target - start, logit, of_target)
        top = torch.amax(logits, -1, out=largest[index]).clamp_min_(torch.finfo(logits.dtype).min)  # not -inf + inf
        torch.sum(logits.sub_(top[:, None]).exp_(), -1, out=total[index])
    return of_target - total.log_().add_(largest).logsumexp(0)


@final
class _LinearLogps(torch.autograd.Function):
    """`linear_logps` with gradients."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: _Options
    ) -> tuple[Tensor, ...]:
        """See `torch.autograd.Function`."""
        with torch.autocast(states.device.type, enabled=False):
            chunks = _Chunks(states, weight, bias, target, options)
            needs_states, *needs_head = ctx.needs_input_grad[:3]
            ctx.is_head_frozen = needs_states and not any(needs_head)
            states_gradient = torch.empty_like(chunks.states) if ctx.is_head_frozen else None
            columns = _forward(chunks, options.with_statistics, states_gradient, keeps_last=any(needs_head))
        results = tuple(columns[: NUM_COLUMNS if options.with_statistics else 1])
        ctx.options = options
        ctx.dtypes = tuple(None if leaf is None else leaf.dtype for leaf in (states, weight, bias))
        if ctx.is_head_frozen:
            ctx.save_for_backward(states_gradient)
        else:
            last = chunks.slices[-1] if chunks.slices else slice(0, 0)
            last_chunk = chunks.buffer[: last.stop - last.start]
            ctx.save_for_backward(states, weight, bias, target, last_chunk, *columns[NUM_COLUMNS:])
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        if ctx.is_head_frozen:
            (states_gradient,) = ctx.saved_tensors
            return (states_gradient * upstream[:, None]).to(ctx.dtypes[0]), None, None, None, None
        states, weight, bias, target, last_chunk, *columns = (
            ctx.saved_tensors
        )  # read once: checkpointing allows no more
        with torch.autocast(upstream.device.type, enabled=False):
            chunks = _Chunks(states, weight, bias, target, ctx.options)
            return *_gradients(ctx, chunks, upstream, last_chunk, columns), None, None


def _gradients(
    ctx: Any, chunks: _Chunks, upstream: Tensor, last_chunk: Tensor, columns: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden states, weight and bias, None where one is not needed.

    The last chunk was saved; the logits of the others are computed again.
    """
    needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    for_states = torch.empty_like(chunks.states) if needs_states else None
    wide = {"dtype": chunks.wide_dtype, "device": upstream.device}
    # Not zeros: writing them would cost a good part of a small product.
    for_weight = torch.empty(chunks.weight.shape, **wide) if needs_weight else None
    if for_weight is not None and not chunks.slices:
        for_weight.zero_()
    for_bias = torch.zeros(len(chunks.weight), **wide) if needs_bias else None
    factor = -upstream
    for here in reversed(chunks.slices):
        is_last = here is chunks.slices[-1]
        chunk = last_chunk if is_last else chunks.logits(here)
        errors, rest = chunks.softmax.scaled_errors(chunk, here, factor, columns, is_saved=is_last)
        states = chunks.states[here]
        scaled = states if rest is None else states * rest[:, None]  # h numbers per token, where the errors have V
        if for_states is not None:
            torch.mm(errors, chunks.weight, out=for_states[here])
            if rest is not None:
                for_states[here].mul_(rest[:, None])
        if for_weight is not None:
            add_product(for_weight, errors, scaled, is_first=is_last)
        if for_bias is not None:
            for_bias += errors.sum(0, dtype=chunks.wide_dtype) if rest is None else errors.T @ rest
    gradients = zip((for_states, for_weight, for_bias), ctx.dtypes, strict=True)
    return tuple(None if gradient is None else gradient.to(dtype) for gradient, dtype in gradients)
