"""LoRA layers that compute as a moving reference whose pairs cannot be put in place of their factors.

A factor that is spread over processes has a fixed shape, and a mixed pair has another rank. So the layer's adapter is
off, and the layer's forward pass adds the pair's product to what its base layer gives: `base(x) + s up (down x)`; for
DoRA `d * W x + s up (down x)`. Given up: a pair that stays spread meanwhile, since every process has all of it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.internals.peft import check_switching, switched_layers
from holdfast.policy.sharding import whole
from holdfast.reference.moving.lora_products import Layer, LayerState, layers_of
from holdfast.scoring.forward import replaced_forward


@contextlib.contextmanager
def adding_products(policy: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """A context within which the LoRA layers of `policy` compute as the reference with `state` (see
    `lora_products.policy_state`). Collective where parameters are spread over processes."""
    check_switching()
    layers = list(layers_of(policy))
    with contextlib.ExitStack() as stack:
        stack.enter_context(switched_layers({layer.path: layer.module for layer in layers}, None))
        for layer in layers:
            forward = _forward(layer, LayerState.of_state(state, layer))
            stack.enter_context(replaced_forward(layer.module, forward))
        yield


def _forward(layer: Layer, own: LayerState) -> Callable[..., Tensor]:
    """The forward pass of a layer whose adapter is off, with the product of `own` added."""
    base_forward: Callable[..., Tensor] = layer.module.forward
    up_bias = None if (bias := layer.up_bias()) is None else whole(bias)
    base_bias = None
    if own.scale is not None and (bias := layer.module.get_base_layer().bias) is not None:
        base_bias = whole(bias)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = base_forward(x, *args, **kwargs)
        dtype = layer.dtype()
        added = _map(layer, x, own.up if own.down is None else own.down, dtype)
        added = added if own.down is None else F.linear(added, own.up.to(dtype))
        added = added if up_bias is None else added + up_bias.to(added.dtype)
        scaled = result
        if own.scale is not None:
            scaled = scaled if base_bias is None else scaled - base_bias
            scaled = own.scale.to(result.dtype) * scaled
            scaled = scaled if base_bias is None else scaled + base_bias
        return (scaled + layer.scaling * added).to(result.dtype)

    return forward


def _map(layer: Layer, x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix [n in]` times the layer's inputs: vectors, or token ids of an embedding."""
    matrix = matrix.to(dtype)
    is_embedding = isinstance(layer.module, Embedding)
    return F.embedding(x, matrix.T) if is_embedding else F.linear(x.to(dtype), matrix)
