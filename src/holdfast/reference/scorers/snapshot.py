"""The reference as a snapshot: the first values of the policy's trainable tensors, put in place to score.

A reference differs from the policy only in the tensors that train. So full fine-tuning needs no second module, a partly
frozen model needs the values of its trainable part alone, and a LoRA a few megabytes. The values are on the policy's
device, in host memory or in a file. To score, the parameters' values are exchanged, so optimizer, gradients and graphs
stay as they are. Where parameters are spread over processes, each process keeps and exchanges its own part of them.

Until training is about to change the policy, the policy *is* the reference, and nothing is copied. The cost is a
forward pass per batch. Values in host memory or a file are moved to the device once per `in_place` as well (see
`sources.window`). Snapshots that move are in `reference.moving`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import final

from torch import Tensor, nn

from holdfast.policy.sharding import cut_like, is_part, own_part, parameters_of, whole_from_part
from holdfast.reference.base import InsidePolicy, LateCopy
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.exchange import exchanged
from holdfast.reference.tensor_file import SnapshotDevice, own_tensors
from holdfast.scoring.frozen import Autocast


class ExactSnapshot(InsidePolicy, LateCopy):
    """The policy with values that its trainable tensors once had, exactly. A subclass says whether they move."""

    kind = "SnapshotReference"

    def __init__(self, policy: nn.Module, autocast: Autocast, *, device: SnapshotDevice, folder: RunFolder) -> None:
        super().__init__(policy, autocast)
        self.is_off_device = device != "device"
        self.where = where(device, folder)
        self.values = own_tensors(device, folder, "snapshot.safetensors")
        self.exchange = Exchange(lambda: exchanged(policy, like_parameters(policy, dict(self.values.items()))))

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`."""
        return self.exchange.in_place()

    def before_policy_changes(self) -> None:
        """See `LateCopy.before_policy_changes`. ValueError where a file cannot be written."""
        if self.exchange.is_policy:
            self.values.write(trainable(self.policy))
            self.exchange.is_policy = False

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: none while the reference is the policy, and none where the values are in a file."""
        if not self.exchange.is_policy:
            yield from self.values.in_memory().items()


@final
class SnapshotReference(ExactSnapshot):
    """The policy with the first values of its trainable tensors; fixed."""

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return description(self.where, when, "fixed")


@final
class Exchange:
    """Puts a reference's values in the policy's place, by the context that `exchange` returns. While `is_policy`, the
    policy is the reference, and nothing is exchanged."""

    def __init__(self, exchange: Callable[[], AbstractContextManager[None]]) -> None:
        self.is_policy = True
        self._exchange = exchange
        self._is_in_place = False

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """See `Scorer.in_place`. `exchange` is entered once."""
        if self.is_policy or self._is_in_place:
            yield
            return
        self._is_in_place = True
        try:
            with self._exchange():
                yield
        finally:
            self._is_in_place = False


def trainable(policy: nn.Module) -> dict[str, Tensor]:
    """The policy's trainable tensors, by name: this process's part of each."""
    return {name: own_part(parameter) for name, parameter in parameters_of(policy).items() if parameter.requires_grad}


def like_parameters(policy: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values, each on the device and in the dtype of the policy's parameter of that name."""
    converted: dict[str, Tensor] = {}
    for name, value in values.items():
        parameter = policy.get_parameter(name)
        converted[name] = value.to(parameter.device, non_blocking=True).to(parameter.dtype)
    return converted


def whole_state(policy: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole values of which `parts` are this process's parts; those that are spread over processes are gathered
    into host memory, one at a time. Names that are none of the policy's parameters are whole already."""
    parameters, state = parameters_of(policy), dict(parts)
    for name, part in parts.items():
        if name in parameters and is_part(parameters[name]):
            state[name] = whole_from_part(part, parameters[name]).cpu()
    return state


def parts_of_state(policy: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of whole values of the policy's parameters, each on its parameter's device."""
    parameters = parameters_of(policy)
    return {name: cut_like(value, parameters[name]).to(parameters[name].device) for name, value in state.items()}


def where(device: SnapshotDevice, folder: RunFolder) -> str:
    """In words, where a snapshot's values are."""
    return {"device": "on the policy's device", "cpu": "in host memory", "disk": f"in {folder.root}"}[device]


def description(where: str, when: str, motion: str) -> str:
    """The line by which every kind of snapshot describes itself."""
    return f"the policy as it starts to train: its trainable tensors kept {where}, {when}, {motion}"
