"""`Route`: one way to compute the attention of rows that hold several sequences.

All routes compute the same: each token attends to its prompt, to the earlier tokens of its own completion, and to
nothing else, as far as the model's own mask function lets it. They differ in what they need and in how many kernels
they launch. A route says what it cannot do; `routes.choice` takes the first that can do all that a layer needs.

Given up: routes that see more than one layer's queries, keys and values.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.scoring.segments import Segments

Visible = Callable[..., Any]
"""A mask function of transformers: (row, head, query, key) -> whether the query sees the key. Called with positions."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an attention layer asks of a route, besides softmax(scaling q k^T) v.

    `caps_scores`: soft-capping. `has_sinks`: values that take a share of the softmax. `drops`: dropout of attention
    weights. `key_width`, `value_width`: numbers per head. `num_scores`: scores per head between all tokens of each row,
    R * T * T.
    """

    caps_scores: bool = False
    has_sinks: bool = False
    drops: bool = False
    key_width: int
    value_width: int
    num_scores: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of an attention layer, in rows that `segments` describe.

    `softcap` bounds the scores by cap * tanh(score / cap) (Gemma 2), `sinks` [H] take a share of the softmax (gpt-oss).
    `is_narrow`: of a prompt nothing is read but its last token's output, so the others' may be zeros.
    """

    module: nn.Module
    query: Float[Tensor, "R H T d"]
    key: Float[Tensor, "R Hkv T d"]
    value: Float[Tensor, "R Hkv T dv"]
    segments: Segments
    scaling: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    is_narrow: bool = False

    def needs(self) -> Needs:
        """What this call asks of a route."""
        return Needs(
            caps_scores=self.softcap is not None,
            has_sinks=self.sinks is not None,
            drops=self.dropout > 0,
            key_width=self.query.shape[-1],
            value_width=self.value.shape[-1],
            num_scores=self.query.shape[0] * self.query.shape[2] ** 2,
        )


class Route(abc.ABC):
    """A way to compute attention. `name` is what the log and the docs call it; `is_compiled` says that a kernel is
    compiled for each dtype, which takes long."""

    name: ClassVar[str]
    is_compiled: ClassVar[bool] = False

    @abc.abstractmethod
    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it is meant for this kind of device and this dtype. Nothing is tried."""

    @abc.abstractmethod
    def works_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it gives the right output and gradients on this device, where that has to be tried. A warning says
        why not. To be asked through `routes.probes.works`, which asks once."""

    @abc.abstractmethod
    def problem(self, needs: Needs, visible: Visible) -> str | None:
        """Why it cannot compute what a layer needs, in a clause; None where it can."""

    @abc.abstractmethod
    def prepared(self, segments: Segments, visible: Visible, device: torch.device, dtype: torch.dtype) -> Any:
        """What stands in for the mask in all layers with the mask function `visible`; made once a forward pass."""

    @abc.abstractmethod
    def attend(self, call: AttentionCall, prepared: Any) -> Float[Tensor, "R T H dv"]:
        """The output of one layer; `prepared` is what `prepared` returned. Padding gets numbers that nobody reads."""
