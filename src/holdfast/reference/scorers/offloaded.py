"""A reference module whose weights are in a file while they are not needed.

Where log-probs were computed ahead, the module that computed them is asked again only for data that nobody announced.
Until then only a copy of the module with empty parameters is in memory. The module itself is not changed, since the
user may still hold it. Given up: quantised modules, whose state a file of tensors does not hold.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Self, final

import torch
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.reference.base import Scorer
from holdfast.reference.identity.identity import Identity
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.exchange import exchanged
from holdfast.reference.scorers.model import inputs_on_device_of
from holdfast.reference.tensor_file import TensorFile
from holdfast.scoring.frozen import Autocast, frozen_logps


@final
class OffloadedReference(Scorer):
    """A module with empty parameters, and their values in `file`. `origin` says in words which model it is."""

    kind = "ParkedReference"

    def __init__(self, empty_module: nn.Module, autocast: Autocast, *, file: TensorFile, origin: str) -> None:
        self._module = empty_module
        self._autocast = autocast
        self._file = file
        self._origin = origin

    @classmethod
    def offload(cls, module: nn.Module, autocast: Autocast, *, folder: RunFolder, name: str, origin: str) -> Self:
        """The reference that is `module`, with its weights in the file `name` of `folder`. ValueError where the file
        cannot be written."""
        file = TensorFile(folder, name)
        file.write(dict(module.named_parameters()))
        return cls(without_weights(module), autocast, file=file, origin=origin)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """See `Scorer.in_place`: the weights are read from the file on entering."""
        if any(parameter.numel() for parameter in self._module.parameters()):
            yield
            return
        parameters = {
            name: value.to(self._module.get_parameter(name).device, non_blocking=True)
            for name, value in self._file.items()
        }
        with exchanged(self._module, parameters):
            yield

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`."""
        with self.in_place():
            return frozen_logps(self._module, inputs_on_device_of(self._module, batch), self._autocast)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: none."""
        return iter(())

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        with self.in_place():
            return Identity.of(self._module)

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return f"{self._origin}, its weights on disk, {when}, fixed"


def without_weights(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters are empty and whose buffers are copies."""
    empty = {
        id(p): nn.Parameter(torch.empty(0, dtype=p.dtype, device=p.device), requires_grad=False)
        for p in module.parameters()
    }
    return copy.deepcopy(module, dict(empty)).eval()
