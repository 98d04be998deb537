"""Attention for rows that hold several completions of a prompt: each completion sees the prompt and itself, no more.

Rows are attended piece by piece, as `scoring.segments` takes them apart. That reaches the model through transformers'
attention interface: for the length of one forward pass the model's configuration names it, and the pieces travel as a
keyword argument to every attention layer. Layers that activation checkpointing computes again in the backward pass find
it again.

Given up: models that are not on the attention interface, carry state along the row (Mamba, convolutions) or count
distance in columns (ALiBi); `holdfast.data.layouts.choose` finds them. On a GPU so many small products wait for
each other; there `holdfast.scoring.flex` does the same in one kernel a layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from holdfast.internals.transformers import attention_of, recomputation, set_attention, set_recomputation
from holdfast.scoring import flex
from holdfast.scoring.last_layer import narrowed
from holdfast.scoring.segments import PIECES, Pieces

NAME = "holdfast_shared"
"""Under which transformers knows this attention."""

PLAIN_SCORES = 2**16
"""Up to so many scores per head plain products are faster on a CPU than its fused kernel, and take little memory."""


# --- for the length of a forward pass ---------------------------------------------------------------------------------

_ACTIVE: ContextVar[Pieces | None] = ContextVar("holdfast_shared_pieces", default=None)
_NARROW: ContextVar[frozenset[nn.Module]] = ContextVar("holdfast_narrow_modules", default=frozenset())
"""Those in which nobody reads what a prompt gathers, but for its last token."""


@contextlib.contextmanager
def attending(
    causal_lm: PreTrainedModel, inputs: Mapping[str, Any], *, needs_mask: bool = False, narrows: bool = True
) -> Iterator[dict[str, Any]]:
    """The keyword arguments to call the model with; inside, its attention is that of the pieces among `inputs`, and
    `narrows` its last layer to what is read of it.

    Without pieces nothing changes. FlashAttention, where the model has it, attends sequences that share no prompt by
    itself, unless the model `needs_mask`s for something else: it would take them for padding. On leaving, the model is
    as it was, also when the forward pass failed.
    """
    inputs = dict(inputs)
    pieces = inputs.get(PIECES)
    if not isinstance(pieces, Pieces):
        yield inputs
        return
    if pieces.are_whole and not needs_mask and "flash" in (attention_of(causal_lm.config) or ""):
        kept = {name: value for name, value in inputs.items() if name not in (PIECES, "attention_mask")}
        yield kept | pieces.varlen(inputs["input_ids"].device)
        return
    switched = partial(_switched, causal_lm, configs_of(causal_lm), pieces, narrows=narrows)
    with switched(), _kept_in_recomputation(causal_lm, switched):
        yield inputs


def configs_of(causal_lm: PreTrainedModel) -> list[PretrainedConfig]:
    """The configuration objects that the model's modules read, each once."""
    found = (module.__dict__.get("config") for module in causal_lm.modules())
    return list({id(config): config for config in found if isinstance(config, PretrainedConfig)}.values())


@contextlib.contextmanager
def _switched(
    causal_lm: PreTrainedModel, configs: Sequence[PretrainedConfig], pieces: Pieces, *, narrows: bool
) -> Iterator[None]:
    if _ACTIVE.get() is pieces:
        yield
        return
    before = [attention_of(config) for config in configs]
    token = _ACTIVE.set(pieces)
    try:
        for config in configs:
            set_attention(config, NAME)
        with narrowed(causal_lm, pieces) if narrows else contextlib.nullcontext(frozenset()) as modules:
            narrow = _NARROW.set(modules)
            try:
                yield
            finally:
                _NARROW.reset(narrow)
    finally:
        for config, implementation in zip(configs, before, strict=True):
            set_attention(config, implementation)
        _ACTIVE.reset(token)


