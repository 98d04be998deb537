"""The route `pieces`: span by span, as `scoring.segments` takes rows apart. The route of CPUs, and of all that no other
route can do.

A product per span costs no more scores than are needed. Given up: few launches. On a GPU many small products would wait
for each other.
"""

from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from holdfast.scoring.routes.base import AttentionCall, Needs, Route, Visible
from holdfast.scoring.segments import Segments

PLAIN_SCORES = 2**16
"""Most scores per head for which plain products are used on a CPU: up to here they are faster than its fused kernel."""


@final
class PiecesRoute(Route):
    """Attention span by span, on any device, in any dtype."""

    name: ClassVar[str] = "pieces"

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.runs_on`."""
        return True

    def works_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.works_on`."""
        return True

    def problem(self, needs: Needs, visible: Visible) -> str | None:
        """See `Route.problem`."""
        return None

    def prepared(
        self, segments: Segments, visible: Visible, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "M"]:
        """0 or -inf for each value of `Segments.masks`. No other attention accepts it, since its shape is [M]."""
        seen = segments.masks(visible, device)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))

    def attend(self, call: AttentionCall, prepared: Tensor) -> Tensor:
        """See `Route.attend`; padding gets zeros."""
        query, value, segments = call.query, call.value, call.segments
        prompt_masks, group_masks = segments.split_masks(prepared)
        outputs: list[Tensor] = []
        for row, states in enumerate(zip(query.unbind(0), call.key.unbind(0), value.unbind(0), strict=True)):
            # Split once: the gradient of a slice would be a whole row, zero but for the span.
            spans = iter(zip(*(state.split(segments.span_lengths(row), dim=1) for state in states), strict=True))
            for segment in segments.rows[row]:
                if segment.is_joined:
                    own_query, own_key, own_value = next(spans)
                    outputs.append(_attend(call, own_query, own_key, own_value, next(group_masks)))
                    continue
                prompt_query, prompt_key, prompt_value = next(spans)
                prompt_mask = next(prompt_masks)
                if segment.prompt > 0 and call.is_narrow and segment.groups:
                    outputs.append(prompt_query.new_zeros(segment.prompt - 1, query.shape[1], value.shape[-1]))
                    last = prompt_query.new_zeros(1, segment.prompt) if prompt_mask is None else prompt_mask[-1:]
                    outputs.append(_attend(call, prompt_query[:, -1:], prompt_key, prompt_value, last))
                elif segment.prompt > 0:
                    outputs.append(_attend(call, prompt_query, prompt_key, prompt_value, prompt_mask))
                for _ in segment.groups:
                    own_query, own_key, own_value = next(spans)
                    seen_key, seen_value = torch.cat([prompt_key, own_key], 1), torch.cat([prompt_value, own_value], 1)
                    outputs.append(_attend(call, own_query, seen_key, seen_value, next(group_masks)))
            padding = next(spans)[0]
            outputs.append(padding.new_zeros(padding.shape[1], padding.shape[0], value.shape[-1]))
        num_rows, num_heads, num_columns, _ = query.shape
        return torch.cat(outputs).view(num_rows, num_columns, num_heads, value.shape[-1])


def _attend(
    call: AttentionCall,
    query: Float[Tensor, "H q d"],
    key: Float[Tensor, "Hkv k d"],
    value: Float[Tensor, "Hkv k dv"],
    bias: Float[Tensor, "q k"] | None,
) -> Float[Tensor, "q H dv"]:
    """The attention of one span, as `call` has it. `bias` is added to its scores; None means causal. Every token sees
    itself at least."""
    bias = bias if bias is None else bias.to(query.dtype)
    num_scores = query.shape[1] * key.shape[1]
    is_small = num_scores <= PLAIN_SCORES and query.device.type == "cpu" and query.dtype.itemsize >= 4
    if call.softcap is None and call.sinks is None and not is_small:
        if query.device.type != "cpu" and bias is not None:
            # With a mask, the fast kernels of GPUs take no grouped heads, and the plain one would keep all scores.
            key, value = _for_each_head(key, len(query)), _for_each_head(value, len(query))
        output = scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=bias,
            dropout_p=call.dropout,
            is_causal=bias is None,
            scale=call.scaling,
            enable_gqa=query.shape[0] != key.shape[0],
        )[0]
        return output.transpose(0, 1)
    key, value = _for_each_head(key, len(query)), _for_each_head(value, len(query))
    scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    if bias is None:
        bias = query.new_full((query.shape[1], key.shape[1]), float("-inf")).triu_(1)
    if call.softcap is None:
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)  # [H q k]
    else:
        scores = call.softcap * torch.tanh(query @ key.transpose(1, 2) * (scale / call.softcap)) + bias
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[1]]
    return (drop(shares, p=call.dropout) @ value).transpose(0, 1)


def _for_each_head(states: Float[Tensor, "Hkv k d"], num_heads: int) -> Float[Tensor, "H k d"]:
    """Keys or values of grouped heads, repeated for each head of the group."""
    num_groups = num_heads // len(states)
    return states.repeat_interleave(num_groups, 0) if num_groups > 1 else states
