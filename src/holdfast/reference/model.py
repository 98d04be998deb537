"""The explicit reference: a second module, asked per batch. Fixed, or moved by TR-DPO.

Costs the memory of its weights and one forward pass per batch. It is a copy of the policy in memory, never read again
from a path, or a module that the user chose: in whatever dtype, quantised or not, on whatever device. The batch's ids
travel to it, its log-probs back.
"""

import contextlib
import copy
import types
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Self, final

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.internals.torch import own_state
from holdfast.policy.adapters import is_adapted
from holdfast.policy.quantised import is_quantised, pin_quantised_layers
from holdfast.reference.base import PER_BATCH, Reference
from holdfast.reference.identity import Identity
from holdfast.reference.moving.average import Mixture, effective_copy, effective_parameters
from holdfast.scoring.frozen import Autocast, frozen_logps


@final
class ModelReference(Reference):
    """A frozen second module.

    `policy` is what a sync moves towards; None for a reference that must stay where it is.
    """

    def __init__(self, module: nn.Module, autocast: Autocast, *, origin: str, policy: nn.Module | None = None) -> None:
        self.version = 0
        self.drift = 0.0
        self._module = module
        self._autocast = autocast
        self._origin = origin
        self._policy = policy
        self._mixture = Mixture()

    @classmethod
    def capture(cls, policy: nn.Module, autocast: Autocast, *, moves: bool) -> Self:
        """A reference that is `policy` as it is now. One that moves under PEFT is held merged: a mix of models is the
        mix of their effective weights, not of their factors. ValueError where those weights are quantised."""
        if moves:
            _check_mergeable(policy)
        module = effective_copy(policy) if moves and is_adapted(policy) else independent_copy(policy)
        return cls(freeze(module), autocast, origin="a copy of the policy", policy=policy if moves else None)

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`."""
        return frozen_logps(self._module, beside(self._module, batch), self._autocast)

    def held(self) -> AbstractContextManager[None]:
        """See `Reference.held`; nothing is put in place."""
        return contextlib.nullcontext()

    def sync(self, mixup_alpha: float) -> None:
        """See `Reference.sync`."""
        if self._policy is None:
            raise ValueError(
                f"A sync (alpha {mixup_alpha}) was asked of a fixed reference ({self._origin}). "
                "Set sync_ref_model=True when the trainer is made."
            )
        self.drift = self._mixture.move(
            dict(self._module.named_parameters()), effective_parameters(self._policy), mixup_alpha
        )
        self.version += 1

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Nothing to do: it is asked per batch."""

    def release(self) -> None:
        """Nothing to do: it is a module of its own."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights, and the fp32 state of a moving one whose weights are kept in a smaller dtype."""
        yield from weights(self._module)
        yield from self._mixture.tensors()

    def identity(self) -> Identity:
        """See `Reference.identity`."""
        return Identity.of(self._module)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of one that moves, in fp32 where their state is; empty for a fixed one."""
        if self._policy is None:
            return {}
        return dict(self._module.named_parameters()) | dict(self._mixture.tensors())

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """See `Reference.load_state_dict`."""
        self._mixture.restore(dict(self._module.named_parameters()), state)
        self.version, self.drift = version, drift

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        motion = f"moved {self.version} times" if self._policy is not None else "fixed"
        return f"{self._origin}, a module of its own, {asked}, {motion}"

    @property
    def module(self) -> nn.Module | None:
        """The reference module."""
        return self._module


def beside(module: nn.Module, batch: PairBatch) -> PairBatch:
    """`batch` with its model inputs on the device where `module` takes them. The rest stays, and so do log-probs: they
    come out where the batch is. A module with offloaded weights fetches its inputs itself."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return batch
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
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


def _check_mergeable(policy: nn.Module) -> None:
    if is_quantised(policy):
        name = next(name for name, parameter in policy.named_parameters() if not parameter.is_floating_point())
        raise ValueError(
            "A moving copy of the policy was to be the reference, but the policy is quantised: adapters cannot be "
            f"merged into `{name}` without rounding, so the copy would not be the policy. Leave `reference` at 'auto', "
            "which moves the adapters inside the policy, or use sync_ref_model=False."
        )


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
