"""A reference module whose weights are in a file while they are not needed.

Where log-probs were computed ahead, the module that computed them is asked again only for data that nobody announced.
Until then only a copy of the module with empty parameters is in memory. The module itself is not changed, since the
user may still hold it. Only of a sharded module, which computes in all processes together or not at all, the memory of
this process's parts is freed, and its file has these parts. Given up: quantised modules, whose state a file of tensors
does not hold.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Self, final

import torch
from torch import Tensor, nn

from holdfast.agreement import raised_together
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.internals.deepspeed import is_partitioned, own_memory
from holdfast.internals.fully_shard import replace_tensors
from holdfast.policy.sharding import is_sharded, own_part, parameters_of
from holdfast.reference.base import Scorer, Share
from holdfast.reference.identity.identity import Identity
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.exchange import exchanged
from holdfast.reference.scorers.model import inputs_on_device_of
from holdfast.reference.tensor_file import TensorFile
from holdfast.scoring.frozen import Autocast, frozen_logps


@final
class OffloadedReference(Scorer):
    """A module without values in its parameters, which are in `file`. `origin` says in words which model it is."""

    kind = "ParkedReference"

    def __init__(self, empty_module: nn.Module, autocast: Autocast, *, file: TensorFile, origin: str) -> None:
        self._module = empty_module
        self._autocast = autocast
        self._file = file
        self._origin = origin
        self._storages: list[tuple[torch.UntypedStorage, int]] = []
        self._is_in_place = False

    @classmethod
    def offload(cls, module: nn.Module, autocast: Autocast, *, folder: RunFolder, name: str, origin: str) -> Self:
        """The reference that is `module`, with its weights in the file `name` of `folder`. ValueError where the file
        cannot be written."""
        file = TensorFile(folder, name)
        with raised_together(where=is_sharded(module)):
            file.write({name: own_part(parameter) for name, parameter in parameters_of(module).items()})
        if not is_sharded(module):
            return cls(without_weights(module), autocast, file=file, origin=origin)
        reference = cls(module, autocast, file=file, origin=origin)
        reference._free()
        return reference

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """See `Scorer.in_place`: the weights are read from the file on entering."""
        if self._is_in_place:
            yield
            return
        self._is_in_place = True
        try:
            with self._parts_in_place() if self._storages else self._whole_in_place():
                yield
        finally:
            self._is_in_place = False

    def _free(self) -> None:
        """Frees the memory of this process's parts of a sharded module."""
        storages = self._storages_of_parts()
        if not all(storage.resizable() for storage in storages):  # numpy has read it, for a digest
            of_zero = [*filter(is_partitioned, self._module.parameters())]
            for parameter in of_zero:
                own_memory(parameter)
            if not of_zero:
                replace_tensors(self._module, Tensor.clone)
            storages = self._storages_of_parts()
        self._storages = [(storage, storage.nbytes()) for storage in storages]
        for storage, _ in self._storages:
            storage.resize_(0)

    def _storages_of_parts(self) -> list[torch.UntypedStorage]:
        return [own_part(parameter).untyped_storage() for parameter in parameters_of(self._module).values()]

    @contextlib.contextmanager
    def _parts_in_place(self) -> Iterator[None]:
        for storage, num_bytes in self._storages:
            storage.resize_(num_bytes)
        parameters = parameters_of(self._module)
        with raised_together(), torch.no_grad():
            for name, value in self._file.items():
                own_part(parameters[name]).copy_(value)
        try:
            yield
        finally:
            self._free()

    @contextlib.contextmanager
    def _whole_in_place(self) -> Iterator[None]:
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

    def models(self) -> Sequence[Share]:
        """See `Scorer.models`: its own."""
        return [(1.0, self._module)]

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
