"""Attention for rows that hold several sequences: each completion sees its prompt and itself, and nothing else.

Rows are attended span by span, as `scoring.segments` takes them apart. transformers lets a model's configuration name
its attention, so this one is registered under `NAME`, and the configuration names it for the length of one forward
pass. The `Segments` reach every attention layer as a keyword argument. Activation checkpointing calls layers again in
the backward pass, when the forward pass is over; those calls name the attention again.

Given up: models that are not on transformers' attention interface, carry state along the row (Mamba, convolutions) or
count distance in columns (ALiBi). `holdfast.data.layouts.choose` finds them. On a GPU, many small products would wait
for each other; there `holdfast.scoring.flex` computes the same in one kernel per layer.
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
from holdfast.scoring.fused.body import Pieces, pieces_of, replaced
from holdfast.scoring.last_layer import narrowed
from holdfast.scoring.segments import SEGMENTS, Segments

NAME = "holdfast_shared"
"""The name by which transformers knows this attention."""

PLAIN_SCORES = 2**16
"""Most scores per head for which plain products are used on a CPU: up to here they are faster than its fused kernel."""


# --- for the length of a forward pass ---------------------------------------------------------------------------------

_ACTIVE: ContextVar[Segments | None] = ContextVar("holdfast_row_segments", default=None)
"""The segments of the batch whose forward pass runs."""
_NARROW: ContextVar[frozenset[nn.Module]] = ContextVar("holdfast_narrow_modules", default=frozenset())
"""Modules of the last layer. A prompt's outputs there are unread, except its last token's."""


@contextlib.contextmanager
def attending(
    causal_lm: PreTrainedModel, inputs: Mapping[str, Any], *, needs_mask: bool = False, narrows: bool = True
) -> Iterator[dict[str, Any]]:
    """The keyword arguments to call the model with. Inside, the model attends by the `Segments` among `inputs`.

    With `narrows`, its last layer computes only what is read of it (`scoring.last_layer`), and norms and rotations are
    few operations (`scoring.fused`). Without segments nothing changes. A model with FlashAttention keeps it where no prompt is shared, and gets the ends of the sequences, unless
    it needs the attention mask for something else (`needs_mask`). On leaving, the model is as it was, also when the
    forward pass failed.
    """
    inputs = dict(inputs)
    segments = inputs.get(SEGMENTS)
    if not isinstance(segments, Segments):
        yield inputs
        return
    fused = partial(replaced, pieces_of(causal_lm) if narrows else Pieces())
    if segments.share_no_prompt and not needs_mask and "flash" in (attention_of(causal_lm.config) or ""):
        others = {name: value for name, value in inputs.items() if name not in (SEGMENTS, "attention_mask")}
        with fused(), _recomputing_under(fused, causal_lm):
            yield others | segments.flash_arguments(inputs["input_ids"].device)
        return
    attention = partial(_segment_attention, causal_lm, configs_of(causal_lm), segments, fused, narrows=narrows)
    with attention(), _recomputing_under(attention, causal_lm):
        yield inputs


def configs_of(causal_lm: PreTrainedModel) -> list[PretrainedConfig]:
    """The configuration objects that the model's modules read, each once."""
    configs = (module.__dict__.get("config") for module in causal_lm.modules())
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())