@contextlib.contextmanager
def _kept_in_recomputation(
    causal_lm: PreTrainedModel, switched: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[None]:
    """Activation checkpointing runs layers again after the forward pass is left: those runs switch for themselves."""
    patched: list[tuple[Any, Callable[..., Any]]] = []

    def wrapped(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            @wraps(function, assigned=())
            def layer(*args: Any, **kwargs: Any) -> Any:
                with switched():
                    return function(*args, **kwargs)

            return checkpoint(layer, *args, **kwargs)

        return run

    try:
        modules: Iterator[Any] = causal_lm.modules()
        for module in modules:
            checkpoint = recomputation(module)
            if checkpoint is not None:
                patched.append((module, checkpoint))
                set_recomputation(module, wrapped(checkpoint))
        yield
    finally:
        for module, checkpoint in patched:
            set_recomputation(module, checkpoint)


# --- what transformers calls ------------------------------------------------------------------------------------------


def shared_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Float[Tensor, "M"] | BlockMask:
    """What is added to the scores, 0 or -inf by `Pieces.masks`, where transformers would make a [T T] mask; or a block
    mask where flex attention works. No other attention can use the first: its shape is wrong."""
    pieces = _ACTIVE.get()
    if pieces is None:
        raise ValueError(
            f"the attention {NAME!r} computes rows of shared prompts, and works inside `attending` only; found a "
            "forward pass outside of it. Leave `attn_implementation` as it was."
        )
    device = torch.device(device)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if flex.is_usable(device, dtype):
        rows = [[(s.prompt, [*chain.from_iterable(s.groups)]) for s in row] for row in pieces.rows]
        return flex.block_mask(rows, pieces.num_columns, mask_function, device)
    seen = pieces.masks(mask_function, device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def shared_attention(
    module: nn.Module,
    query: Float[Tensor, "R H T d"],
    key: Float[Tensor, "R Hkv T d"],
    value: Float[Tensor, "R Hkv T dv"],
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "R T H dv"], None]:
    """What each token gathers from the tokens that it sees: softmax(scaling q k^T) v, piece by piece, or at once under
    a block mask.

    `softcap` bounds the scores by cap * tanh(score / cap) (Gemma 2), `s_aux` [H] are sinks that take a share of the
    softmax (gpt-oss). Padding gets zeros. Raises ValueError where the pieces do not describe what there is to attend.
    """
    pieces, masks = _checked_call(module, query, key, kwargs.get(PIECES), attention_mask, position_bias)
    if isinstance(masks, BlockMask):
        options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        return flex.flex_attention(module, query, key, value, masks, dropout=dropout, **options), None
    attend: Callable[..., Tensor] = partial(_attend, dropout=dropout, scaling=scaling, softcap=softcap, sinks=s_aux)
    prompt_masks, group_masks = pieces.split(masks)
    is_narrow = module in _NARROW.get()
    gathered: list[Tensor] = []
    for row, states in enumerate(zip(query.unbind(0), key.unbind(0), value.unbind(0), strict=True)):
        # Split once, because each slice's own gradient would be a row of zeros with a piece in it.
        parts = iter(zip(*(state.split(pieces.lengths(row), dim=1) for state in states), strict=True))
        for segment in pieces.rows[row]:
            if segment.is_joined:
                own_query, own_key, own_value = next(parts)
                gathered.append(attend(own_query, own_key, own_value, next(group_masks)))
                continue
            prompt_query, prompt_key, prompt_value = next(parts)
            prompt_mask = next(prompt_masks)
            if segment.prompt > 0 and is_narrow and segment.groups:
                gathered.append(prompt_query.new_zeros(segment.prompt - 1, query.shape[1], value.shape[-1]))
                last = prompt_query.new_zeros(1, segment.prompt) if prompt_mask is None else prompt_mask[-1:]
                gathered.append(attend(prompt_query[:, -1:], prompt_key, prompt_value, last))
            elif segment.prompt > 0:
                gathered.append(attend(prompt_query, prompt_key, prompt_value, prompt_mask))
            for _ in segment.groups:
                own_query, own_key, own_value = next(parts)
                seen_key, seen_value = torch.cat([prompt_key, own_key], 1), torch.cat([prompt_value, own_value], 1)
                gathered.append(attend(own_query, seen_key, seen_value, next(group_masks)))
        padding = next(parts)[0]
        gathered.append(padding.new_zeros(padding.shape[1], padding.shape[0], value.shape[-1]))
    num_rows, num_heads, num_columns, _ = query.shape
    return torch.cat(gathered).view(num_rows, num_columns, num_heads, value.shape[-1]), None


def _attend(
    query: Float[Tensor, "H q d"],
    key: Float[Tensor, "Hkv k d"],
    value: Float[Tensor, "Hkv k dv"],
    bias: Float[Tensor, "q k"] | None,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Float[Tensor, "q H dv"]:
    """One piece; `bias` is added to its scores, and None is causal. Nobody sees nothing: a token sees itself."""
    bias = bias if bias is None else bias.to(query.dtype)
    num_scores = query.shape[1] * key.shape[1]
    is_small = num_scores <= PLAIN_SCORES and query.device.type == "cpu" and query.dtype.itemsize >= 4
    if softcap is None and sinks is None and not is_small:
        gathered = scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=bias,
            dropout_p=dropout,
            is_causal=bias is None,
            scale=scaling,
            enable_gqa=query.shape[0] != key.shape[0],
        )[0]
        return gathered.transpose(0, 1)
    num_groups = query.shape[0] // key.shape[0]
    if num_groups > 1:
        key, value = key.repeat_interleave(num_groups, 0), value.repeat_interleave(num_groups, 0)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if bias is None:
        bias = query.new_full((query.shape[1], key.shape[1]), float("-inf")).triu_(1)
    if softcap is None:
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)  # [H q k]
    else:
        scores = softcap * torch.tanh(query @ key.transpose(1, 2) * (scale / softcap)) + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[1]]
    return (drop(weights, p=dropout) @ value).transpose(0, 1)


def _checked_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    pieces: Any,
    attention_mask: Tensor | BlockMask | None,
    position_bias: Tensor | None,
) -> tuple[Pieces, Tensor | BlockMask]:
    """Pieces and masks; ValueError for what would be silently wrong, which `data.layouts.choose` makes a fall-back."""
    name = type(module).__name__
    if not isinstance(pieces, Pieces) or attention_mask is None:
        raise ValueError(
            f"{name} was called for rows of shared prompts, but the pieces of the rows did not reach it; found "
            f"{PIECES}={pieces!r}. Use the padded layout for this model."
        )
    if position_bias is not None or query.shape[2] != pieces.num_columns or key.shape[2] != pieces.num_columns:
        raise ValueError(
            f"{name} attends rows of shared prompts of {pieces.num_columns} tokens; found {query.shape[2]} queries, "
            f"{key.shape[2]} keys{' and a bias by position' if position_bias is not None else ''}. Use the padded "
            "layout with virtual tokens, caches and position biases."
        )
    return pieces, attention_mask


# Not compiled: to the compiler other pieces would be another function.
AttentionInterface.register(NAME, torch.compiler.disable(shared_attention))
AttentionMaskInterface.register(NAME, torch.compiler.disable(shared_mask))
