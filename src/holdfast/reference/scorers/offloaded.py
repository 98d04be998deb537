"""A reference module that is not needed for now: its weights in a file, its frame in memory.

Where log-probs were computed ahead, the module that gave them is asked again only for data that nobody announced. So it
takes no memory until then. The frame is a copy; a module that a user still holds stays as it is.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.reference.base import Scorer
from holdfast.reference.identity.identity import Identity
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.exchange import exchanged
from holdfast.reference.scorers.model import beside
from holdfast.reference.tensor_file import TensorFile
from holdfast.scoring.frozen import Autocast, frozen_logps


@final
class OffloadedReference(Scorer):
    """A frozen copy of `module` with its weights in the file `name` of `folder`. ValueError where that cannot be
    written."""

    kind = "ParkedReference"

    def __init__(self, module: nn.Module, autocast: Autocast, *, folder: RunFolder, name: str, origin: str) -> None:
        self._autocast = autocast
        self._origin = origin
        self._frame = frame(module)
        self._file = TensorFile(folder, name)
        self._file.write(dict(module.named_parameters()))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """See `Scorer.in_place`: the weights are read from the file."""
        if any(parameter.numel() for parameter in self._frame.parameters()):
            yield
            return
        parameters = {
            name: value.to(self._frame.get_parameter(name).device, non_blocking=True)
            for name, value in self._file.items()
        }
        with exchanged(self._frame, parameters):
            yield

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`."""
        with self.in_place():
            return frozen_logps(self._frame, beside(self._frame, batch), self._autocast)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: none in memory."""
        return iter(())

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        with self.in_place():
            return Identity.of(self._frame)

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return f"{self._origin}, its weights on disk, {when}, fixed"


def frame(module: nn.Module) -> nn.Module:
    """A copy of `module` with empty parameters, so that no weight is copied; buffers are."""
    empty = {
        id(p): nn.Parameter(torch.empty(0, dtype=p.dtype, device=p.device), requires_grad=False)
        for p in module.parameters()
    }
    return copy.deepcopy(module, dict(empty)).eval()
