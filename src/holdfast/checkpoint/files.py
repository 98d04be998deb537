"""The files of a checkpoint: their sizes and digests when they were saved, and what is wrong with them later.

Digests (XXH3-128) find accidents: a cut copy, a flipped bit, a file of another checkpoint. Files are read in large
pieces, several at once, and are flushed to the disk when they are recorded. The cost is one more reading of the
checkpoint, mostly from memory when it was just written. Given up: files that other hosts write to disks of their own.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

FOLDER = "reference"
"""The folder of a checkpoint that holds what holdfast adds to it."""
PARTIAL = f"{FOLDER}.partial"
"""The name of that folder while it is written."""

_PIECE = 1 << 22
_SUFFIXES = (".bin", ".json", ".pt", ".pth", ".safetensors")


class DamagedError(ValueError):
    """A checkpoint is not as it was saved. The text says how, as a clause about the checkpoint."""


def record_files(checkpoint: Path) -> dict[str, list[Any]]:
    """The size in bytes and the digest of each file, by its path in the checkpoint. All files are flushed to the disk.

    Files of the partial folder `reference` stand under the names that they will have. OSError where one cannot be read.
    """
    files = {name: checkpoint / path for name, path in sorted(_files(checkpoint))}
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        records = dict(zip(files, threads.map(_record, files.values()), strict=True))
    for folder in {path.parent for path in files.values()} | {checkpoint}:
        flush(folder)
    return records


def check_files(checkpoint: Path, records: Mapping[str, Any], *, reads_all: bool) -> None:
    """DamagedError where a recorded file is missing, has another size or, with `reads_all`, another content. Files that
    are not recorded are ignored. All sizes are compared before the first file is read."""
    expected = {name: _valid(name, record) for name, record in records.items()}
    for name, (num_bytes, _) in expected.items():
        descriptor = open_regular(checkpoint / name, name)
        try:
            found = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if found != num_bytes:
            raise DamagedError(f"its file {name} has {found} bytes; {num_bytes} were saved")
    if not reads_all:
        return
    with ThreadPoolExecutor() as threads:
        digests = threads.map(lambda name: _digest(checkpoint / name, name), expected)
        for (name, (_, digest)), found in zip(expected.items(), digests, strict=True):
            if found != digest:
                raise DamagedError(f"its file {name} has another content than was saved (digest {found}, not {digest})")


def check_kinds(checkpoint: Path) -> None:
    """DamagedError where something that is called like a file of a checkpoint is a folder, or a FIFO or a device, for
    which a library would wait for ever. For checkpoints whose files are not recorded."""
    for folder, folders, names in os.walk(checkpoint):
        for name in [*names, *(name for name in folders if Path(name).suffix in _SUFFIXES)]:
            path = Path(folder) / name
            os.close(open_regular(path, path.relative_to(checkpoint).as_posix()))


def read_regular(path: Path, name: str) -> bytes:
    """The content of a file, called `name` in messages. DamagedError where it is missing, cannot be read, or is a
    folder, a FIFO or a device."""
    descriptor = open_regular(path, name)
    try:
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read()
    except OSError as error:
        raise _unreadable(name, error) from error
    finally:
        os.close(descriptor)


def open_regular(path: Path, name: str) -> int:
    """A descriptor of a file for reading; see `read_regular`. A FIFO is never waited for."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"its file {name} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise _unreadable(name, error) from error
    kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "no regular file"
    raise DamagedError(f"its file {name} is {kind}")


def flush(path: Path) -> None:
    """Writes the file or folder through to the disk, not only to the operating system's cache."""
    if os.name == "nt":  # which cannot flush what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """The files of a checkpoint that is being saved, as (name, path in the checkpoint)."""
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            path = (Path(folder) / name).relative_to(checkpoint)
            if path.parts[0] == FOLDER or not (checkpoint / path).is_file():
                continue
            is_staged = path.parts[0] == PARTIAL
            yield (Path(FOLDER, *path.parts[1:]) if is_staged else path).as_posix(), path


def _record(path: Path) -> list[Any]:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        digest = _digest_of(descriptor)
        if os.name != "nt":
            os.fsync(descriptor)
        return [os.fstat(descriptor).st_size, digest]
    finally:
        os.close(descriptor)


def _digest(path: Path, name: str) -> str:
    descriptor = open_regular(path, name)
    try:
        return _digest_of(descriptor)
    except OSError as error:
        raise _unreadable(name, error) from error
    finally:
        os.close(descriptor)


def _digest_of(descriptor: int) -> str:
    state, piece = xxhash.xxh3_128(), memoryview(bytearray(_PIECE))
    with open(descriptor, "rb", buffering=0, closefd=False) as stream:
        while num_read := stream.readinto(piece):
            state.update(piece[:num_read])
    return state.hexdigest()


def _valid(name: str, record: Any) -> tuple[int, str]:
    """The size and the digest of a record. DamagedError where it is none, or where the file is outside."""
    path = PurePosixPath(name)
    match record:
        case [int(num_bytes), str(digest)] if not path.is_absolute() and ".." not in path.parts:
            return num_bytes, digest
        case _:
            raise DamagedError(f"its manifest's record of the file {name!r} is none of a file in it: {record!r}")


def _unreadable(name: str, error: Exception) -> DamagedError:
    return DamagedError(f"its file {name} cannot be read ({getattr(error, 'strerror', None) or error})")
