"""From hidden states to log-probs: the head, its softmax and both gradients, a chunk of tokens at a time.

`linear_columns` is one differentiable operation for a plain linear head. Where the head is frozen, the gradient of the
hidden states is made in the forward pass, while a chunk's probabilities are at hand: a loss reaches them through one
number per token, so d logp_n / d h_n = W[y_n] - sum_v p_n(v) W[v] is kept (`[N h]`), and the backward pass scales its
rows. A trained head's gradient mixes the tokens, so a chunk's logits are made again in the backward pass, once; only
where one chunk is all there is, its probabilities are kept until then. No tensor of `[N V]` beyond a chunk is alive in
either, and two buffers of a chunk serve all chunks.

Given up: gradients of gradients (they raise), and one matrix product of a trained head against keeping all logits.
"""

from typing import Any, NamedTuple, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

_PRODUCT = 2**24
"""Elements of the weight's gradient that are alive in half precision before they are added up in fp32."""

_CACHED_LOGITS = 2**21
_CACHED_TOKENS = 64
"""Logits of a chunk on a CPU, 8 MiB in fp32, and tokens that it has at least."""

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
    log_normalizer = logits.logsumexp(-1)  # [n]
    logps = logits.gather(-1, target[:, None]).squeeze(-1) - log_normalizer
    if not with_statistics:
        return (logps,)
    with torch.no_grad():
        probs, top1 = torch.softmax(logits, -1), logits.argmax(-1)
        return logps, *_statistics(logits.detach(), probs, log_normalizer.detach(), top1 == target)


