"""The reference as a snapshot: the first values of the policy's trainable tensors, put in place to score.

A reference differs from the policy only in what trains, so full fine-tuning needs no second module and a partly frozen
model only the values of its trained part. They are held on the policy's device, in host memory or in a file, and
exchanged by storage, so optimizer, gradients and graphs stay as they are. Costs a forward pass per batch and, from host
memory or file, moving the values each time; a window of batches per exchange would be cheaper.

Captured when training begins, not before: until then the policy is the reference.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, final

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.reference.base import Autocast, Reference, digest, frozen_logps
from holdfast.reference.sync import Mixture, is_adapted

Place = Literal["device", "cpu", "disk"]


@final
class SnapshotReference(Reference):
    """The policy with the values that its trainable tensors had when training began, held at `place`; `file` is where
    those on `disk` go."""

    def __init__(self, policy: nn.Module, autocast: Autocast, *, place: Place, file: Path, moves: bool = False) -> None:
        self.version = 0
        self.drift = 0.0
        self._policy = policy
        self._autocast = autocast
        self._place = place
        self._file = file
        self._moves = moves
        self._values: dict[str, Tensor] = {}
        self._is_captured = False
        self._mixture = Mixture()

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """Within it the policy's module computes as the reference; undone on leaving, exceptions included."""
        with holding(self._policy, self._on_device()):
            yield

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`."""
        with self.null_ref_context():
            return frozen_logps(self._policy, batch, self._autocast)

    def sync(self, mixup_alpha: float) -> None:
        """See `Reference.sync`."""
        if not self._moves:
            raise ValueError(
                f"A sync (alpha {mixup_alpha}) was asked of a fixed snapshot. Set sync_ref_model=True when the trainer "
                "is made."
            )
        self.drift = self._mixture.move(self._values, self._trainable(), mixup_alpha)
        self.version += 1

    def prepare(self, datasets: Mapping[str, Iterable[PairBatch]]) -> None:
        """Nothing to do: it is asked per batch."""

    def release(self) -> None:
        """Captures the policy, once. ValueError where its file cannot be written."""
        if self._is_captured:
            return
        values = {name: parameter.detach() for name, parameter in self._trainable().items()}
        if self._place == "disk":
            self._write(values)
        elif self._place == "cpu":
            self._values = {name: _in_host_memory(value) for name, value in values.items()}
        else:
            self._values = {name: value.clone() for name, value in values.items()}
        self._is_captured = True

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The kept values, and the fp32 state of a moving one; none before training, and none of a file."""
        yield from self._values.items()
        yield from self._mixture.tensors()

    def fingerprint(self) -> str:
        """See `Reference.fingerprint`."""
        values = self._on_device()
        return digest((name, values.get(name, p)) for name, p in self._policy.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The moved values; empty while it has not moved."""
        return dict(self.tensors()) if self.version else {}

    def load_state_dict(self, state: Mapping[str, Tensor], version: int) -> None:
        """See `Reference.load_state_dict`."""
        self._mixture.restore(self._values, state)
        self.version = version

    def describe(self) -> str:
        """See `Reference.describe`."""
        where = {"device": "the policy's device", "cpu": "host memory", "disk": str(self._file)}[self._place]
        motion = f"moved {self.version} times" if self._moves else "fixed"
        return f"the policy as it starts to train: its trainable tensors kept in {where}, asked per batch, {motion}"

    @property
    def module(self) -> nn.Module | None:
        """None: the module is the policy's."""
        return None

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._policy.named_parameters() if p.requires_grad}

    def _on_device(self) -> dict[str, Tensor]:
        """The values where the policy's tensors are; empty before training."""
        if not self._is_captured:
            return {}
        values = load_file(self._file) if self._place == "disk" else self._values
        return {
            name: value.to(self._policy.get_parameter(name).device, non_blocking=True) for name, value in values.items()
        }

    def _write(self, values: Mapping[str, Tensor]) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in values.items()}, self._file)
        except OSError as error:
            num_bytes = sum(value.numel() * value.element_size() for value in values.values())
            raise ValueError(
                f"The reference was to be kept in {self._file} ({num_bytes} bytes), which cannot be written: {error}. "
                "Choose an output_dir with room, or snapshot_device='cpu'."
            ) from error


def check_snapshot(policy: nn.Module, place: str, *, moves: bool) -> None:
    """ValueError where a snapshot of `policy` at `place` cannot move as asked."""
    if moves and is_adapted(policy):
        raise ValueError(
            "sync_ref_model=True was asked for with reference='snapshot' of an adapter: the mix of its factors is not "
            "the mix of two models. Use reference='model', whose weights move in effective (merged) space."
        )
    if moves and place == "disk":
        raise ValueError(
            "sync_ref_model=True was asked for with snapshot_device='disk': every sync would write the whole file. Use "
            "snapshot_device='cpu' or 'device'."
        )


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


def _in_host_memory(value: Tensor) -> Tensor:
    """A copy, pinned where it has to travel to an accelerator."""
    copy = value.to("cpu", copy=True)
    return copy.pin_memory() if value.is_cuda else copy
