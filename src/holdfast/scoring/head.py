"""From hidden states to log-probs: the head, its softmax and both gradients, a chunk of tokens at a time.

`linear_columns` is one differentiable operation for a plain linear head. A chunk's logits are made in a buffer, and
overwritten a block at a time, while the caches hold it, by what both gradients are made of: the error p - 1[y] of each
token. Where the head is frozen, the gradient of the hidden states is made in the forward pass: a loss reaches them
through one number per token, so d logp_n / d h_n = W[y_n] - sum_v p_n(v) W[v] is kept (`[N h]`), and the backward pass
scales its rows. A trained head's gradient mixes the tokens, so the backward pass makes a chunk's logits again, once,
but for those of the last chunk, whose errors are kept. No tensor of `[N V]` beyond a chunk is alive in either. Where
log-probs are all that is wanted, in `any_order`, a CPU takes the vocabulary in parts, and all tokens at once.

Given up: gradients of gradients (they raise), and one matrix product of a trained head against keeping all logits.
"""

import math
from functools import cached_property
from typing import Any, NamedTuple, cast, final

import torch
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from holdfast.internals.torch import has_hooks

_PRODUCT = 2**24
"""Elements of the weight's gradient that are alive in half precision before they are added up in fp32."""

_CPU_LOGITS = 2**21
_CPU_TOKENS = 128
_CPU_BLOCK_LOGITS = 2**18
_CPU_VOCABULARY = 2**11
_BLOCK_LOGITS = 2**23
"""On a CPU: logits of a chunk of which nothing is summed up, 8 MiB in fp32, and the tokens that it has at least; logits
of a block, which caches hold; and the part of the vocabulary that log-probs alone are made from at a time. Elsewhere a
block is what keeps a device busy, 32 MiB."""

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LogitTransform(NamedTuple):
    """What a model does to the output of its head: `cap * tanh(scale * x / cap)`; no cap where it is None."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits

    def apply_(self, logits: Tensor) -> None:
        """The same, written over its argument."""
        if self.cap is not None:
            logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        elif self.scale != 1.0:
            logits.mul_(self.scale)


def token_columns(logits: Float[Tensor, "n V"], target: Int[Tensor, "n"], with_statistics: bool) -> tuple[Tensor, ...]:
    """The log-prob of each target, and four statistics without gradients; from final logits, in fp32.

    The statistics are the entropy, the mean logit, whether the target is the most likely token, and log sum_v p(v)^2.
    """
    logits = logits.float()
    logps = logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1)
    if not with_statistics:
        return (logps,)
    with torch.no_grad():
        probs = torch.softmax(logits, -1)
        is_top1 = (logits.argmax(-1) == target).to(logits.dtype)
        return logps, torch.special.entr(probs).sum(-1), logits.mean(-1), is_top1, _log_sum_sq(probs)


def linear_columns(
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
    """`token_columns` of `transform(states @ weight.T + bias)`, in fp32 (fp64 from fp64), `chunk_tokens` at a time.

    The matrix products are taken in the autocast dtype where autocast is on, the softmax never. Gradients reach
    `states`, `weight` and `bias` where these require them; the weight's is added up in fp32. A gradient of a gradient
    raises RuntimeError. Log-probs are made in one way, with gradients, with statistics and without, so that equal
    models get equal ones; where that is of no use, `any_order` allows sums in another order, which is faster.
    """
    plan = _Plan(transform, chunk_tokens, with_statistics, _autocast_dtype(states))
    if torch.is_grad_enabled():
        return cast(tuple[Tensor, ...], _LinearColumns.apply(states, weight, bias, target, plan))
    if states.device.type == "cpu":
        is_wide = plan.autocast_dtype is None and states.dtype.itemsize >= 4
        if any_order and is_wide and not with_statistics and len(weight) > _CPU_VOCABULARY:
            parts = zip(states.split(chunk_tokens), target.split(chunk_tokens), strict=True)
            return (torch.cat([_log_probs(*part, weight, bias, transform) for part in parts]),)
        plan = plan._replace(chunk_tokens=min(chunk_tokens, max(_CPU_LOGITS // len(weight), _CPU_TOKENS)))
    with torch.autocast(states.device.type, enabled=False):
        return _forward(_Chunks(states, weight, bias, target, plan), with_statistics)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether `head` is an `nn.Linear` and nothing else: no adapter, hook, replaced forward, or quantised weight."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    # Quantised and distributed weights are subclasses of Tensor with products of their own.
    return not has_hooks(head) and type(head.weight) in (nn.Parameter, Tensor) and head.weight.dtype in _WEIGHT_DTYPES


def matrix_of(head: object) -> nn.Linear | None:
    """The plain linear map that `head` computes: itself, an adapter's whole copy of it while that is in use, or the one
    below an adapter that is off. None where it computes more.

    A bare base so gives the same numbers to the bit whatever adapter is around it.
    """
    if isinstance(head, ModulesToSaveWrapper):
        names = [] if head.disable_adapters else list(head.active_adapters)
        is_saved = bool(names) and all(name in head.modules_to_save for name in names)
        return matrix_of(head.modules_to_save[names[0]] if is_saved else head.original_module)
    if isinstance(head, BaseTunerLayer):
        return matrix_of(head.get_base_layer()) if head.disable_adapters and not head.merged else None
    return head if isinstance(head, nn.Linear) and is_plain_linear(head) else None


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP holds parameters of `model`, and so comes and goes with their values."""
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