@contextlib.contextmanager
def _segment_attention(
    causal_lm: PreTrainedModel,
    configs: Sequence[PretrainedConfig],
    segments: Segments,
    fused: Callable[[], contextlib.AbstractContextManager[None]],
    *,
    narrows: bool,
) -> Iterator[None]:
    """Inside, the configurations name this attention, `segments` are active, and the model's body is `fused`; nothing
    changes if they are active."""
    if _ACTIVE.get() is segments:
        yield
        return
    before = [attention_of(config) for config in configs]
    token = _ACTIVE.set(segments)
    try:
        for config in configs:
            set_attention(config, NAME)
        with fused(), narrowed(causal_lm, segments) if narrows else contextlib.nullcontext(frozenset()) as modules:
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
def _recomputing_under(
    context: Callable[[], contextlib.AbstractContextManager[None]], causal_lm: PreTrainedModel
) -> Iterator[None]:
    """Inside, layers are checkpointed together with a context that they run under.

    Activation checkpointing runs a layer again after this context has ended; that run enters its own `context()`.
    """
    replaced: list[tuple[Any, Callable[..., Any]]] = []

    def wrapped(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            @wraps(function, assigned=())
            def layer(*args: Any, **kwargs: Any) -> Any:
                with context():
                    return function(*args, **kwargs)

            return checkpoint(layer, *args, **kwargs)

        return run

    try:
        modules: Iterator[Any] = causal_lm.modules()
        for module in modules:
            checkpoint = recomputation(module)
            if checkpoint is not None:
                replaced.append((module, checkpoint))
                set_recomputation(module, wrapped(checkpoint))
        yield
    finally:
        for module, checkpoint in replaced:
            set_recomputation(module, checkpoint)


# --- what transformers calls ------------------------------------------------------------------------------------------


def shared_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Float[Tensor, "M"] | BlockMask:
    """What transformers passes to attention layers in place of a [T T] mask: 0 or -inf for each value of
    `Segments.masks`, or a block mask where flex attention works.

    No other attention accepts the first, since its shape is [M].
    """
    segments = _ACTIVE.get()
    if segments is None:
        raise ValueError(
            f"the attention {NAME!r} computes rows of shared prompts, and works inside `attending` only; found a "
            "forward pass outside of it. Leave `attn_implementation` as it was."
        )
    device = torch.device(device)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if flex.is_usable(device, dtype):
        rows = [[(s.prompt, [*chain.from_iterable(s.groups)]) for s in row] for row in segments.rows]
        return flex.block_mask(rows, segments.num_columns, mask_function, device)
    seen = segments.masks(mask_function, device)
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
    """softmax(scaling q k^T) v over the tokens that each token sees, span by span, or at once under a block mask.

    `softcap` bounds the scores by cap * tanh(score / cap) (Gemma 2), `s_aux` [H] are sinks that take a share of the
    softmax (gpt-oss). Padding gets zeros. ValueError where the segments do not describe the queries and keys.
    """
    segments, masks = _checked_call(module, query, key, kwargs.get(SEGMENTS), attention_mask, position_bias)
    if isinstance(masks, BlockMask):
        output = flex.flex_attention(
            module, query, key, value, masks, scaling=scaling, dropout=dropout, softcap=softcap, s_aux=s_aux
        )
        return output, None
    attend: Callable[..., Tensor] = partial(_attend, dropout=dropout, scaling=scaling, softcap=softcap, sinks=s_aux)
    prompt_masks, group_masks = segments.split_masks(masks)
    is_narrow = module in _NARROW.get()
    outputs: list[Tensor] = []
    for row, states in enumerate(zip(query.unbind(0), key.unbind(0), value.unbind(0), strict=True)):
        # Split once: the gradient of a slice would be a whole row, zero but for the span.
        spans = iter(zip(*(state.split(segments.span_lengths(row), dim=1) for state in states), strict=True))
        for segment in segments.rows[row]:
            if segment.is_joined:
                own_query, own_key, own_value = next(spans)
                outputs.append(attend(own_query, own_key, own_value, next(group_masks)))
                continue
            prompt_query, prompt_key, prompt_value = next(spans)
            prompt_mask = next(prompt_masks)
            if segment.prompt > 0 and is_narrow and segment.groups:
                outputs.append(prompt_query.new_zeros(segment.prompt - 1, query.shape[1], value.shape[-1]))
                last = prompt_query.new_zeros(1, segment.prompt) if prompt_mask is None else prompt_mask[-1:]
                outputs.append(attend(prompt_query[:, -1:], prompt_key, prompt_value, last))
            elif segment.prompt > 0:
                outputs.append(attend(prompt_query, prompt_key, prompt_value, prompt_mask))
            for _ in segment.groups:
                own_query, own_key, own_value = next(spans)
                seen_key, seen_value = torch.cat([prompt_key, own_key], 1), torch.cat([prompt_value, own_value], 1)
                outputs.append(attend(own_query, seen_key, seen_value, next(group_masks)))
        padding = next(spans)[0]
        outputs.append(padding.new_zeros(padding.shape[1], padding.shape[0], value.shape[-1]))
    num_rows, num_heads, num_columns, _ = query.shape
    return torch.cat(outputs).view(num_rows, num_columns, num_heads, value.shape[-1]), None


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
    """The attention of one span. `bias` is added to its scores; None means causal. Every token sees itself at least."""
    bias = bias if bias is None else bias.to(query.dtype)
    num_scores = query.shape[1] * key.shape[1]
    is_small = num_scores <= PLAIN_SCORES and query.device.type == "cpu" and query.dtype.itemsize >= 4
    if softcap is None and sinks is None and not is_small:
        output = scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=bias,
            dropout_p=dropout,
            is_causal=bias is None,
            scale=scaling,
            enable_gqa=query.shape[0] != key.shape[0],
        )[0]
        return output.transpose(0, 1)
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
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[1]]
    return (drop(shares, p=dropout) @ value).transpose(0, 1)


def _checked_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    segments: Any,
    attention_mask: Tensor | BlockMask | None,
    position_bias: Tensor | None,
) -> tuple[Segments, Tensor | BlockMask]:
    """The segments and the masks. ValueError where the attention would be wrong: `data.layouts.choose` then takes
    padded rows."""
    name = type(module).__name__
    if not isinstance(segments, Segments) or attention_mask is None:
        raise ValueError(
            f"{name} was called for rows of shared prompts, but the segments of the rows did not reach it; "
            f"found {SEGMENTS}={segments!r}. Use the padded layout for this model."
        )
    if position_bias is not None or query.shape[2] != segments.num_columns or key.shape[2] != segments.num_columns:
        raise ValueError(
            f"{name} attends rows of shared prompts of {segments.num_columns} tokens; found {query.shape[2]} queries, "
            f"{key.shape[2]} keys{' and a bias by position' if position_bias is not None else ''}. Use the padded "
            "layout with virtual tokens, caches and position biases."
        )
    return segments, attention_mask


# Not compiled: to the compiler a function with other segments is another function.
AttentionInterface.register(NAME, torch.compiler.disable(shared_attention))
AttentionMaskInterface.register(NAME, torch.compiler.disable(shared_mask))
