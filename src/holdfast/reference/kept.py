"""Named tensors kept on the accelerator, in host memory or in a file, and changed where they are.

A file is safetensors, and is never mapped: the pages of a map stay resident beside what is made from them, while plain
memory takes the place of gradients that are gone. It is read, and changed in place, one tensor at a time. What is kept
in it is for this process: what a killed run must find again is in its checkpoints.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from safetensors.torch import save_file
from torch import Tensor

Place = Literal["device", "cpu", "disk"]


@final
class KeptTensors:
    """Tensors by name, kept at `place`; `file` is where those on `disk` go."""

    def __init__(self, place: Place, file: Path) -> None:
        self._place = place
        self._file = file
        self._values: dict[str, Tensor] = {}

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
        """The tensors by name, each read when its turn comes where they are in a file."""
        if self._place == "disk" and self._file.is_file():
            yield from _read(self._file)
        yield from self._values.items()

    def in_memory(self) -> Mapping[str, Tensor]:
        """Those that take memory: none of a file."""
        return self._values

    def change(self, change: Callable[[str, Tensor], None]) -> None:
        """Calls `change` with each tensor by name, to be changed in place; of a file one after the other."""
        if self._place != "disk":
            for name, value in self._values.items():
                change(name, value)
            return
        entries = _entries(self._file)
        with self._file.open("r+b", buffering=0) as stream:
            for name, value in _read(self._file):
                change(name, value)
                stream.seek(entries[name].start)
                content = memoryview(value.view(-1).view(torch.uint8).numpy().data)
                while len(content):
                    content = content[stream.write(content) :]

    def _write(self, values: Mapping[str, Tensor]) -> None:
        partial = self._file.with_suffix(".partial")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in values.items()}, partial)
            os.replace(partial, self._file)
        except Exception as error:  # safetensors has an error of its own for a full disk
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            num_bytes = sum(value.numel() * value.element_size() for value in values.values())
            raise ValueError(
                f"The reference was to be kept in {self._file} ({num_bytes} bytes), which cannot be written: {error}. "
                "Choose an output_dir with room, or keep it in memory with reference='snapshot' and "
                "snapshot_device='cpu'."
            ) from error


class _Entry(NamedTuple):
    """Where a tensor is in a file, in bytes."""

    dtype: torch.dtype
    shape: list[int]
    start: int


def _entries(file: Path) -> dict[str, _Entry]:
    """What a safetensors file holds, in the order of the file."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    entries = {
        name: _Entry(_DTYPES[entry["dtype"]], entry["shape"], 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    with file.open("rb", buffering=0) as stream:
        for name, (dtype, shape, start) in _entries(file).items():
            value = torch.empty(shape, dtype=dtype)
            stream.seek(start)
            content = memoryview(value.view(-1).view(torch.uint8).numpy().data)
            while len(content):  # one read stops at 2 GiB
                num_read = stream.readinto(content)
                if not num_read:
                    raise ValueError(
                        f"{name!r} was to be read from {file}, which ends before it: the file was changed or damaged. "
                        "Start again; resume_from_checkpoint takes up the run where it was last saved."
                    )
                content = content[num_read:]
            yield name, value


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8}


def _in_host_memory(value: Tensor) -> Tensor:
    """A copy, pinned where it has to travel to an accelerator."""
    copy = value.to("cpu", copy=True)
    return copy.pin_memory() if value.is_cuda else copy
