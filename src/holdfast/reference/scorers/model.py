"""The explicit reference: a second module, asked per batch; fixed.

Costs the memory of its weights and one forward pass per batch. It is a copy of the policy in memory, never read again
from a path, or a module that the user chose: in whatever dtype, quantised or not, on whatever device. The batch's ids
travel to it, its log-probs back. One that moves is in `reference.moving.model`.
"""

import contextlib
import copy
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Self, final

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.internals.torch import own_state
from holdfast.policy.quantised import pin_quantised_layers
from holdfast.reference.base import Scorer
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
        return frozen_logps(self.module, beside(self.module, batch), self._autocast)

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`: its weights always are."""
        return contextlib.nullcontext()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: its weights."""
        return weight_tensors(self.module)

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        return Identity.of(self.module)

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return f"{self._origin}, a module of its own, {when}, fixed"


def beside(module: nn.Module, batch: PairBatch) -> PairBatch:
    """`batch` with its model inputs on the device where `module` takes them. The rest stays, and so do log-probs: they
    come out where the batch is. A module with offloaded weights fetches its inputs itself."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return batch
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def weight_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that the values of `module`'s weights depend on, by name: its parameters and, of layers that keep integers
    (quantised ones), their scales and code books too, without which W and 2 W would be the same codes."""
    yield from module.named_parameters()
    for name, part in module.named_modules():
        parameters = dict(part.named_parameters(recurse=False))
        if all(tensor.is_floating_point() for tensor in (*parameters.values(), *part.buffers(recurse=False))):
            continue
        for key, tensor in own_state(part).items():
            if key not in parameters:
                yield f"{name}.{key}", tensor


def freeze(module: nn.Module) -> nn.Module:
    """`module` in eval mode, without gradients: what a reference stays for good."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return pin_quantised_layers(module.eval())


def independent_copy(policy: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with `policy`, its forward pass included.

    A `forward` that somebody replaced by a plain function closes over the original, so the copy would go on running
    the policy's weights. ValueError names the module.
    """
    duplicate = copy.deepcopy(policy)
    for name, part in duplicate.named_modules():
        forward = part.__dict__.get("forward")
        if isinstance(forward, types.MethodType) and forward.__self__ is part:
            continue
        if isinstance(forward, (types.FunctionType, types.MethodType)):
            raise ValueError(
                f"A copy of the policy was to be the reference, but `{name or type(policy).__name__}.forward` was "
                "replaced by a function that still runs the original's weights. Undo that patch before making the "
                "trainer, or pass a `ref_model` of your own."
            )
    return duplicate
