"""The route `flex`: FlexAttention, one compiled kernel a layer. It can cap scores, has sinks, and takes any rule.

All rows are laid end to end, so a batch of one row is no other shape than one of several. Which blocks of queries and
keys are computed is worked out in host memory (`routes.blocks`), once a batch for policy, reference and all layers of a
kind, and goes to the device in one copy that nothing waits for. No [T T] mask exists.

Given up: CPUs, for which FlexAttention has no backward pass in torch 2.13; dropout of attention weights; and fp64.
"""

from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from holdfast.internals.torch import without_base
from holdfast.scoring.routes.base import AttentionCall, Needs, Route, Visible
from holdfast.scoring.routes.blocks import Blocks, Pieces
from holdfast.scoring.routes.flex_kernel import FlexMask, flex
from holdfast.scoring.routes.probes import is_right
from holdfast.scoring.routes.rules import Rule, recognised
from holdfast.scoring.segments import Segments

ALIGNMENT = 32
"""Every list begins at a multiple of so many numbers in what is copied: kernels are compiled for aligned memory."""

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@final
class FlexRoute(Route):
    """FlexAttention on CUDA devices."""

    name: ClassVar[str] = "flex"
    is_compiled: ClassVar[bool] = True

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.runs_on`."""
        return device.type == "cuda" and dtype in DTYPES

    def works_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `Route.works_on`."""
        return is_right(self, device, dtype)

    def problem(self, needs: Needs, visible: Visible) -> str | None:
        """See `Route.problem`."""
        return "FlexAttention cannot drop attention weights" if needs.drops else None

    def prepared(self, segments: Segments, visible: Visible, device: torch.device, dtype: torch.dtype) -> FlexMask:
        """See `Route.prepared`: which keys each query sees. The same for all models that score a batch."""
        return flex_mask(segments, visible, device)

    def attend(self, call: AttentionCall, prepared: FlexMask) -> Tensor:
        """See `Route.attend`."""
        num_rows, num_heads, num_columns, width = call.query.shape
        states = [_one_row(states, prepared.num_tokens) for states in (call.query, call.key, call.value)]
        scale = width**-0.5 if call.scaling is None else call.scaling
        output = flex(*_alike(*states), prepared, scale=scale, softcap=call.softcap, sinks=call.sinks)
        output = output[0, : num_rows * num_columns]  # [R*T H dv]
        return output.reshape(num_rows, num_columns, num_heads, call.value.shape[-1])


def flex_mask(segments: Segments, visible: Visible, device: torch.device) -> FlexMask:
    """Which keys each query sees, on the device: those of its prompt and its own completion that `visible` allows."""
    rule, reach = recognised(visible)
    ids, lists, number = segments.prepared_once(
        ("flex", rule, reach, device), lambda: _on_device(Pieces.of(segments), rule, reach, device)
    )
    return FlexMask(
        ids=ids, lists=lists, rule=rule, reach=number, visible=visible if rule is Rule.OTHER else None
    )  # fmt: skip


def _on_device(
    pieces: Pieces, rule: Rule, reach: int, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The ids of tokens, the lists of blocks and `reach`, moved together."""
    ids = list(pieces.token_ids())
    lists = [array[None, None] for array in Blocks.of(pieces, rule, reach).lists()]  # one mask for all heads
    arrays = [*ids, *lists, np.array(reach, dtype=np.int32)]
    ends = np.cumsum([-(-array.size // ALIGNMENT) * ALIGNMENT for array in arrays])
    starts = [0, *ends[:-1].tolist()]
    flat = np.zeros(ends[-1], dtype=np.int32)
    for start, array in zip(starts, arrays, strict=True):
        flat[start : start + array.size] = array.ravel()
    host = torch.from_numpy(flat)
    moved = (host if device.type == "cpu" else host.pin_memory()).to(device, non_blocking=True)
    places = zip(starts, arrays, strict=True)
    views = [without_base(moved[start : start + array.size].view(array.shape)) for start, array in places]
    return tuple(views[: len(ids)]), tuple(views[len(ids) : -1]), views[-1]


def _one_row(states: Tensor, num_tokens: int) -> Tensor:
    """[R H T d] -> [1 R*T H d], contiguous, without a copy where a token's heads lie side by side, as most models leave
    them. Fewer tokens than `num_tokens` are filled up with zeros, which only see themselves."""
    num_rows, num_heads, num_columns, width = states.shape
    states = states.transpose(1, 2).reshape(1, num_rows * num_columns, num_heads, width).contiguous()
    if states.shape[1] < num_tokens:
        states = pad(states, (0, 0, 0, 0, 0, num_tokens - states.shape[1]))
    return states


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype: autocast's, where it is on. A model may norm queries and keys in fp32 there."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)
