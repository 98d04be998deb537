"""Attention for rows that hold several sequences: each completion sees its prompt and itself, and nothing else.

transformers lets a model's configuration name its attention, so this one is registered under `NAME`, and the
configuration names it for the length of one forward pass. The `Segments` reach every attention layer as a keyword
argument. Activation checkpointing calls layers again in the backward pass, when the forward pass is over; those calls
name the attention again. How it is computed depends on the device and the model: `scoring.routes` has the ways.

Given up: models that are not on transformers' attention interface, carry state along the row (Mamba, convolutions) or
count distance in columns (ALiBi). `holdfast.data.layouts.choose` finds them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from holdfast.internals.torch import modules_of
from holdfast.internals.transformers import attention_of, recomputation, set_attention, set_recomputation
from holdfast.scoring.fused.body import Pieces, pieces_of, replaced
from holdfast.scoring.last_layer import narrowing
from holdfast.scoring.routes.base import AttentionCall
from holdfast.scoring.routes.choice import RowMask, attend, mask_of_rows
from holdfast.scoring.segments import SEGMENTS, Segments

NAME = "holdfast_shared"
"""The name by which transformers knows this attention."""


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
    few operations (`scoring.fused`). Without segments nothing changes. A model with FlashAttention keeps it where no
    prompt is shared, and gets the ends of the sequences, unless it needs the attention mask for something else
    (`needs_mask`). On leaving, the model is as it was, also when the forward pass failed.
    """
    inputs = dict(inputs)
    segments = inputs.get(SEGMENTS)
    if not isinstance(segments, Segments):
        yield inputs
        return
    fused = partial(replaced, pieces_of(causal_lm) if narrows else Pieces())
    device = inputs["input_ids"].device
    if segments.share_no_prompt and not needs_mask and "flash" in (attention_of(causal_lm.config) or ""):
        others = {name: value for name, value in inputs.items() if name not in (SEGMENTS, "attention_mask")}
        with fused(), _recomputing_under(fused, causal_lm):
            yield others | segments.flash_arguments(device)
        return
    inputs[SEGMENTS] = segments = segments.to(device)
    nothing: frozenset[nn.Module] = frozenset()
    narrow = narrowing(causal_lm, segments) if narrows else partial(contextlib.nullcontext, nothing)
    attention = partial(_segment_attention, configs_of(causal_lm), segments, fused, narrow)
    with attention(), _recomputing_under(attention, causal_lm):
        yield inputs


def configs_of(causal_lm: PreTrainedModel) -> list[PretrainedConfig]:
    """The configuration objects that the model's modules read, each once."""
    configs = (vars(module).get("config") for module in modules_of(causal_lm))
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())


@contextlib.contextmanager
def _segment_attention(
    configs: Sequence[PretrainedConfig],
    segments: Segments,
    fused: Callable[[], contextlib.AbstractContextManager[None]],
    narrowed: Callable[[], contextlib.AbstractContextManager[frozenset[nn.Module]]],
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
        with fused(), narrowed() as modules:
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
    recomputed: list[tuple[Any, Callable[..., Any]]] = []

    def wrapped(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            @wraps(function, assigned=())
            def layer(*args: Any, **kwargs: Any) -> Any:
                with context():
                    return function(*args, **kwargs)

            return checkpoint(layer, *args, **kwargs)

        return run

    try:
        modules: list[Any] = list(modules_of(causal_lm))
        for module in modules:
            checkpoint = recomputation(module)
            if checkpoint is not None:
                recomputed.append((module, checkpoint))
                set_recomputation(module, wrapped(checkpoint))
        yield
    finally:
        for module, checkpoint in recomputed:
            set_recomputation(module, checkpoint)


# --- what transformers calls ------------------------------------------------------------------------------------------


def shared_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Tensor | RowMask:
    """What transformers passes to attention layers in place of a [T T] mask; see `routes.choice.mask_of_rows`."""
    segments = _ACTIVE.get()
    if segments is None:
        raise ValueError(
            f"the attention {NAME!r} computes rows of shared prompts, and works inside `attending` only; found a "
            "forward pass outside of it. Leave `attn_implementation` as it was."
        )
    device = torch.device(device)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return mask_of_rows(segments, mask_function, device, dtype)


def shared_attention(
    module: nn.Module,
    query: Float[Tensor, "R H T d"],
    key: Float[Tensor, "R Hkv T d"],
    value: Float[Tensor, "R Hkv T dv"],
    attention_mask: Tensor | RowMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "R T H dv"], None]:
    """softmax(scaling q k^T) v over the tokens that each token sees, by the route that `routes.choice` takes.

    `softcap` bounds the scores by cap * tanh(score / cap) (Gemma 2), `s_aux` [H] are sinks that take a share of the
    softmax (gpt-oss). ValueError where the segments do not describe the queries and keys.
    """
    segments, mask = _checked_call(module, query, key, kwargs.get(SEGMENTS), attention_mask, position_bias)
    call = AttentionCall(
        module=module,
        query=query,
        key=key,
        value=value,
        segments=segments,
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
        is_narrow=module in _NARROW.get(),
    )
    return attend(call, mask), None


def _checked_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    segments: Any,
    attention_mask: Tensor | RowMask | None,
    position_bias: Tensor | None,
) -> tuple[Segments, Tensor | RowMask]:
    """The segments and the mask. ValueError where the attention would be wrong: `data.layouts.choose` then takes
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
