"""Named tensors kept on the accelerator, in host memory or in a file, and changed where they are.

A file is safetensors, and is never mapped: the pages of a map stay resident beside what is made from them, while plain
memory takes the place of gradients that are gone. It is read, and changed in place, one tensor at a time. The digest of
each stays in memory and is compared when it is read. What is kept in a file is for this process, in a folder of its
own: what a killed run must find again is in its checkpoints.
"""

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

from holdfast.reference.digests import tensor_digest, tensor_digests
from holdfast.reference.run_folder import RunFolder

Place = Literal["device", "cpu", "disk"]


@final
class KeptTensors:
    """Tensors by name, kept at `place`; those on `disk` go to the file `name` of `folder`."""

    def __init__(self, place: Place, folder: RunFolder, name: str) -> None:
        self._place = place
        self._folder = folder
        self._name = name
        self._values: dict[str, Tensor] = {}
        self._entries: dict[str, _Entry] = {}

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Keeps copies of `values`, and nothing else from before. ValueError where the file cannot be written."""
        values = {name: value.detach() for name, value in values.items()}
        if self._place == "disk":
            self._write(values)
        elif self._place == "cpu":
            self._values = {name: _in_host_memory(value) for name, value in values.items()}
        else:
            self._values = {name: value.clone() for name, value in values.items()}

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors by name, each read when its turn comes where they are in a file. ValueError where that does not
        hold what was written to it."""
        if self._entries:
            with self._open("rb") as stream:
                for name, entry in self._entries.items():
                    yield name, self._read(stream, name, entry)
        yield from self._values.items()

    def in_memory(self) -> Mapping[str, Tensor]:
        """Those that take memory: none of a file."""
        return self._values

    def change(self, change: Callable[[str, Tensor], None]) -> None:
        """Calls `change` with each tensor by name, to be changed in place; of a file one after the other."""
        for name, value in self._values.items():
            change(name, value)
        if not self._entries:
            return
        with self._open("r+b") as stream:
            for name, entry in self._entries.items():
                value = self._read(stream, name, entry)
                change(name, value)
                self._entries[name] = replace(entry, digest=tensor_digest(value))
                stream.seek(entry.start)
                content = _bytes_of(value)
                while len(content):
                    content = content[stream.write(content) :]

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
            num_read = stream.readinto(content)  # pyright: ignore[reportAttributeAccessIssue]
            if not num_read:
                raise ValueError(
                    f"{name!r} was to be read from {self._file}, which ends before it: the file was changed or "
                    f"damaged. {_START_AGAIN}"
                )
            content = content[num_read:]
        found = tensor_digest(value)
        if found != entry.digest:
            raise ValueError(
                f"{name!r} was to be read from {self._file}, and is another than was written there (digest "
                f"{found.split()[-1]}, not {entry.digest.split()[-1]}): the file was changed or damaged. {_START_AGAIN}"
            )
        return value

    def _write(self, values: Mapping[str, Tensor]) -> None:
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
    """A tensor of a file: what it is, at which byte it starts, and its digest (see `tensor_digest`)."""

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
    """At which byte of a safetensors file each tensor starts. What they are is known to who wrote them."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    return {name: 8 + header_bytes + entry["data_offsets"][0] for name, entry in header.items()}


def _bytes_of(value: Tensor) -> memoryview:
    return memoryview(value.view(-1).view(torch.uint8).numpy().data)


def _in_host_memory(value: Tensor) -> Tensor:
    """A copy, pinned where it has to travel to an accelerator."""
    copy = value.to("cpu", copy=True)
    return copy.pin_memory() if value.is_cuda else copy
