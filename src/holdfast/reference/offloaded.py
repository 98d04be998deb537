"""A reference module that is not needed for now: its weights in a file, its frame in memory.

Where log-probs were computed ahead, the module that gave them is asked again only for data that nobody announced. So it
takes no memory until then. What is kept is a frame of our own; a module that a user still holds stays as it is.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.reference.base import PER_BATCH, FixedReference
from holdfast.reference.identity import Identity
from holdfast.reference.model import beside
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.snapshot import holding
from holdfast.reference.tensor_file import KeptTensors
from holdfast.scoring.frozen import Autocast, frozen_logps


@final
class ParkedReference(FixedReference):
    """A frozen copy of `module` with its weights in the file `name` of `folder`. ValueError where that cannot be
    written."""

    def __init__(self, module: nn.Module, autocast: Autocast, *, folder: RunFolder, name: str, origin: str) -> None:
        super().__init__()
        self._autocast = autocast
        self._origin = origin
        self._frame = frame(module)
        self._weights = KeptTensors("disk", folder, name)
        self._weights.keep(dict(module.named_parameters()))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `Reference.held`."""
        if any(parameter.numel() for parameter in self._frame.parameters()):
            yield
            return
        weights = {
            name: value.to(self._frame.get_parameter(name).device, non_blocking=True)
            for name, value in self._weights.items()
        }
        with holding(self._frame, weights):
            yield

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`."""
        with self.held():
            return frozen_logps(self._frame, beside(self._frame, batch), self._autocast)

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Nothing to do: training does not change it."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """None in memory."""
        return iter(())

    def identity(self) -> Identity:
        """See `Reference.identity`."""
        with self.held():
            return Identity.of(self._frame)

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        return f"{self._origin}, its weights on disk, {asked}, fixed"

    @property
    def module(self) -> nn.Module | None:
        """None: it is no module without its weights."""
        return None


def frame(module: nn.Module) -> nn.Module:
    """A copy of `module` with empty parameters, so that no weight is copied; buffers are."""
    empty = {
        id(p): nn.Parameter(torch.empty(0, dtype=p.dtype, device=p.device), requires_grad=False)
        for p in module.parameters()
    }
    return copy.deepcopy(module, dict(empty)).eval()
