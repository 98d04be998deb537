"""The reference as a snapshot: the first values of the policy's trainable tensors, put in place to score.

A reference differs from the policy only in what trains. So full fine-tuning needs no second module, a partly frozen
model only the values of its trained part, and a LoRA its own few megabytes. The values are kept on the policy's device,
in host memory or in a file, and exchanged by storage, so optimizer, gradients and graphs stay as they are.

Until training is about to change the policy, the policy *is* the reference, and nothing is copied. The cost is a
forward pass per batch. Values in host memory or a file are moved to the device once per `in_place` as well (see
`sources.window`). Snapshots that move are in `reference.moving`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import final

from torch import Tensor, nn

from holdfast.reference.base import Captured, InsidePolicy
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.exchange import exchanged
from holdfast.reference.tensor_file import Place, own_tensors
from holdfast.scoring.frozen import Autocast


@final
class SnapshotReference(InsidePolicy, Captured):
    """The policy with the values that its trainable tensors had when training began; fixed."""

    kind = "SnapshotReference"

    def __init__(self, policy: nn.Module, autocast: Autocast, *, place: Place, folder: RunFolder) -> None:
        super().__init__(policy, autocast)
        self.comes_from_afar = place != "device"
        self._where = where(place, folder)
        self._values = own_tensors(place, folder, "snapshot.safetensors")
        self._exchange = Exchange(policy, lambda: beside_policy(policy, dict(self._values.items())))

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`."""
        return self._exchange.in_place()

    def before_policy_changes(self) -> None:
        """See `Captured.before_policy_changes`. ValueError where a file cannot be written."""
        if self._exchange.is_policy:
            self._values.write(trainable(self.policy))
            self._exchange.is_policy = False

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: none while it is the policy, and none of a file."""
        if not self._exchange.is_policy:
            yield from self._values.in_memory().items()

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return description(self._where, when, "fixed")


@final
class Exchange:
    """The policy with the reference's values in place, or as it is while `is_policy`: while it is the reference."""

    def __init__(self, policy: nn.Module, values: Callable[[], Mapping[str, Tensor]]) -> None:
        self.is_policy = True
        self._policy = policy
        self._values = values
        self._is_in_place = False

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """See `Scorer.in_place`; `values()` is asked once."""
        if self.is_policy or self._is_in_place:
            yield
            return
        self._is_in_place = True
        try:
            with exchanged(self._policy, self._values()):
                yield
        finally:
            self._is_in_place = False


def trainable(policy: nn.Module) -> dict[str, Tensor]:
    """The policy's trainable tensors, by name."""
    return {name: parameter.detach() for name, parameter in policy.named_parameters() if parameter.requires_grad}


def beside_policy(policy: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values on the devices, and in the dtypes, of the policy's parameters of these names."""
    placed: dict[str, Tensor] = {}
    for name, value in values.items():
        own = policy.get_parameter(name)
        placed[name] = value.to(own.device, non_blocking=True).to(own.dtype)
    return placed


def where(place: Place, folder: RunFolder) -> str:
    """The place in words."""
    return {"device": "on the policy's device", "cpu": "in host memory", "disk": f"in {folder.root}"}[place]


def description(where: str, when: str, motion: str) -> str:
    """What every snapshot says of itself, in one line."""
    return f"the policy as it starts to train: its trainable tensors kept {where}, {when}, {motion}"
