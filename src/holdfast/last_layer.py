"""The last layer's feed-forward part, computed only for tokens that predict a completion token.

After the last attention no token is looked at by another, and what the tokens of a prompt become is read by nobody,
but for its last one. So for the length of a forward pass that module is given the tokens that count, and zeros stand
in for the others: of a model of few layers and long prompts that is a good part of the work, of others a little.

Done where each token is plainly computed by itself: a module made of linear maps, adapters, activations and dropout.
`holdfast.layout` sees to it that the log-probs are those of padded rows, which are computed in full.

Given up: the other parts of that layer, and mixtures of experts, whose load-balancing loss counts every token.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from holdfast.pieces import Pieces

_BY_ITSELF = (nn.Linear, Conv1D, nn.modules.dropout._DropoutNd, nn.Identity)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_PACKAGES = ("torch.nn.modules.activation", "transformers.activations", "peft.tuners.")

_WORTHWHILE = 8
"""Of this many tokens at least one must be left out, or copying them costs more than it saves."""


def last_feed_forward(causal_lm: PreTrainedModel) -> nn.Module | None:
    """The feed-forward part of the model's last layer, if it computes each token by itself, else None."""
    decoder = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else None
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) > 0 else None
    module = getattr(last, "mlp", None)
    if not isinstance(module, nn.Module) or module._parameters:
        return None
    parts = list(module.modules())[1:]
    return (
        module if any(isinstance(part, nn.Linear | Conv1D) for part in parts) and all(map(_by_itself, parts)) else None
    )


def _by_itself(part: nn.Module) -> bool:
    if isinstance(part, nn.MultiheadAttention):
        return False
    return isinstance(part, _BY_ITSELF + _CONTAINERS) or type(part).__module__.startswith(_PACKAGES)


@contextlib.contextmanager
def narrowed(causal_lm: PreTrainedModel, pieces: Pieces) -> Iterator[None]:
    """Inside, the last layer computes what is read of it, and no more; on leaving, the model is as it was."""
    module, runs = last_feed_forward(causal_lm), pieces.read_runs()
    num_unread, num_tokens = sum(runs[::2]), sum(runs)
    if module is None or num_unread * _WORTHWHILE < num_tokens:
        yield
        return
    before, forward = module.__dict__.get("forward"), module.forward

    def of_read(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden.dim() != 3 or hidden.shape[0] * hidden.shape[1] != num_tokens:
            return forward(hidden, *args, **kwargs)
        return _of_read(forward, hidden, runs, *args, **kwargs)

    module.forward = of_read
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _of_read(forward: Callable[..., Tensor], hidden: Tensor, runs: list[int], *args: Any, **kwargs: Any) -> Tensor:
    read = torch.cat(hidden.flatten(0, 1).split(runs)[1::2])
    made = forward(read[None], *args, **kwargs)[0]
    zeros = made.new_zeros(max(runs[::2]), made.shape[-1])
    parts = zip(runs[::2], made.split(runs[1::2]), strict=True)
    return torch.cat([part for unread, run in parts for part in (zeros[:unread], run)]).view(*hidden.shape[:2], -1)
