"""The reference as a snapshot: other values for the policy's trainable tensors, put in place to score.

A reference differs from the policy only in what trains, so full fine-tuning needs no second module, a partly frozen
model only the values of its trained part, and a LoRA its own few megabytes. They are kept on the policy's device, in
host memory or in a file, and exchanged by storage, so optimizer, gradients and graphs stay as they are. Costs a forward
pass per batch and, from host memory or file, moving the values, once per `held` (see `reference.windowed`).

Until training is about to change it, the policy *is* the reference: before the first step, and again after a hard sync.
Only then are its values copied. A soft sync mixes plain tensors as they are and LoRA factors by their products; the
state of a moving reference is fp32.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, final

import torch
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.policy.adapters import is_adapted
from holdfast.reference.base import PER_BATCH, Reference
from holdfast.reference.identity import Identity
from holdfast.reference.moving import lora_products as products
from holdfast.reference.moving.average import Mixture
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.tensor_file import KeptTensors, Place
from holdfast.scoring.frozen import Autocast, frozen_logps

Motion = Literal["fixed", "hard", "soft"]
"""Whether a reference stays, is set to the policy at every sync (alpha = 1), or mixed with it."""


@final
class SnapshotReference(Reference):
    """The policy with the values that its trainable tensors had when training began, and after every sync since."""

    def __init__(
        self, policy: nn.Module, autocast: Autocast, *, place: Place, folder: RunFolder, motion: Motion = "fixed"
    ) -> None:
        self.version = 0
        self.drift = 0.0
        self._policy = policy
        self._autocast = autocast
        self._motion: Motion = motion
        self._where = {"device": "on the policy's device", "cpu": "in host memory", "disk": f"in {folder.root}"}[place]
        self._tensors = KeptTensors(place, folder, "snapshot.safetensors")
        self._products = KeptTensors(place, folder, "products.safetensors")
        self._is_policy = True
        self._is_in_place = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `Reference.held`."""
        if self._is_policy or self._is_in_place:
            yield
            return
        self._is_in_place = True
        try:
            with holding(self._policy, self._values_in_place()):
                yield
        finally:
            self._is_in_place = False

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """Within it the policy's module computes as the reference; undone on leaving, exceptions included."""
        with self.held():
            yield

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`."""
        with self.held():
            return frozen_logps(self._policy, batch, self._autocast)

    @torch.no_grad()
    def sync(self, mixup_alpha: float) -> None:
        """See `Reference.sync`."""
        if self._motion == "fixed" or (self._motion == "hard") != (mixup_alpha == 1):
            raise ValueError(
                f"A sync (alpha {mixup_alpha}) was asked of a snapshot that was made for another motion "
                f"({self._motion}). Set sync_ref_model and ref_model_mixup_alpha when the trainer is made."
            )
        self.release()
        if self._motion == "hard":
            self.drift = _distance(self._plain(), self._tensors.items())
            self._is_policy = True
        else:
            squares = 0.0
            if self._product_names():
                moved, squares = products.moved(self._policy, dict(self._products.items()), mixup_alpha)
                self._products.keep(moved)
            policy, lengths = self._plain(), [math.sqrt(squares)]
            self._tensors.change(lambda name, value: lengths.append(Mixture().move({name: value}, policy, mixup_alpha)))
            self.drift = math.hypot(*lengths)
        self.version += 1

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Nothing to do: it is asked per batch or window."""

    def release(self) -> None:
        """Copies the policy, where it is the reference. ValueError where a file cannot be written."""
        if self._is_policy:
            tensors, factors = self._of_policy()
            self._tensors.keep(tensors)
            if factors:
                self._products.keep(factors)
            self._is_policy = False

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What it holds in memory: none while it is the policy, and none of a file."""
        if not self._is_policy:
            yield from self._tensors.in_memory().items()
            yield from self._products.in_memory().items()

    def identity(self) -> Identity:
        """See `Reference.identity`."""
        with self.held():
            return Identity.of(self._policy)

    def state_dict(self) -> dict[str, Tensor]:
        """The values of one that moves; empty for a fixed one."""
        if self._motion == "fixed":
            return {}
        if self._is_policy:
            tensors, factors = self._of_policy()
            return tensors | factors
        return dict([*self._tensors.items(), *self._products.items()])

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """See `Reference.load_state_dict`."""
        if state:
            names = self._plain().keys()
            self._tensors.keep({name: self._beside(name, state[name]) for name in names})
            factors = {name: value for name, value in state.items() if name not in names}
            if factors:
                device = next(self._policy.parameters()).device
                self._products.keep({name: value.to(device) for name, value in factors.items()})
            self._is_policy = False
        self.version, self.drift = version, drift

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        motion = "fixed" if self._motion == "fixed" else f"moved {self.version} times"
        return f"the policy as it starts to train: its trainable tensors kept {self._where}, {asked}, {motion}"

    @property
    def module(self) -> nn.Module | None:
        """None: the module is the policy's."""
        return None

    def _product_names(self) -> set[str]:
        """The parameters that are factors of products, which a soft sync cannot mix one by one."""
        return products.names(self._policy) if self._motion == "soft" and is_adapted(self._policy) else set()

    def _plain(self) -> dict[str, Tensor]:
        """The policy's trainable tensors less factors of products."""
        factors = self._product_names()
        return {
            name: p.detach() for name, p in self._policy.named_parameters() if p.requires_grad and name not in factors
        }

    def _of_policy(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The policy as this reference keeps it: plain tensors, and the state of its products."""
        tensors = self._plain()
        if self._motion == "soft":
            tensors = {name: value.float() for name, value in tensors.items()}
        return tensors, products.captured(self._policy) if self._product_names() else {}

    def _values_in_place(self) -> dict[str, Tensor]:
        values = {name: self._beside(name, value) for name, value in self._tensors.items()}
        values = {name: value.to(self._policy.get_parameter(name).dtype) for name, value in values.items()}
        if self._product_names():
            values |= products.in_place(self._policy, dict(self._products.items()))
        return values

    def _beside(self, name: str, value: Tensor) -> Tensor:
        """`value` where the policy's tensor of that name is."""
        return value.to(self._policy.get_parameter(name).device, non_blocking=True)


def _distance(ours: Mapping[str, Tensor], theirs: Iterable[tuple[str, Tensor]]) -> float:
    """L2, in weight space."""
    squares = (
        float((ours[name].float() - value.to(ours[name].device).float()).double().square().sum())
        for name, value in theirs
    )
    return math.sqrt(sum(squares))


@contextlib.contextmanager
def holding(policy: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The named parameters of `policy` with other values. Storage is exchanged, not copied: graphs that were built
    before keep their parameters, which hold their own values again before any backward pass."""
    parameters = {name: policy.get_parameter(name) for name in values}
    sharded = [name for name, parameter in parameters.items() if hasattr(parameter, "full_tensor")]
    if sharded:
        raise ValueError(
            "A frozen copy of the trainable tensors was to be put in place of the policy's, but these are sharded "
            f"(`{sharded[0]}` first), and FSDP would go on computing with the policy's. Use reference='precomputed', "
            "or train without sharding."
        )
    current = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = current[name]
