"""Which route a layer's attention takes: the first of `ROUTES` that runs and works on its device, and can do what the
layer needs.

The choice follows from the layer and the device alone. So a policy and a reference of the same model take the same
route for the same batch, and equal models give equal log-probs. Given up: the fastest route for each batch.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from holdfast.scoring.routes import probes
from holdfast.scoring.routes.base import AttentionCall, Needs, Route, Visible
from holdfast.scoring.routes.dense import DenseRoute
from holdfast.scoring.routes.flex import FlexRoute
from holdfast.scoring.routes.pieces import PiecesRoute
from holdfast.scoring.routes.varlen import VarlenRoute
from holdfast.scoring.segments import Segments

VARLEN, WIDE_VARLEN = VarlenRoute(), VarlenRoute(is_wide=True)
FLEX, DENSE, PIECES = FlexRoute(), DenseRoute(), PiecesRoute()

ROUTES: tuple[Route, ...] = (VARLEN, WIDE_VARLEN, FLEX, DENSE, PIECES)
"""The routes, the one to prefer first. The last one can do everything everywhere."""


_COMPILED_IN: ContextVar[frozenset[torch.dtype] | None] = ContextVar("holdfast_compiled_in", default=None)
"""The dtypes in which kernels may be compiled; None for all."""


@contextlib.contextmanager
def compiling_only_in(dtypes: Iterable[torch.dtype]) -> Iterator[None]:
    """Inside, routes that compile kernels are taken in these dtypes only."""
    token = _COMPILED_IN.set(frozenset(dtypes))
    try:
        yield
    finally:
        _COMPILED_IN.reset(token)


def candidates(device: torch.device, dtype: torch.dtype) -> list[Route]:
    """The routes that are meant for this device and dtype, untried."""
    compiled_in = _COMPILED_IN.get()
    may_compile = compiled_in is None or dtype in compiled_in
    return [route for route in ROUTES if route.runs_on(device, dtype) and (may_compile or not route.is_compiled)]


def choose(needs: Needs, visible: Visible, device: torch.device, dtype: torch.dtype) -> Route:
    """The route of a layer with these needs and this mask function."""
    able = (route for route in candidates(device, dtype) if route.problem(needs, visible) is None)
    return next(route for route in able if probes.works(route, device, dtype))


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowMask:
    """What transformers passes to attention layers in place of a [T T] mask, where there are routes to choose from.

    Made once a forward pass and kind of layer. What a route prepares for it is kept for the layers to come.
    """

    segments: Segments
    visible: Visible
    dtype: torch.dtype
    _routes: dict[tuple[Needs, torch.device], Route] = field(default_factory=dict)
    _prepared: dict[tuple[Route, torch.device], Any] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        """The output [R T H dv] of a layer, by the route that it takes on its device."""
        device, needs = call.query.device, call.needs()
        _ASKED[call.module] = needs, self.visible
        route = self._routes.get((needs, device)) or choose(needs, self.visible, device, self.dtype)
        self._routes[needs, device] = route
        if (route, device) not in self._prepared:
            self._prepared[route, device] = route.prepared(self.segments, self.visible, device, self.dtype)
        return route.attend(call, self._prepared[route, device])


_ASKED: WeakKeyDictionary[nn.Module, tuple[Needs, Visible]] = WeakKeyDictionary()
"""What each attention layer asked for when it was called last."""


def routes_of(model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[Route]:
    """The route that each attention layer of `model` takes on this device in this dtype, in the order of the layers.
    Empty where none has attended filled rows yet, or where there is nothing to choose from."""
    asked = [_ASKED[module] for module in model.modules() if module in _ASKED]
    return [choose(needs, visible, device, dtype) for needs, visible in asked]


def mask_of_rows(segments: Segments, visible: Visible, device: torch.device, dtype: torch.dtype) -> Tensor | RowMask:
    """What stands in for the mask: what pieces take where they are the only route, which is a plain tensor; else a
    `RowMask`."""
    if candidates(device, dtype) == [PIECES]:
        return PIECES.prepared(segments, visible, device, dtype)
    return RowMask(segments=segments, visible=visible, dtype=dtype)


def attend(call: AttentionCall, mask: Tensor | RowMask) -> Tensor:
    """The output [R T H dv] of a layer, whose `mask` is what `mask_of_rows` returned."""
    return mask.attend(call) if isinstance(mask, RowMask) else PIECES.attend(call, mask)
