"""FlexAttention compiled by ourselves: one function for each kind of call, each of which is compiled once.

The compiler keeps few versions of a function (`recompile_limit`, 8 by default). Beyond them it silently runs the
function uncompiled, which here means all T x T scores. So what would be another version is another *function*, with
versions of its own: heads and widths, dtype, scale, cap, rule, and whether gradients are wanted. What differs between
batches is no other version: the number of tokens and of blocks are marked as dynamic, and a window is a tensor. A
function of which more versions are wanted all the same ends the run with an error.

Given up: the wrapper of transformers, which compiles anew whenever a module goes from training to evaluation and back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from holdfast.internals.torch import mark_dynamic, static_by_default, without_base
from holdfast.scoring.routes.blocks import BLOCK
from holdfast.scoring.routes.rules import ALLOWS, Rule

Visible = Callable[..., Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What one compiled function is for. `shape`: heads of queries, of keys, and numbers per head of keys and of
    values. `state`: whether gradients are on, which inputs want them, whether autocast is on."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    scale: float
    softcap: float | None
    has_sinks: bool
    rule: Rule
    state: tuple[bool, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FlexMask:
    """Which keys each query sees, on the device of the queries. `ids` are `Pieces.token_ids` [3 x T], `lists` the
    `Blocks.lists`, `reach` the number of the rule (see `rules.Rule`), `visible` the mask function of rule `OTHER`."""

    ids: tuple[Int[Tensor, "T"], ...]
    lists: tuple[Tensor, ...]
    rule: Rule
    reach: Int[Tensor, ""]
    visible: Visible | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.ids[0])


def flex(
    query: Float[Tensor, "1 T H d"],
    key: Float[Tensor, "1 T Hkv d"],
    value: Float[Tensor, "1 T Hkv dv"],
    mask: FlexMask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "1 T H dv"]:
    """softmax(scale q k^T) v over the keys that each query sees, T = `mask.num_tokens`.

    `softcap` bounds the scores by cap * tanh(score / cap), and `sinks` [H] take a share of the softmax.
    """
    leaves = [tensor for tensor in (query, key, value, sinks) if tensor is not None]
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in leaves]
    kind = Kind(
        device=query.device,
        dtype=query.dtype,
        shape=(query.shape[2], key.shape[2], query.shape[3], value.shape[3]),
        scale=scale,
        softcap=softcap,
        has_sinks=sinks is not None,
        rule=mask.rule,
        state=(torch.is_grad_enabled(), torch.is_autocast_enabled(query.device.type), *wants),
    )
    query, key, value = without_base(query), without_base(key), without_base(value)
    inputs = query, key, value, sinks, mask.ids, mask.lists, mask.reach, mask.visible
    attend = _COMPILED.get(kind)
    if attend is not None:
        return attend(*inputs)
    _mark(query, key, value, mask)
    attend = _COMPILED[kind] = compiled(_function(kind))
    with static_by_default():
        return attend(*inputs)


_COMPILED: dict[Kind, Callable[..., Tensor]] = {}


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, compiled apart from every other. Its calls raise where it was not compiled."""

    def run(*args: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            raise RuntimeError("FlexAttention needs torch.compile, which is switched off in this process")
        return function(*args)

    made: Any = torch.compile  # of which no overload knows `isolate_recompiles`
    return made(run, fullgraph=True, isolate_recompiles=True)


def _function(kind: Kind) -> Callable[..., Tensor]:
    """The function of a kind. Its numbers are constants to the compiler: they come from here, and never change."""
    scale, softcap, has_sinks, allows = kind.scale, kind.softcap, kind.has_sinks, ALLOWS[kind.rule]
    is_grouped = kind.shape[0] != kind.shape[1]

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        ids: tuple[Tensor, Tensor, Tensor],
        lists: Sequence[Tensor],
        reach: Tensor,
        visible: Visible | None,
    ) -> Tensor:
        piece, prompt, position = ids
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_own = (piece[key] == piece[query]) | (piece[key] == prompt[query])
            is_near = allows(row, head, position[query], position[key], reach, visible)
            return (is_own & is_near) | (query == key)

        block_mask = BlockMask(
            (query.shape[2], key.shape[2]),
            *lists,
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=sees,
        )
        output: Any = flex_attention(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=is_grouped,
            return_aux=AuxRequest(lse=True) if has_sinks else None,
        )
        if sinks is None:
            return output.transpose(1, 2)
        # Of exp(sums) + exp(sink), what the keys have.
        output, sums = output
        share = torch.sigmoid(sums.lse - sinks.float()[:, None])
        return (output * share[..., None]).to(output.dtype).transpose(1, 2)

    return attend


def _mark(query: Tensor, key: Tensor, value: Tensor, mask: FlexMask) -> None:
    """Tells the compiler what differs between batches: the number of tokens T and of blocks B."""
    for states in (query, key, value):
        mark_dynamic(states, 1)
    for ids in mask.ids:
        mark_dynamic(ids, 0)
    for blocks in mask.lists:  # [1 1 B] and [1 1 B B]
        for dimension in range(2, blocks.ndim):
            mark_dynamic(blocks, dimension)
