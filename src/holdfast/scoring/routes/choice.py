"""Which route a layer's attention takes: the first of `ROUTES` that runs and works on its device, and can do what the
layer needs.

The choice follows from the layer and the device alone. So a policy and a reference of the same model take the same
route for the same batch, and equal models give equal log-probs. Given up: the fastest route for each batch.
"""

from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from holdfast.scoring.routes import probes
from holdfast.scoring.routes.base import AttentionCall, Needs, Route, Visible
from holdfast.scoring.routes.flex import FlexRoute
from holdfast.scoring.routes.pieces import PiecesRoute
from holdfast.scoring.segments import Segments

FLEX, PIECES = FlexRoute(), PiecesRoute()

ROUTES: tuple[Route, ...] = (FLEX, PIECES)
"""The routes, the one to prefer first. The last one can do everything everywhere."""


def candidates(device: torch.device, dtype: torch.dtype) -> list[Route]:
    """The routes that are meant for this device and dtype, untried."""
    return [route for route in ROUTES if route.runs_on(device, dtype)]


def choose(needs: Needs, visible: Visible, device: torch.device, dtype: torch.dtype) -> Route:
    """The route of a layer with these needs and this mask function."""
    able = (route for route in candidates(device, dtype) if route.problem(needs, visible) is None)
    return next(route for route in able if probes.works(route, device, dtype))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RowMask:
    """What transformers passes to attention layers in place of a [T T] mask, where there are routes to choose from.

    Made once a forward pass and kind of layer. What a route prepares for it is kept for the layers to come.
    """

    segments: Segments
    visible: Visible
    device: torch.device
    dtype: torch.dtype
    _prepared: dict[Route, Any] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        """The output [R T H dv] of a layer, by the route that it takes."""
        route = choose(call.needs(), self.visible, self.device, self.dtype)
        if route not in self._prepared:
            self._prepared[route] = route.prepared(self.segments, self.visible, self.device, self.dtype)
        return route.attend(call, self._prepared[route])


def mask_of_rows(segments: Segments, visible: Visible, device: torch.device, dtype: torch.dtype) -> Tensor | RowMask:
    """What stands in for the mask: what pieces take where they are the only route, which is a plain tensor; else a
    `RowMask`."""
    if candidates(device, dtype) == [PIECES]:
        return PIECES.prepared(segments, visible, device, dtype)
    return RowMask(segments=segments, visible=visible, device=device, dtype=dtype)


def attend(call: AttentionCall, mask: Tensor | RowMask) -> Tensor:
    """The output [R T H dv] of a layer, whose `mask` is what `mask_of_rows` returned."""
    return mask.attend(call) if isinstance(mask, RowMask) else PIECES.attend(call, mask)
