"""The last layer of a model, computed only for tokens that predict a completion token, where that is plainly right.

After the last attention no token is looked at by another, and what the tokens of a prompt become is read by nobody,
but for its last one. So for the length of a forward pass the layer's feed-forward part is given the tokens that count,
and zeros stand in for the others; and its attention may leave out what the others ask. Of a model of few layers and
long prompts that is a good part of the work, of others a little.

Done where the feed-forward part plainly computes each token by itself: it is made of linear maps, adapters, activations
and dropout. `data.layouts.choose` sees to it that the log-probs are those of padded rows, which are computed in full.

Given up: projections and norms of that layer, which are little; and mixtures of experts, whose load-balancing loss
counts every token.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from holdfast.internals.torch import dropout_class
from holdfast.scoring.segments import Pieces

_BY_ITSELF = (nn.Linear, Conv1D, dropout_class(), nn.Identity)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_PACKAGES = ("torch.nn.modules.activation", "transformers.activations", "peft.tuners.")

_WORTHWHILE = 8
"""Of this many tokens at least one must be left out, or copying them costs more than it saves."""


def _last_layer(causal_lm: PreTrainedModel) -> nn.Module | None:
    """The one that the model runs after all others; None where a part of it runs before as well."""
    decoder = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else None
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if not isinstance(layers, nn.ModuleList):
        return None
    before = {part for layer in list(layers)[:-1] for part in layer.modules() if _has_parameters(part)}
    return None if any(part in before for part in layers[-1].modules()) else layers[-1]


def feed_forward(layer: nn.Module | None) -> nn.Module | None:
    """The feed-forward part of a layer, if it computes each token by itself, else None."""
    module = getattr(layer, "mlp", None)
    if not isinstance(module, nn.Module) or _has_parameters(module):
        return None
    parts = list(module.modules())[1:]
    has_maps = any(isinstance(part, nn.Linear | Conv1D) for part in parts)
    return module if has_maps and all(map(_by_itself, parts)) else None


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _by_itself(part: nn.Module) -> bool:
    if isinstance(part, nn.MultiheadAttention):
        return False
    return isinstance(part, _BY_ITSELF + _CONTAINERS) or type(part).__module__.startswith(_PACKAGES)


@contextlib.contextmanager
def narrowed(causal_lm: PreTrainedModel, pieces: Pieces) -> Iterator[frozenset[nn.Module]]:
    """Inside, the feed-forward part of the last layer computes what is read of it, and no more; on leaving, the model
    is as it was. The layer's modules, whose attention may do so too; none where it must not."""
    layer, runs = _last_layer(causal_lm), pieces.read_runs()
    module = feed_forward(layer)
    num_unread, num_tokens = sum(runs[::2]), sum(runs)
    if layer is None or module is None or num_unread * _WORTHWHILE < num_tokens:
        yield frozenset()
        return
    before, forward = module.__dict__.get("forward"), module.forward

    def of_read(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.dim() != 3 or hidden.shape[0] * hidden.shape[1] != num_tokens:
            return forward(hidden, *args, **kwargs)
        return _of_read(forward, hidden, runs, *args, **kwargs)

    module.forward = of_read
    try:
        yield frozenset(layer.modules())
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _of_read(
    forward: Callable[..., Tensor], hidden: Float[Tensor, "R T h"], runs: list[int], *args: Any, **kwargs: Any
) -> Float[Tensor, "R T h"]:
    read = torch.cat(hidden.flatten(0, 1).split(runs)[1::2])
    made = forward(read[None], *args, **kwargs)[0]
    zeros = made.new_zeros(max(runs[::2]), made.shape[-1])
    parts = zip(runs[::2], made.split(runs[1::2]), strict=True)
    return torch.cat([part for unread, run in parts for part in (zeros[:unread], run)]).view(*hidden.shape[:2], -1)
