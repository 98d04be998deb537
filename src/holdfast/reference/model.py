"""The explicit reference: a second module, asked per batch. Fixed, or moved by TR-DPO.

Costs the memory of its weights and one forward pass per batch. It is a copy of the policy in memory, never read again
from a path, or a module that the user chose.
"""

import copy
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Self, final

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.reference.base import Autocast, Reference, digest, frozen_logps
from holdfast.reference.sync import Mixture, effective_copy, effective_parameters, is_adapted


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
        mix of their effective weights, not of their factors."""
        module = effective_copy(policy) if moves and is_adapted(policy) else independent_copy(policy)
        return cls(freeze(module), autocast, origin="a copy of the policy", policy=policy if moves else None)

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`."""
        return frozen_logps(self._module, batch, self._autocast)

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

    def prepare(self, datasets: Mapping[str, Iterable[PairBatch]]) -> None:
        """Nothing to do: it is asked per batch."""

    def release(self) -> None:
        """Nothing to do: it is a module of its own."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its parameters, and the fp32 state of a moving one whose weights are kept in a smaller dtype."""
        yield from self._module.named_parameters()
        yield from self._mixture.tensors()

    def fingerprint(self) -> str:
        """See `Reference.fingerprint`."""
        return digest(self._module.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The moved weights, in fp32 where their state is; empty while it has not moved."""
        if self.version == 0:
            return {}
        return dict(self._module.named_parameters()) | dict(self._mixture.tensors())

    def load_state_dict(self, state: Mapping[str, Tensor], version: int) -> None:
        """See `Reference.load_state_dict`."""
        self._mixture.restore(dict(self._module.named_parameters()), state)
        self.version = version

    def describe(self) -> str:
        """See `Reference.describe`."""
        motion = f"moved {self.version} times" if self._policy is not None else "fixed"
        return f"{self._origin}, a module of its own, asked per batch, {motion}"

    @property
    def module(self) -> nn.Module | None:
        """The reference module."""
        return self._module


def freeze(module: nn.Module) -> nn.Module:
    """`module` in eval mode, without gradients: what a reference stays for good."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return module.eval()


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
