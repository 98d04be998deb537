"""The route `varlen`: one call of FlashAttention a layer, over sequences of unlike lengths laid end to end.

torch has the kernel (`torch.nn.attention.varlen`). Queries are read as they lie. The keys of a completion must lie
behind those of its prompt, so keys and values are gathered once a layer; where no prompt is shared they too are read as
they lie. The kernel aligns the last query with the last key, so a completion's tokens see their whole prompt and what
precedes them, and a window counts positions. Nothing is compiled, and no mask exists.

Given up: what the kernel cannot compute. That is fp32, soft-capping, sinks, dropout, masks that are no band (chunks),
and heads of other widths. Keys of a prompt are copied for each of its completions.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from holdfast.scoring.routes import probes
from holdfast.scoring.routes.base import AttentionCall, Needs, Route, Visible
from holdfast.scoring.routes.rules import FARTHEST, Rule, recognised
from holdfast.scoring.row_plan import RowPlan
from holdfast.scoring.segments import Segments

WIDEST_HEAD = 256
"""The widest head that FlashAttention takes."""

WIDE_HEAD = 192
"""Heads that are wider than this are a trial of their own: some devices have no gradients for them."""

HEAD_MULTIPLE = 8
"""What a head's width must be a multiple of."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenRows:
    """What layers with one mask function have in common: the plan of the rows on the device, how many of the tokens
    before it a token sees (-1 for all), and the dtype to compute in."""

    plan: RowPlan
    num_before: int
    dtype: torch.dtype


@final
class VarlenRoute(Route):
    """FlashAttention over sequences of unlike lengths, on CUDA devices in half precision; for heads of up to
    `WIDE_HEAD`, or with `is_wide` for those that are wider."""

    name: ClassVar[str] = "varlen"

    def __init__(self, *, is_wide: bool = False) -> None:
        self._is_wide = is_wide

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.runs_on`."""
        return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)

    def works_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.works_on`."""
        return probes.is_right(self, device, dtype, width=WIDEST_HEAD if self._is_wide else 64)

    def problem(self, needs: Needs, visible: Visible) -> str | None:
        """See `Route.problem`."""
        if needs.caps_scores:
            return "it cannot cap scores"
        if needs.has_sinks:
            return "it has no sinks"
        if needs.drops:
            return "it cannot drop attention weights"
        if needs.key_width != needs.value_width:
            return f"its keys and values must be of one width, and are of {needs.key_width} and {needs.value_width}"
        if needs.key_width > WIDEST_HEAD or needs.key_width % HEAD_MULTIPLE != 0:
            return (
                f"it takes heads of up to {WIDEST_HEAD} in steps of {HEAD_MULTIPLE}, and they are of {needs.key_width}"
            )
        if (needs.key_width > WIDE_HEAD) != self._is_wide:
            return f"it is for heads that are {'wider than' if self._is_wide else 'of up to'} {WIDE_HEAD}"
        is_band = recognised(visible)[0] is Rule.NEAR
        return None if is_band else "its mask must be causal, with or without a sliding window"

    def prepared(self, segments: Segments, visible: Visible, device: torch.device, dtype: torch.dtype) -> VarlenRows:
        """The plan on the device; no kernel runs for it where it came with the batch."""
        _, reach = recognised(visible)
        return VarlenRows(plan=segments.plan_on(device), num_before=-1 if reach == FARTHEST else reach - 1, dtype=dtype)

    def attend(self, call: AttentionCall, prepared: VarlenRows) -> Tensor:
        """See `Route.attend`; the padding of a row attends to itself, like a sequence of its own."""
        plan = prepared.plan
        query, key, value = (_end_to_end(state.to(prepared.dtype)) for state in (call.query, call.key, call.value))
        if plan.gathers:
            key, value = gathered(key, value, plan.part("keys"))
        output = varlen_attn(
            query,
            key,
            value,
            plan.part("query_ends"),
            plan.part("key_ends"),
            plan.longest_query,
            plan.longest_key,
            scale=call.scaling,
            window_size=(prepared.num_before, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(output, Tensor)
        num_rows, num_heads, num_columns, _ = call.query.shape
        return output.view(num_rows, num_columns, num_heads, -1)


def _end_to_end(states: Tensor) -> Tensor:
    """Heads of all rows laid end to end, [R*T H d], from [R H T d]: a view where a token's heads lie together."""
    return states.transpose(1, 2).flatten(0, 1)


def gathered(
    key: Float[Tensor, "M h d"], value: Float[Tensor, "M h d"], places: Int[Tensor, "K"]
) -> tuple[Float[Tensor, "K h d"], Float[Tensor, "K h d"]]:
    """The keys and the values of the tokens at `places`."""
    return _Gathered.apply(key, value, places)


@final
class _Gathered(torch.autograd.Function):
    """Two gathers whose gradients are added up in one buffer, which takes one kernel less than two buffers."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(places)
        ctx.num_tokens = len(key)
        return key.index_select(0, places), value.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, None]:
        (places,) = ctx.saved_tensors
        of_tokens = key.new_zeros(2, ctx.num_tokens, *key.shape[1:])
        of_tokens[0].index_add_(0, places, key)
        of_tokens[1].index_add_(0, places, value)
        return of_tokens[0], of_tokens[1], None
