"""From hidden states to log-probs through a head that is a plain matrix: softmax and both gradients, in chunks.

`linear_logps` is one differentiable operation, and no `[N V]` tensor beyond a chunk of tokens is alive in its forward
or backward pass. A chunk's logits are computed in a buffer. They are overwritten, a block at a time while the caches
hold it, by the error p - 1[y] of each token, from which both gradients are computed.

- A frozen head: the gradient of the hidden states is computed in the forward pass. A loss reaches the hidden state h_n
  through one number, logp_n, so d logp_n / d h_n = W[y_n] - sum_v p_n(v) W[v] is saved (`[N h]`), and the backward pass
  scales its rows.
- A trained head: its gradient mixes the tokens, so the backward pass computes each chunk's logits again. Only the
  errors of the last chunk are saved.
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

from holdfast.scoring.transform import LogitTransform

_PRODUCT = 2**24
"""Elements of the weight's gradient that are alive in half precision before they are added up in fp32."""

_CPU_LOGITS = 2**21
"""Most logits of a chunk on a CPU without gradients: 8 MiB in fp32."""
_CPU_TOKENS = 128
"""Fewest tokens of such a chunk."""
_CPU_VOCABULARY = 2**11
"""Tokens of the vocabulary that are taken at a time on a CPU, where log-probs are computed alone and in any order."""
_CPU_BLOCK_LOGITS = 2**18
"""Logits of a block on a CPU: as many as its caches hold."""
_BLOCK_LOGITS = 2**23
"""Logits of a block on other devices: 32 MiB, enough to keep one busy."""


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
        return logps, torch.special.entr(probs).sum(-1), logits.mean(-1), is_top1, _log_sum_sq(probs)


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
        return _forward(_Chunks(states, weight, bias, target, options), with_statistics)


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


