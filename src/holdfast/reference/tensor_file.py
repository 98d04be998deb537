"""A reference's own tensors by name: on the accelerator, in host memory or in a file.

A file has the format safetensors. It is read, and changed in place, one tensor at a time. It is never mapped: the pages
of a map stay resident beside the tensors that are made from them, while a buffer reuses memory that gradients have
freed. The digest of each tensor stays in memory and is compared whenever the tensor is read.

Given up: a file outlives no process. It lies in a folder of its own (see `reference.run_folder`), and a resumed run
finds its tensors in the checkpoint.
"""

import abc
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, final

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from holdfast.reference.host_copies import host_copies
from holdfast.reference.identity.digests import tensor_digest, tensor_digests
from holdfast.reference.run_folder import RunFolder

SnapshotDevice = Literal["device", "cpu", "disk"]
"""Where tensors are: on the device that they come from, in host memory, or in a file."""


class OwnTensors(abc.ABC):
    """Tensors by name that belong to a reference."""

    @abc.abstractmethod
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Replaces all tensors by copies of `values`. ValueError where there is no room."""

    @abc.abstractmethod
    def items(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors by name. ValueError where a tensor is not the one that was written."""

    @abc.abstractmethod
    def change(self, change: Callable[[str, Tensor], None]) -> None:
        """Calls `change` with the name and the value of each tensor. What it changes in the value is stored."""

    @abc.abstractmethod
    def in_memory(self) -> Mapping[str, Tensor]:
        """The tensors that are in memory."""


def own_tensors(device: SnapshotDevice, folder: RunFolder, name: str) -> OwnTensors:
    """An empty holder of tensors on `device`. On `disk` they go to the file `name` of `folder`."""
    return TensorFile(folder, name) if device == "disk" else TensorMemory(in_host_memory=device == "cpu")


@final
class TensorMemory(OwnTensors):
    """Tensors in memory: on the device that they come from, or in host memory."""

    def __init__(self, *, in_host_memory: bool) -> None:
        self._in_host_memory = in_host_memory
        self._values: dict[str, Tensor] = {}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """See `OwnTensors.write`."""
        values = {name: value.detach() for name, value in values.items()}
        self._values = (
            host_copies(values) if self._in_host_memory else {name: value.clone() for name, value in values.items()}
        )

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """See `OwnTensors.items`."""
        yield from self._values.items()

    def change(self, change: Callable[[str, Tensor], None]) -> None:
        """See `OwnTensors.change`."""
        for name, value in self._values.items():
            change(name, value)

    def in_memory(self) -> Mapping[str, Tensor]:
        """See `OwnTensors.in_memory`: all of them."""
        return self._values


@final
class TensorFile(OwnTensors):
    """Tensors in the file `name` of `folder`."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._entries: dict[str, _Entry] = {}

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """See `OwnTensors.items`. Each tensor is read when its turn comes."""
        if self._entries:
            with self._open("rb") as stream:
                for name, entry in self._entries.items():
                    yield name, self._read(stream, name, entry)

    def in_memory(self) -> Mapping[str, Tensor]:
        """See `OwnTensors.in_memory`: none."""
        return {}

    def change(self, change: Callable[[str, Tensor], None]) -> None:
        """See `OwnTensors.change`. One tensor at a time is in memory."""
        if not self._entries:
            return
        with self._open("r+b") as stream:
            for name, entry in self._entries.items():
                value = self._read(stream, name, entry)
                change(name, value)
                self._entries[name] = replace(entry, digest=tensor_digest(value))
                stream.seek(entry.start)
                content = _bytes_of(value)
                try:
                    while len(content):
                        content = content[stream.write(content) :]
                except OSError as error:  # a full disk that copies what is changed, or a broken one
                    raise ValueError(
                        f"{name!r} was to be changed in {self._file}, which cannot be written: {error}. {_START_AGAIN}"
                    ) from error

    @property
    def _file(self) -> Path:
        return self._folder.path() / self._name

    def _open(self, mode: Literal["rb", "r+b"]) -> BinaryIO:
        try:
            return self._file.open(mode, buffering=0)
        except OSError as error:
            raise ValueError(
                f"The reference's {len(self._entries)} tensors were kept in {self._file}, which cannot be opened: "
                f"{error}. {_START_AGAIN}"
            ) from error

    def _read(self, stream: BinaryIO, name: str, entry: "_Entry") -> Tensor:
        value = torch.empty(entry.shape, dtype=entry.dtype)
        stream.seek(entry.start)
        content = _bytes_of(value)
        while len(content):  # one read stops at 2 GiB
            try:
                num_read = stream.readinto(content)  # pyright: ignore[reportAttributeAccessIssue]
            except OSError as error:
                raise ValueError(
                    f"{name!r} was to be read from {self._file}, which cannot be read: {error}. {_START_AGAIN}"
                ) from error
            if not num_read:
                raise ValueError(
                    f"{name!r} was to be read from {self._file}, which ends before it: the file was changed or "
                    f"damaged. {_START_AGAIN}"
                )
            content = content[num_read:]
        actual = tensor_digest(value)
        if actual != entry.digest:
            raise ValueError(
                f"{name!r} was to be read from {self._file}, and is another than was written there (digest "
                f"{actual.split()[-1]}, not {entry.digest.split()[-1]}): the file was changed or damaged. "
                f"{_START_AGAIN}"
            )
        return value

    def write(self, values: Mapping[str, Tensor]) -> None:
        """See `OwnTensors.write`."""
        values = {name: value.detach() for name, value in values.items()}
        _check_dtypes(values)
        partial = None
        try:
            file = self._file
            partial = file.with_suffix(".partial")
            values = {name: value.contiguous() for name, value in values.items()}
            save_file(dict(values), partial)
            starts = _starts(partial)
            os.replace(partial, file)
        except Exception as error:  # safetensors has an error of its own for a full disk
            if partial is not None:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
            num_bytes = sum(value.numel() * value.element_size() for value in values.values())
            raise ValueError(
                f"The reference was to be kept in {self._folder.root} ({num_bytes} bytes), which cannot be written: "
                f"{error}. Choose an output_dir with room, or keep it in memory with reference='snapshot' and "
                "snapshot_device='cpu'."
            ) from error
        digests = tensor_digests(values)
        entries = {
            name: _Entry(dtype=value.dtype, shape=value.shape, start=starts[name], digest=digests[name])
            for name, value in values.items()
        }
        self._entries = dict(sorted(entries.items(), key=lambda item: item[1].start))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A tensor of a file: its dtype and shape, the byte at which it starts, and its digest (see `tensor_digest`)."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    digest: str


_START_AGAIN = "Start again; resume_from_checkpoint takes up the run where it was last saved."


def _check_dtypes(values: Mapping[str, Tensor]) -> None:
    """ValueError where safetensors has no name for the dtype of one of the tensors."""
    first = {value.dtype: name for name, value in reversed([*values.items()])}
    for dtype, name in first.items():
        try:
            save({name: torch.empty(0, dtype=dtype)})
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The reference was to be kept on disk, but {name!r} is of {dtype}, which safetensors cannot write. "
                "Keep it in memory: reference='model', or reference='snapshot' with snapshot_device='cpu'."
            ) from error


def _starts(file: Path) -> dict[str, int]:
    """The byte of a safetensors file at which each tensor starts, by name."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    return {name: 8 + header_bytes + entry["data_offsets"][0] for name, entry in header.items()}


def _bytes_of(value: Tensor) -> memoryview:
    return memoryview(value.view(-1).view(torch.uint8).numpy().data)
