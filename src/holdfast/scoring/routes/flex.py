"""The route `flex`: FlexAttention, one compiled kernel a layer under a block mask. See `holdfast.scoring.flex`."""

from itertools import chain
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from holdfast.scoring import flex
from holdfast.scoring.routes.base import AttentionCall, Needs, Route, Visible
from holdfast.scoring.segments import Segments


@final
class FlexRoute(Route):
    """FlexAttention on CUDA devices. Layers that drop attention weights are refused when they are called."""

    name: ClassVar[str] = "flex"

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.runs_on`."""
        return device.type == "cuda"

    def works_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.works_on`."""
        return flex.is_usable(device, dtype)

    def problem(self, needs: Needs, visible: Visible) -> str | None:
        """See `Route.problem`."""
        return None

    def prepared(self, segments: Segments, visible: Visible, device: torch.device, dtype: torch.dtype) -> BlockMask:
        """The block mask of all rows."""
        rows = [[(s.prompt, [*chain.from_iterable(s.groups)]) for s in row] for row in segments.rows]
        return flex.block_mask(rows, segments.num_columns, visible, device)

    def attend(self, call: AttentionCall, prepared: BlockMask) -> Tensor:
        """See `Route.attend`."""
        return flex.flex_attention(
            call.module,
            call.query,
            call.key,
            call.value,
            prepared,
            scaling=call.scaling,
            dropout=call.dropout,
            softcap=call.softcap,
            s_aux=call.sinks,
        )
