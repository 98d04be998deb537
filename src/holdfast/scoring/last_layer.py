"""The last layer of a model, computed only for the tokens that predict a completion token.

After the last attention no token looks at another, and of a prompt only the last token's hidden state is read. So for
the length of a forward pass the layer's feed-forward module gets the tokens that are read, and zeros stand in for the
others. Its attention may leave out the queries of the others. That saves much in a model of few layers with long
prompts, and little in others.

It is done only where the feed-forward module computes each token by itself, which holds if it consists of linear maps,
adapters, activations and dropout. `data.layouts.choose` checks the log-probs against those of padded rows, which are
computed in full.

Given up: the projections and norms of that layer, which are little work; and mixtures of experts, whose load-balancing
loss counts every token.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from holdfast.internals.torch import dropout_class, modules_of, own_parameters
from holdfast.scoring.forward import replaced_forward
from holdfast.scoring.segments import Segments

_TOKENWISE = (nn.Linear, Conv1D, dropout_class(), nn.Identity)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_TOKENWISE_PACKAGES = ("torch.nn.modules.activation", "transformers.activations", "peft.tuners.")

_WORTHWHILE = 8
"""At least one token in this many must be unread. With fewer, copying the read tokens costs more than it saves."""


def _last_layer(causal_lm: PreTrainedModel) -> nn.Module | None:
    """The layer that runs after all others; None where a module of it runs in an earlier layer as well."""
    decoder = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else None
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if not isinstance(layers, nn.ModuleList):
        return None
    last = {module for module in modules_of(layers[-1]) if own_parameters(module)}
    runs_before = any(module in last for layer in list(layers)[:-1] for module in modules_of(layer))
    return None if runs_before else layers[-1]


def feed_forward(layer: nn.Module | None) -> nn.Module | None:
    """The feed-forward module of a layer, if it computes each token by itself, else None."""
    module = getattr(layer, "mlp", None)
    if not isinstance(module, nn.Module) or own_parameters(module):
        return None
    submodules = list(module.modules())[1:]
    has_maps = any(isinstance(submodule, nn.Linear | Conv1D) for submodule in submodules)
    return module if has_maps and all(map(_is_tokenwise, submodules)) else None


def _is_tokenwise(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return False
    return isinstance(module, _TOKENWISE + _CONTAINERS) or type(module).__module__.startswith(_TOKENWISE_PACKAGES)


def narrowed(causal_lm: PreTrainedModel, segments: Segments) -> contextlib.AbstractContextManager[frozenset[nn.Module]]:
    """Inside, the feed-forward module of the last layer computes only the tokens that are read.

    Yields the modules of that layer, whose attention may leave out the unread queries too; none where nothing is
    narrowed. On leaving, the model is as it was.
    """
    return narrowing(causal_lm, segments)()


def narrowing(
    causal_lm: PreTrainedModel, segments: Segments
) -> Callable[[], contextlib.AbstractContextManager[frozenset[nn.Module]]]:
    """`narrowed`, to be entered any number of times: what is narrowed is found once."""
    layer, runs = _last_layer(causal_lm), segments.unread_and_read()
    module = feed_forward(layer)
    num_unread, num_tokens = sum(runs[::2]), sum(runs)
    if layer is None or module is None or num_unread * _WORTHWHILE < num_tokens:
        return partial(contextlib.nullcontext, frozenset[nn.Module]())
    return partial(_narrowed, module, frozenset(modules_of(layer)), runs)


@contextlib.contextmanager
def _narrowed(module: nn.Module, modules: frozenset[nn.Module], runs: list[int]) -> Iterator[frozenset[nn.Module]]:
    forward, num_tokens = module.forward, sum(runs)

    def of_read_tokens(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.dim() != 3 or hidden.shape[0] * hidden.shape[1] != num_tokens:
            return forward(hidden, *args, **kwargs)
        read = torch.cat(hidden.flatten(0, 1).split(runs)[1::2])
        return _with_zeros(forward(read[None], *args, **kwargs)[0], runs).view(*hidden.shape[:2], -1)

    with replaced_forward(module, of_read_tokens):
        yield modules


def _with_zeros(outputs: Float[Tensor, "K h"], runs: list[int]) -> Float[Tensor, "M h"]:
    """The outputs of the K read tokens, with zeros for the unread ones between (see `Segments.unread_and_read`)."""
    zeros = outputs.new_zeros(max(runs[::2]), outputs.shape[-1])
    pairs = zip(runs[::2], outputs.split(runs[1::2]), strict=True)
    return torch.cat([run for unread, read in pairs for run in (zeros[:unread], read)])