class _Plan(NamedTuple):
    """How the columns are made; everything that is no tensor."""

    transform: LogitTransform
    chunk_tokens: int
    with_statistics: bool
    autocast_dtype: torch.dtype | None


def _autocast_dtype(states: Tensor) -> torch.dtype | None:
    """What `nn.functional.linear` would cast its arguments to, if it would."""
    device = states.device.type
    is_cast = torch.is_autocast_enabled(device) and states.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else None


def _log_sum_sq(probs: Tensor) -> Tensor:
    return 2 * torch.linalg.vector_norm(probs, dim=-1).log()


@final
class _Chunks:
    """Slices of the tokens, and the logits of one slice at a time, which what is made of them overwrites."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: _Plan) -> None:
        # Cast here and not by autocast, whose cache would keep a weight cast without a graph for later calls.
        dtype = plan.autocast_dtype
        self.states = states if dtype is None else states.to(dtype)
        self.weight = weight if dtype is None else weight.to(dtype)
        self.bias = bias if dtype is None or bias is None else bias.to(dtype)
        self.target = target
        self.transform = plan.transform
        num_chunks = math.ceil(len(states) / plan.chunk_tokens)
        self.size = math.ceil(len(states) / max(1, num_chunks))  # alike: none is small, and a buffer fits all
        self.slices = [slice(i, min(i + self.size, len(states))) for i in range(0, len(states), max(1, self.size))]
        self.wide_dtype = torch.promote_types(self.states.dtype, torch.float32)
        block_logits = _CPU_BLOCK_LOGITS if states.device.type == "cpu" else _BLOCK_LOGITS
        self.block = max(1, min(self.size, block_logits // len(weight)))

    @cached_property
    def buffer(self) -> Float[Tensor, "n V"]:
        """A chunk's logits, then its errors."""
        return self._empty(self.size)

    @cached_property
    def scratch(self) -> Float[Tensor, "b V"]:
        """A block's log-probs."""
        return self._empty(self.block)

    def _empty(self, num_tokens: int) -> Tensor:
        return torch.empty((num_tokens, len(self.weight)), dtype=self.wide_dtype, device=self.states.device)

    def logits(self, here: slice) -> Float[Tensor, "n V"]:
        """What the head gives for a chunk; overwritten by the next chunk's."""
        states, logits = self.states[here], self.buffer[: here.stop - here.start]
        if states.dtype != self.wide_dtype:
            logits.copy_(nn.functional.linear(states, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(states, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, states, self.weight.T, out=logits)
        return logits

    def columns(self, here: slice, made: Float[Tensor, "c n"] | None, *, with_errors: bool) -> Float[Tensor, "n V"]:
        """Writes a chunk's columns (one, or five with statistics) into `made`, if that is given; and returns its errors
        where these are wanted: minus the gradient of each token's log-prob by what the head gives for it."""
        chunk = self.logits(here)
        for rows in (slice(i, i + self.block) for i in range(0, len(chunk), self.block)):
            target = self.target[here][rows, None]
            logits = chunk[rows]
            self.transform.apply_(logits)
            log_probs = torch.log_softmax(logits, -1, out=self.scratch[: len(logits)])
            if made is not None:
                made[0, rows] = log_probs.gather(-1, target).squeeze(-1)
            if with_errors or (made is not None and len(made) > 1):
                self._finish(logits, log_probs, target, None if made is None else made[1:, rows])
        return chunk

    def _finish(self, logits: Tensor, log_probs: Tensor, target: Tensor, statistics: Tensor | None) -> None:
        """Writes the statistics of a block, if it has room for any, and overwrites its logits with its errors."""
        cap, scale = self.transform.cap, self.transform.scale
        slope = None if cap is None else 1 - (logits / cap).square_()  # of tanh, from its value
        if statistics is not None and len(statistics) > 0:
            # In half precision the largest logit is often there twice, and to look for the first takes a while.
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
    """The columns; and into `states_gradient` the gradient of each token's log-prob by its hidden state. Where it
    `keeps_last`, the errors of the last chunk are left in the buffer."""
    num_tokens = len(chunks.target)
    made = torch.empty((5 if with_statistics else 1, num_tokens), dtype=chunks.wide_dtype, device=chunks.target.device)
    for here in chunks.slices:
        is_kept = keeps_last and here.stop == num_tokens
        errors = chunks.columns(here, made[:, here], with_errors=is_kept or states_gradient is not None)
        if states_gradient is not None:
            torch.mm(errors.to(chunks.states.dtype), chunks.weight, out=states_gradient[here])
    if states_gradient is not None:
        states_gradient.neg_()
    return tuple(row.clone() for row in made)  # no views of each other


def _log_probs(
    states: Float[Tensor, "n h"],
    target: Int[Tensor, "n"],
    weight: Float[Tensor, "V h"],
    bias: Float[Tensor, "V"] | None,
    transform: LogitTransform,
) -> Float[Tensor, "n"]:
    """The log-probs alone, from a part of the vocabulary at a time: a CPU so reads the weights once for all tokens, and
    its caches hold what is made of a part."""
    parts = weight.split(_CPU_VOCABULARY)
    largest, total = states.new_empty(2, len(parts), len(states))
    of_target = states.new_full((len(states),), float("nan"))  # and so it stays for a token that there is not
    buffer = states.new_empty(len(states), len(parts[0]))
    for index, part in enumerate(parts):
        start = index * _CPU_VOCABULARY
        logits = buffer.view(-1)[: len(states) * len(part)].view(len(states), len(part))
        if bias is None:
            torch.mm(states, part.T, out=logits)
        else:
            torch.addmm(bias[start : start + len(part)], states, part.T, out=logits)
        transform.apply_(logits)
        place = (target - start).clamp(0, len(part) - 1)
        found = logits.gather(-1, place[:, None]).squeeze(-1)
        of_target = torch.where(place == target - start, found, of_target)
        top = torch.amax(logits, -1, out=largest[index]).clamp_min_(torch.finfo(logits.dtype).min)  # not -inf + inf
        torch.sum(logits.sub_(top[:, None]).exp_(), -1, out=total[index])
    return of_target - total.log_().add_(largest).logsumexp(0)


def _add_product(
    total: Float[Tensor, "V h"], gradient: Float[Tensor, "n V"], states: Float[Tensor, "n h"], *, is_first: bool
) -> None:
    """Adds `gradient.T @ states` to `total`, which is of fp32 or wider and has no values yet where that `is_first`."""
    if gradient.dtype == total.dtype:
        torch.mm(gradient.T, states, out=total) if is_first else total.addmm_(gradient.T, states)
        return
    if is_first:
        total.zero_()
    num_rows = max(1, _PRODUCT // max(1, total.shape[1]))
    for part, columns in zip(total.split(num_rows), gradient.split(num_rows, dim=1), strict=True):
        part.add_(columns.T @ states)


@final
class _LinearColumns(torch.autograd.Function):
    """`linear_columns` with gradients."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: _Plan
    ) -> tuple[Tensor, ...]:
        """See `torch.autograd.Function`."""
        with torch.autocast(states.device.type, enabled=False):
            chunks = _Chunks(states, weight, bias, target, plan)
            needs_states, *needs_head = ctx.needs_input_grad[:3]
            ctx.is_formed = needs_states and not any(needs_head)
            formed = torch.empty_like(chunks.states) if ctx.is_formed else None
            columns = _forward(chunks, plan.with_statistics, formed, keeps_last=any(needs_head))
        ctx.plan = plan
        ctx.dtypes = tuple(None if leaf is None else leaf.dtype for leaf in (states, weight, bias))
        if ctx.is_formed:
            ctx.save_for_backward(formed)
        else:
            last = chunks.slices[-1] if chunks.slices else slice(0, 0)
            ctx.save_for_backward(states, weight, bias, target, chunks.buffer[: last.stop - last.start])
        ctx.mark_non_differentiable(*columns[1:])
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        if ctx.is_formed:
            (formed,) = ctx.saved_tensors
            return (formed * upstream[:, None]).to(ctx.dtypes[0]), None, None, None, None
        states, weight, bias, target, kept = ctx.saved_tensors  # once: checkpointing hands them out a single time
        with torch.autocast(upstream.device.type, enabled=False):
            chunks = _Chunks(states, weight, bias, target, ctx.plan)
            return *_gradients(ctx, chunks, upstream, kept), None, None


def _gradients(ctx: Any, chunks: _Chunks, upstream: Tensor, kept: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of hidden states, weight and bias that are needed; from the errors of the last chunk, which are
    `kept`, and from those of the others, made again."""
    needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    for_states = torch.empty_like(chunks.states) if needs_states else None
    wide = {"dtype": chunks.wide_dtype, "device": upstream.device}
    # Not zeros: to write a tensor of that size is a good part of a small product.
    for_weight = torch.empty(chunks.weight.shape, **wide) if needs_weight else None
    if for_weight is not None and not chunks.slices:
        for_weight.zero_()
    for_bias = torch.zeros(len(chunks.weight), **wide) if needs_bias else None
    for here in reversed(chunks.slices):
        is_last = here is chunks.slices[-1]
        errors = kept if is_last else chunks.columns(here, None, with_errors=True)
        states, scale = chunks.states[here], -upstream[here, None]
        if errors.dtype == states.dtype:
            scaled = states * scale  # the narrow side
        else:  # what is scaled first cannot overflow in half precision
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
    found = zip((for_states, for_weight, for_bias), ctx.dtypes, strict=True)
    return tuple(None if gradient is None else gradient.to(dtype) for gradient, dtype in found)