def _log_sum_sq(probs: Tensor) -> Tensor:
    return 2 * torch.linalg.vector_norm(probs, dim=-1).log()


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
        block_logits = _CPU_BLOCK_LOGITS if states.device.type == "cpu" else _BLOCK_LOGITS
        self.block = max(1, min(self.size, block_logits // len(weight)))

    @cached_property
    def buffer(self) -> Float[Tensor, "n V"]:
        """A chunk's logits, later its errors."""
        return self._empty(self.size)

    @cached_property
    def scratch(self) -> Float[Tensor, "b V"]:
        """A block's log-probs."""
        return self._empty(self.block)

    def _empty(self, num_tokens: int) -> Tensor:
        return torch.empty((num_tokens, len(self.weight)), dtype=self.wide_dtype, device=self.states.device)

    def logits(self, here: slice) -> Float[Tensor, "n V"]:
        """The head's output for a chunk, before the transform; the next call overwrites it."""
        states, logits = self.states[here], self.buffer[: here.stop - here.start]
        if states.dtype != self.wide_dtype:
            logits.copy_(nn.functional.linear(states, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(states, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, states, self.weight.T, out=logits)
        return logits

    def write_logps(self, here: slice, out: Float[Tensor, "c n"] | None, *, with_errors: bool) -> Float[Tensor, "n V"]:
        """Writes a chunk's log-probs into `out`, and its statistics where `out` has rows for them (c = 5, else 1).

        Returns the chunk's errors where these are asked for: minus the gradient of each token's log-prob with respect
        to the head's output. Without `out`, only the errors are computed.
        """
        chunk = self.logits(here)
        for rows in (slice(i, i + self.block) for i in range(0, len(chunk), self.block)):
            target = self.target[here][rows, None]
            logits = chunk[rows]
            self.transform.apply_(logits)
            log_probs = torch.log_softmax(logits, -1, out=self.scratch[: len(logits)])
            if out is not None:
                out[0, rows] = log_probs.gather(-1, target).squeeze(-1)
            if with_errors or (out is not None and len(out) > 1):
                self._finish(logits, log_probs, target, None if out is None else out[1:, rows])
        return chunk

    def _finish(self, logits: Tensor, log_probs: Tensor, target: Tensor, statistics: Tensor | None) -> None:
        """Overwrites a block's logits with its errors; fills the rows of `statistics`, if it has any."""
        cap, scale = self.transform.cap, self.transform.scale
        slope = None if cap is None else 1 - (logits / cap).square_()  # of tanh, from its value
        if statistics is not None and len(statistics) > 0:
            # In half precision the largest logit is often there twice; then the first one counts, as for `argmax`.
            is_exact = self.states.dtype == self.wide_dtype
            largest = logits.amax(-1, keepdim=True) if is_exact else logits.argmax(-1, keepdim=True)
            is_top1 = (logits.gather(-1, target) if is_exact else target) == largest
            statistics[1], statistics[2] = logits.mean(-1), is_top1.squeeze(-1)
        probs = torch.exp(log_probs, out=logits)
        if statistics is not None and len(statistics) > 0:
            statistics[0], statistics[3] = -log_probs.mul_(probs).sum(-1), _log_sum_sq(probs)
        errors = probs.scatter_add_(-1, target, probs.new_full(target.shape, -1.0))
        if slope is not None:
            errors.mul_(slope)
        if scale != 1.0:
            errors.mul_(scale)


def _forward(
    chunks: _Chunks, with_statistics: bool, states_gradient: Tensor | None = None, *, keeps_last: bool = False
) -> tuple[Tensor, ...]:
    """The log-probs, and the statistics where they are asked for.

    `states_gradient` is filled with the gradient of each token's log-prob with respect to its hidden state. With
    `keeps_last`, the errors of the last chunk are left in the buffer.
    """
    num_tokens = len(chunks.target)
    out = torch.empty((5 if with_statistics else 1, num_tokens), dtype=chunks.wide_dtype, device=chunks.target.device)
    for here in chunks.slices:
        is_saved = keeps_last and here.stop == num_tokens
        errors = chunks.write_logps(here, out[:, here], with_errors=is_saved or states_gradient is not None)
        if states_gradient is not None:
            torch.mm(errors.to(chunks.states.dtype), chunks.weight, out=states_gradient[here])
    if states_gradient is not None:
        states_gradient.neg_()
    return tuple(row.clone() for row in out)  # no views of each other


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


def _add_product(
    total: Float[Tensor, "V h"], gradient: Float[Tensor, "n V"], states: Float[Tensor, "n h"], *, is_first: bool
) -> None:
    """Adds `gradient.T @ states` to `total`, in fp32 or wider. The first product overwrites `total`, which is empty."""
    if gradient.dtype == total.dtype:
        torch.mm(gradient.T, states, out=total) if is_first else total.addmm_(gradient.T, states)
        return
    if is_first:
        total.zero_()
    num_rows = max(1, _PRODUCT // max(1, total.shape[1]))
    for part, columns in zip(total.split(num_rows), gradient.split(num_rows, dim=1), strict=True):
        part.add_(columns.T @ states)


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
            results = _forward(chunks, options.with_statistics, states_gradient, keeps_last=any(needs_head))
        ctx.options = options
        ctx.dtypes = tuple(None if leaf is None else leaf.dtype for leaf in (states, weight, bias))
        if ctx.is_head_frozen:
            ctx.save_for_backward(states_gradient)
        else:
            last = chunks.slices[-1] if chunks.slices else slice(0, 0)
            ctx.save_for_backward(states, weight, bias, target, chunks.buffer[: last.stop - last.start])
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        if ctx.is_head_frozen:
            (states_gradient,) = ctx.saved_tensors
            return (states_gradient * upstream[:, None]).to(ctx.dtypes[0]), None, None, None, None
        states, weight, bias, target, last_errors = ctx.saved_tensors  # read once: checkpointing allows no more
        with torch.autocast(upstream.device.type, enabled=False):
            chunks = _Chunks(states, weight, bias, target, ctx.options)
            return *_gradients(ctx, chunks, upstream, last_errors), None, None


def _gradients(ctx: Any, chunks: _Chunks, upstream: Tensor, last_errors: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of hidden states, weight and bias, None where one is not needed.

    The errors of the last chunk were saved; those of the others are computed again.
    """
    needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    for_states = torch.empty_like(chunks.states) if needs_states else None
    wide = {"dtype": chunks.wide_dtype, "device": upstream.device}
    # Not zeros: writing them would cost a good part of a small product.
    for_weight = torch.empty(chunks.weight.shape, **wide) if needs_weight else None
    if for_weight is not None and not chunks.slices:
        for_weight.zero_()
    for_bias = torch.zeros(len(chunks.weight), **wide) if needs_bias else None
    for here in reversed(chunks.slices):
        is_last = here is chunks.slices[-1]
        errors = last_errors if is_last else chunks.write_logps(here, None, with_errors=True)
        states, scale = chunks.states[here], -upstream[here, None]
        if errors.dtype == states.dtype:
            scaled = states * scale  # h numbers per token, where the errors have V
        else:  # scaled while they are cast, before a product in half precision could overflow
            narrow = torch.empty_like(errors, dtype=states.dtype)
            errors, scaled, scale = torch.mul(errors, scale, out=narrow), states, None
        if for_states is not None:
            torch.mm(errors, chunks.weight, out=for_states[here])
            if scale is not None:
                for_states[here].mul_(scale)
        if for_weight is not None:
            _add_product(for_weight, errors, scaled, is_first=is_last)
        if for_bias is not None:
            for_bias += errors.sum(0, dtype=chunks.wide_dtype) if scale is None else errors.T @ scale.squeeze(-1)
    gradients = zip((for_states, for_weight, for_bias), ctx.dtypes, strict=True)
    return tuple(None if gradient is None else gradient.to(dtype) for gradient, dtype in gradients)
