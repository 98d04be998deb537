"""The route `dense`: one SDPA call a layer over whole rows, under a [R 1 T T] mask.

Few launches on any device that has SDPA, nothing to compile, and dropout. The mask is made once a forward pass for all
layers with one mask function. Each head gets keys and values of its own: with a mask, torch's fast kernels take no
grouped heads, and the plain one would keep all scores.

Given up: the scores between tokens that do not see each other, which are computed and then masked; soft-capping and
sinks, which SDPA does not have; and long rows, whose mask would be too large.
"""

from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from holdfast.scoring.routes.base import AttentionCall, Needs, Route, Visible
from holdfast.scoring.row_plan import PADDING, RowPlan
from holdfast.scoring.segments import Segments

MOST_SCORES = 2**30
"""Most values of a mask, R * T * T: 2 GiB in half precision."""

ALIGNMENT = 8
"""Rows of a mask begin at multiples of this many values. SDPA would copy another mask in every call."""


@final
class DenseRoute(Route):
    """SDPA under a mask of whole rows, on any device but a CPU."""

    name: ClassVar[str] = "dense"

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.runs_on`."""
        return device.type != "cpu"

    def works_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.works_on`: SDPA is what most models compute with."""
        return True

    def problem(self, needs: Needs, visible: Visible) -> str | None:
        """See `Route.problem`."""
        if needs.caps_scores:
            return "it cannot cap scores"
        if needs.has_sinks:
            return "it has no sinks"
        if needs.num_scores > MOST_SCORES:
            return f"its mask would have {needs.num_scores} values, more than {MOST_SCORES}"
        return None

    def prepared(
        self, segments: Segments, visible: Visible, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "R 1 T T"]:
        """0 where a token sees another, else -inf."""
        seen = seen_tokens(segments.plan_on(device), visible)
        num_rows, _, num_columns, _ = seen.shape
        width = -(-num_columns // ALIGNMENT) * ALIGNMENT
        bias = torch.zeros(num_rows, 1, num_columns, width, dtype=dtype, device=device)[..., :num_columns]
        return bias.masked_fill_(~seen, float("-inf"))

    def attend(self, call: AttentionCall, prepared: Tensor) -> Tensor:
        """See `Route.attend`; padding sees itself."""
        num_groups = call.query.shape[1] // call.key.shape[1]
        key, value = call.key, call.value
        if num_groups > 1:
            key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
        output = scaled_dot_product_attention(
            call.query.to(prepared.dtype),
            key.to(prepared.dtype),
            value.to(prepared.dtype),
            attn_mask=prepared,
            dropout_p=call.dropout,
            scale=call.scaling,
        )
        return output.transpose(1, 2)


def seen_tokens(plan: RowPlan, visible: Visible) -> Bool[Tensor, "R 1 T T"]:
    """Which keys each query sees: those of its prompt and of its own completion, at positions that `visible` allows.
    Padding sees itself."""
    segment, completion, position = (plan.part(name) for name in ("segment", "completion", "position"))
    rows = torch.arange(len(segment), device=segment.device)[:, None, None]
    num_columns = segment.shape[1]
    is_own = (completion[:, None] == 0) | (completion[:, None] == completion[..., None])
    is_own &= (segment[:, None] == segment[..., None]) & (segment[..., None] != PADDING)
    seen = is_own & visible(rows, torch.zeros_like(rows), position[..., None], position[:, None])
    return (seen | torch.eye(num_columns, dtype=torch.bool, device=segment.device))[:, None]