def linear_columns(
    states: Float[Tensor, "N h"],
    weight: Float[Tensor, "V h"],
    bias: Float[Tensor, "V"] | None,
    target: Int[Tensor, "N"],
    transform: LogitTransform,
    *,
    chunk_tokens: int,
    with_statistics: bool = False,
) -> tuple[Tensor, ...]:
    """`token_columns` of `transform(states @ weight.T + bias)`, in fp32 (fp64 from fp64), `chunk_tokens` at a time.

    The matrix products are taken in the autocast dtype where autocast is on, the softmax never. Gradients reach
    `states`, `weight` and `bias` where these require them; the weight's is added up in fp32. A gradient of a gradient
    raises RuntimeError.
    """
    plan = _Plan(transform, chunk_tokens, with_statistics, _autocast_dtype(states))
    if torch.is_grad_enabled():
        return cast(tuple[Tensor, ...], _LinearColumns.apply(states, weight, bias, target, plan))
    if states.device.type == "cpu":  # nothing is summed up over chunks, so those that caches hold are fastest
        plan = plan._replace(chunk_tokens=min(chunk_tokens, max(_CACHED_LOGITS // len(weight), _CACHED_TOKENS)))
    with torch.autocast(states.device.type, enabled=False):
        return _forward(_Chunks(states, weight, bias, target, plan), with_statistics, is_frozen=True)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether `head` is an `nn.Linear` and nothing else: no adapter, hook, replaced forward, or quantised weight."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    # Quantised and distributed weights are subclasses of Tensor with products of their own.
    return not any(hooks) and type(head.weight) in (nn.Parameter, Tensor) and head.weight.dtype in _WEIGHT_DTYPES


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


def _statistics(logits: Tensor, probs: Tensor, log_normalizer: Tensor, is_top1: Tensor) -> tuple[Tensor, ...]:
    """What `token_columns` adds to the log-probs, from the softmax that is at hand anyway."""
    entropy = log_normalizer - torch.linalg.vecdot(probs, logits)
    log_sum_sq_probs = 2 * torch.linalg.vector_norm(probs, dim=-1).log()
    return entropy, logits.mean(-1), is_top1.to(logits.dtype), log_sum_sq_probs


@final
class _Chunks:
    """Logits and probabilities of a chunk, in two buffers that all chunks share."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: _Plan) -> None:
        # Cast here and not by autocast, whose cache would keep a weight cast without a graph for later calls.
        dtype = plan.autocast_dtype
        self.states = states if dtype is None else states.to(dtype)
        self.weight = weight if dtype is None else weight.to(dtype)
        self.bias = bias if dtype is None or bias is None else bias.to(dtype)
        self.target = target
        self.transform = plan.transform
        size = min(plan.chunk_tokens, len(states))
        self.slices = [slice(i, min(i + size, len(states))) for i in range(0, len(states), max(size, 1))]
        self.wide_dtype = torch.promote_types(self.states.dtype, torch.float32)
        self.logits, self.probs = (
            torch.empty((size, len(weight)), dtype=self.wide_dtype, device=states.device) for _ in range(2)
        )

    def log_softmax(self, here: slice) -> tuple[Tensor, Tensor]:
        """Final logits and log-probabilities of a chunk, both [n V]; overwritten by the next chunk's."""
        states = self.states[here]
        logits, log_probs = self.made(here)
        if states.dtype == self.wide_dtype:
            if self.bias is None:
                torch.mm(states, self.weight.T, out=logits)
            else:
                torch.addmm(self.bias, states, self.weight.T, out=logits)
        else:
            logits.copy_(nn.functional.linear(states, self.weight, self.bias))
        self.transform.apply_(logits)
        torch.log_softmax(logits, -1, out=log_probs)
        return logits, log_probs

    def made(self, here: slice) -> tuple[Tensor, Tensor]:
        """The buffers, which hold what came last."""
        num_tokens = here.stop - here.start
        return self.logits[:num_tokens], self.probs[:num_tokens]

    def kept(self) -> "_Chunks | None":
        """Itself, to be used once more, if it has but one chunk; less what `logit_gradient` does not read."""
        if self.transform.cap is None:
            self.logits = self.logits.new_empty((0, len(self.weight)))
        return self if len(self.slices) == 1 else None

    def logit_gradient(self, here: slice, logits: Tensor, probs: Tensor, scale: Tensor | None) -> Tensor:
        """`scale` (one per token, or 1) times the gradient of the log-probs by what the head gives, over `probs`."""
        ones = probs.new_ones(len(probs)) if scale is None else scale
        if scale is None:
            probs.neg_()
        else:
            probs.mul_(-scale[:, None])
        probs.scatter_add_(-1, self.target[here, None], ones[:, None])
        if self.transform.cap is not None:  # the slope of tanh, from its value
            probs.addcmul_(probs, logits.square_(), value=-1 / self.transform.cap**2)
        if self.transform.scale != 1.0:
            probs.mul_(self.transform.scale)
        return probs.to(self.states.dtype)


def _forward(
    chunks: _Chunks, with_statistics: bool, states_gradient: Tensor | None = None, *, is_frozen: bool = False
) -> tuple[Tensor, ...]:
    """The columns; and into `states_gradient` the gradient of each token's log-prob by its hidden state. Unless all
    `is_frozen`, a chunk's probabilities are left in its buffer."""
    target = chunks.target
    made = torch.empty((5 if with_statistics else 1, len(target)), dtype=chunks.wide_dtype, device=target.device)
    for here in chunks.slices:
        logits, log_probs = chunks.log_softmax(here)
        made[0, here] = log_probs.gather(-1, target[here, None]).squeeze(-1)
        if is_frozen and not with_statistics:
            continue
        probs = log_probs.exp_()
        if with_statistics:
            of_target = logits.gather(-1, target[here, None]).squeeze(-1)
            # In half precision the largest logit is often there twice, and to look for the first takes a while.
            is_exact = chunks.states.dtype == chunks.wide_dtype
            is_top1 = of_target == logits.amax(-1) if is_exact else logits.argmax(-1) == target[here]
            columns = _statistics(logits, probs, of_target - made[0, here], is_top1)
            for row, column in zip(made[1:], columns, strict=True):
                row[here] = column
        if states_gradient is not None:
            torch.mm(chunks.logit_gradient(here, logits, probs, None), chunks.weight, out=states_gradient[here])
    return tuple(row.clone() for row in made)  # no views of each other


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
            columns = _forward(chunks, plan.with_statistics, formed)
        ctx.plan = plan
        ctx.kept = chunks.kept() if any(needs_head) else None
        ctx.dtypes = tuple(None if leaf is None else leaf.dtype for leaf in (states, weight, bias))
        if ctx.is_formed:
            ctx.save_for_backward(formed)
        else:
            ctx.save_for_backward(states, weight, bias, target)
        ctx.mark_non_differentiable(*columns[1:])
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        if ctx.is_formed:
            (formed,) = ctx.saved_tensors
            return (formed * upstream[:, None]).to(ctx.dtypes[0]), None, None, None, None
        states, weight, bias, target = ctx.saved_tensors  # once: checkpointing hands them out a single time
        chunks, ctx.kept = ctx.kept, None  # a second backward pass finds them overwritten, and makes them again
        with torch.autocast(states.device.type, enabled=False):
            is_made = chunks is not None
            chunks = chunks or _Chunks(states, weight, bias, target, ctx.plan)
            return *_gradients(ctx, chunks, upstream, is_made=is_made), None, None


def _gradients(ctx: Any, chunks: _Chunks, upstream: Tensor, *, is_made: bool) -> tuple[Tensor | None, ...]:
    """The gradients of hidden states, weight and bias that are needed, from logits made again unless they are there."""
    needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    for_states = torch.empty_like(chunks.states) if needs_states else None
    wide = {"dtype": chunks.wide_dtype, "device": upstream.device}
    # Not zeros: to write a tensor of that size is a good part of a small product.
    for_weight = torch.empty(chunks.weight.shape, **wide) if needs_weight else None
    if for_weight is not None and not chunks.slices:
        for_weight.zero_()
    for_bias = torch.zeros(len(chunks.weight), **wide) if needs_bias else None
    for here in chunks.slices:
        logits, probs = chunks.made(here) if is_made else chunks.log_softmax(here)
        if not is_made:
            probs.exp_()
        gradient = chunks.logit_gradient(here, logits, probs, upstream[here])
        if for_states is not None:
            torch.mm(gradient, chunks.weight, out=for_states[here])
        if for_weight is not None:
            _add_product(for_weight, gradient, chunks.states[here], is_first=here.start == 0)
        if for_bias is not None:
            for_bias += gradient.sum(0, dtype=chunks.wide_dtype)
    found = zip((for_states, for_weight, for_bias), ctx.dtypes, strict=True)
    return tuple(None if gradient is None else gradient.to(dtype) for gradient, dtype in found)
