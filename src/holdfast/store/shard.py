"""One shard of the store: a file that is written once, never changed, and named by the digest of its bytes.

A shard is a safetensors file (it opens in anything that reads those, is mapped rather than read, and cannot hold code)
called `<XXH3-128 of the whole file>.safetensors`. The name makes it unique, so any number of processes write into one
folder without locks; and it makes it checkable, so no flipped bit, truncation or mix-up passes for a log-prob. It comes
to be under another name, is flushed to the disk, and then renamed: under its name it is complete.

XXH3 is fast (several GB/s on one core, where BLAKE2b makes less than one), so every byte is checked whenever a store is
opened. Given up: protection from somebody who wants to deceive. A store is trusted as much as who may write to it.
"""

import json
import os
import re
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

FORMAT = 1
"""Of shards, manifests and exported files. Raise it when an older version could misread what is written."""

SUFFIX, PARTIAL, CORRUPT = ".safetensors", ".partial", ".corrupt"
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_HEADER = "holdfast"
_CHUNK = 1 << 20


class Damaged(Exception):
    """A file of the store that is not as it was written. Says how, as a clause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """M completions: their content ids `content [M 2]` (int64, high and low half), `lengths [M]` (int64), and one after
    the other their log-probs `logps [N]` (fp32, nats), which stay in the file until they are looked at."""

    name: str
    content: NDArray[np.int64]
    lengths: NDArray[np.int64]
    logps: NDArray[np.float32]
    num_bytes: int

    def starts(self) -> NDArray[np.int64]:
        """Where in `logps` each completion begins, `[M]`."""
        return np.cumsum(self.lengths) - self.lengths


def write_shard(
    folder: Path, key: str, content: NDArray[np.int64], lengths: NDArray[np.int64], logps: NDArray[np.float32]
) -> Path:
    """The path of a new shard of the store `key` with this content (see `Shard`), safely on the disk. OSError."""
    tensors = {"content": content, "lengths": lengths, "logps": logps}
    # One entry: the order of several would not be the same each time.
    header = {_HEADER: json.dumps({"format": FORMAT, "key": key})}
    data = save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}, header)
    path = folder / f"{xxhash.xxh3_128_hexdigest(data)}{SUFFIX}"
    write_durably(path, data)
    return path


def open_shard(path: Path, key: str) -> Shard:
    """The shard at `path` of the store `key`, every byte checked. Damaged if it is not as it was written or is another
    store's, ValueError if its format is newer, FileNotFoundError if it is gone."""
    found = file_digest(path)
    if found != path.name.removesuffix(SUFFIX):
        raise Damaged(f"its bytes have the digest {found}, not that of its name")
    try:
        written = json.loads(_header(path)["__metadata__"][_HEADER])
        if written["format"] > FORMAT:
            raise ValueError(newer_format(path, written["format"]))
        tensors = load_file(path)
        shard = Shard(
            name=path.name,
            content=tensors["content"].numpy(),
            lengths=tensors["lengths"].numpy(),
            logps=tensors["logps"].numpy(),
            num_bytes=path.stat().st_size,
        )
        is_consistent = _is_consistent(shard)
    except RuntimeError as error:
        if path.exists():
            raise
        raise FileNotFoundError(f"{path} went while it was opened") from error  # safetensors opens it twice
    except (SafetensorError, KeyError, TypeError) as error:
        raise Damaged(f"it is not a shard ({error})") from error
    if not is_consistent:
        raise Damaged("its arrays do not fit each other")
    if written["key"] != key:
        raise Damaged(f"it belongs to another store, {written['key']}")
    return shard


def shard_size(path: Path) -> tuple[int, int]:
    """Completions and tokens in a shard, by its header alone, unchecked. Damaged if it has none."""
    try:
        header = _header(path)
        return header["lengths"]["shape"][0], header["logps"]["shape"][0]
    except (KeyError, TypeError, IndexError) as error:
        raise Damaged("its header is not that of a shard") from error


def shard_paths(folder: Path) -> list[Path]:
    """The shards in a folder, by name; none where there is no such folder."""
    try:
        return [folder / name for name in sorted(filter(SHARD_NAME.fullmatch, os.listdir(folder)))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def joined(shards: list[Shard]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Content, lengths and log-probs of all completions of the shards, ordered by content id and length; of those that
    several have, the one of the first shard."""
    content = np.concatenate([shard.content for shard in shards])
    lengths = np.concatenate([shard.lengths for shard in shards])
    logps = np.concatenate([shard.logps for shard in shards])
    order = np.lexsort((lengths, content[:, 1], content[:, 0]))  # stable
    identity = np.column_stack([content, lengths])[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (identity[1:] != identity[:-1]).any(1)
    order = order[is_first]
    starts = np.cumsum(lengths) - lengths
    return content[order], lengths[order], gathered(logps, starts[order], lengths[order])


def gathered(values: NDArray[np.float32], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """The stretches of `values` that begin at `starts` and are `lengths` long, one after the other."""
    before = np.cumsum(lengths) - lengths
    return values[np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))]


def file_digest(path: Path) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal."""
    state = xxhash.xxh3_128()
    for chunk in _chunks(path):
        state.update(chunk)
    return state.hexdigest()


def newer_format(path: Path, found: Any) -> str:
    """The message of the error for a file whose format this version does not know."""
    return (
        f"the store's file {path} was to be read; it has format {found}, and this version of holdfast reads up to "
        f"{FORMAT}. Update holdfast, or choose another folder for the store (`$HOLDFAST_HOME`)."
    )


def _chunks(path: Path) -> Iterator[memoryview]:
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(buffer):
            yield memoryview(buffer)[:num_read]


def _header(path: Path) -> Any:
    """The JSON at the beginning of a safetensors file. Damaged if it has none."""
    with path.open("rb") as file:
        try:
            (size,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(min(size, path.stat().st_size)))
        except (struct.error, ValueError) as error:
            raise Damaged("it has no readable header") from error


def _is_consistent(shard: Shard) -> bool:
    shapes = shard.content.shape == (len(shard.lengths), 2) and shard.lengths.ndim == shard.logps.ndim == 1
    types = (shard.content.dtype, shard.lengths.dtype, shard.logps.dtype) == (np.int64, np.int64, np.float32)
    return shapes and types and bool((shard.lengths >= 0).all()) and int(shard.lengths.sum()) == len(shard.logps)


# Files that are there completely or not at all -----------------------------------------------------------------------


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file that is under its name only once it is complete and on the disk. OSError leaves nothing behind."""
    partial = path.with_name(f"{uuid.uuid4().hex}{PARTIAL}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except OSError:
        remove(partial)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """The names in a folder on the disk, not only in its cache. Windows does so by itself, and has no call for it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path) -> bool:
    """Renames a damaged file so that it is not read again; False where that is not permitted."""
    try:
        os.replace(path, path.with_name(path.name + CORRUPT))
    except FileNotFoundError:  # another process did it
        return True
    except OSError:
        return False
    return True


def remove(path: Path) -> bool:
    """Removes a file; False where that is not permitted, or where Windows still has it open."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
