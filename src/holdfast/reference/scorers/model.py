"""The explicit reference: a frozen second module.

It is a copy of the policy in memory, never a model read again from the policy's path, or a module that the user chose.
The user's module may be quantised and may have any dtype and device: the batch's inputs are moved to it, and its
log-probs back. Given up: memory for the weights, and a forward pass per batch. A second module that moves is in
`reference.moving.model`.
"""

import contextlib
import copy
import types
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Self, final

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.internals.torch import own_state
from holdfast.policy.quantised import pin_quantised_layers
from holdfast.policy.second_module import sharded_copy
from holdfast.policy.sharding import is_sharded
from holdfast.reference.base import Scorer, Share
from holdfast.reference.identity.identity import Identity
from holdfast.scoring.frozen import Autocast, frozen_logps


@final
class ModelReference(Scorer):
    """A frozen second module. `origin` says in words what it is."""

    kind = "ModelReference"

    def __init__(self, module: nn.Module, autocast: Autocast, *, origin: str) -> None:
        self.module: nn.Module = module
        self._autocast = autocast
        self._origin = origin

    @classmethod
    def capture(cls, policy: nn.Module, autocast: Autocast) -> Self:
        """A reference that is a copy of `policy` as it is now."""
        return cls(freeze(independent_copy(policy)), autocast, origin="a copy of the policy")

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`."""
        return frozen_logps(self.module, inputs_on_device_of(self.module, batch), self._autocast)

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`: the weights always are."""
        return contextlib.nullcontext()

    def models(self) -> Sequence[Share]:
        """See `Scorer.models`: its own."""
        return [(1.0, self.module)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: the module's weights."""
        return weight_tensors(self.module)

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        return Identity.of(self.module)

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return f"{self._origin}, a module of its own, {when}, fixed"


def inputs_on_device_of(module: nn.Module, batch: PairBatch) -> PairBatch:
    """`batch` with its model inputs on the device of `module`. The other tensors stay where they are, so log-probs come
    out on the batch's device. A module whose weights are on the meta device moves its inputs itself (accelerate)."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return batch
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def weight_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the weights of `module` are made of, by name: its parameters and, for layers that keep integers
    (quantised ones), scales and code books. Without these, W and 2 W would have the same codes."""
    yield from module.named_parameters()
    for name, child in module.named_modules():
        parameters = dict(child.named_parameters(recurse=False))
        if all(tensor.is_floating_point() for tensor in (*parameters.values(), *child.buffers(recurse=False))):
            continue
        for key, tensor in own_state(child).items():
            if key not in parameters:
                yield f"{name}.{key}", tensor


def freeze(module: nn.Module) -> nn.Module:
    """`module` itself, from now on in eval mode and without gradients."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return pin_quantised_layers(module.eval())


def independent_copy(policy: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with `policy`, not even through its forward pass.

    Where somebody replaced a `forward` by a plain function, the function closes over the original module: the copy
    would compute with the policy's weights. Then a ValueError names the module. Where the policy is sharded, so is the
    copy.
    """
    duplicate = sharded_copy(policy) if is_sharded(policy) else copy.deepcopy(policy)
    for name, child in duplicate.named_modules():
        forward = child.__dict__.get("forward")
        if isinstance(forward, types.MethodType) and forward.__self__ is child:
            continue
        if isinstance(forward, (types.FunctionType, types.MethodType)):
            raise ValueError(
                f"A copy of the policy was to be the reference, but `{name or type(policy).__name__}.forward` was "
                "replaced by a function that still runs the original's weights. Undo that patch before making the "
                "trainer, or pass a `ref_model` of your own."
            )
    return duplicate
