"""A snapshot that every sync sets to the policy (TR-DPO with alpha = 1).

After a sync the policy is the reference again, until training changes the policy. So no mix is computed, and adapters
of every kind can be held this way. Batches that are scored before the next step are scored by the policy itself.
Given up: a mixup alpha below 1 (see `moving.soft_snapshot`).
"""

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from holdfast.policy.sharding import own_part, parameters_of, total
from holdfast.reference.base import Moving
from holdfast.reference.moving.squares import read
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.snapshot import ExactSnapshot, description, parts_of_state, trainable, whole_state
from holdfast.reference.tensor_file import OwnTensors, SnapshotDevice
from holdfast.scoring.frozen import Autocast


@final
class HardSnapshot(ExactSnapshot, Moving):
    """The policy with the values of its trainable tensors at the last sync, or before the first at the start."""

    def __init__(self, policy: nn.Module, autocast: Autocast, *, device: SnapshotDevice, folder: RunFolder) -> None:
        super().__init__(policy, autocast, device=device, folder=folder)
        self.version = 0
        self.drift = 0.0

    @torch.no_grad()
    def sync(self, mixup_alpha: float) -> None:
        """See `Moving.sync`. ValueError where alpha is not 1."""
        if mixup_alpha != 1:
            raise ValueError(
                f"A sync (alpha {mixup_alpha}) was asked of a snapshot that was made for another motion "
                "(hard). Set sync_ref_model and ref_model_mixup_alpha when the trainer is made."
            )
        self.before_policy_changes()
        self.drift = _distance(self.policy, self.values)
        self.exchange.is_policy = True
        self.version += 1

    def parts(self) -> dict[str, Tensor]:
        """See `Moving.parts`: the values, which are the policy's tensors while the reference is the policy."""
        return trainable(self.policy) if self.exchange.is_policy else dict(self.values.items())

    def state_dict(self) -> dict[str, Tensor]:
        """See `Moving.state_dict`."""
        return whole_state(self.policy, self.parts())

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """See `Moving.load_state_dict`."""
        if state:
            self.values.write(parts_of_state(self.policy, {name: state[name] for name in trainable(self.policy)}))
            self.exchange.is_policy = False
        self.version, self.drift = version, drift

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return description(self.where, when, f"moved {self.version} times")


def _distance(policy: nn.Module, reference: OwnTensors) -> float:
    """L2 distance of policy and reference in weight space. One tensor of a file is in memory at a time."""
    parameters = parameters_of(policy)

    def square(name: str, theirs: Tensor) -> Tensor:
        ours = own_part(parameters[name])
        theirs = theirs.to(ours.device, non_blocking=True)
        return (ours.float() - theirs.float()).double().square().sum()

    squares = {name: square(name, value) for name, value in reference.items()}
    values = zip(squares, read(list(squares.values())), strict=True)
    return math.sqrt(total((parameters[name], value) for name, value in values))
