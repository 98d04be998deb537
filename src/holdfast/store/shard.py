"""One shard of a store: a file of log-probs that is written once, never changed, and named by the digest of its bytes.

A shard is a safetensors file called `<XXH3-128 of the whole file>.safetensors`. Anything that reads safetensors opens
it, it is mapped rather than read, and it cannot hold code. The name makes it unique, so any number of processes write
into one folder without locks. It also makes the file checkable, so no flipped bit, truncation or mix-up passes for a
log-prob.

XXH3 digests several GB/s on one core, where BLAKE2b makes less than one, so every byte is checked whenever a store is
opened. Given up: protection from somebody who forges files. A store is trusted as far as those who may write to it.
"""

import json
import os
import re
import struct
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

from holdfast.store.files import FORMAT, DamagedError, newer_format, write_durably

SUFFIX = ".safetensors"
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_HEADER = "holdfast"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """M completions: `content [M 2]` (int64) are the halves, high and low, of their content ids, `lengths [M]` (int64)
    their numbers of tokens, and `logps [N]` (fp32, nats) their log-probs, one completion after the other.

    The log-probs are mapped, so they stay in the file until they are read.
    """

    name: str
    content: NDArray[np.int64]
    lengths: NDArray[np.int64]
    logps: NDArray[np.float32]
    num_bytes: int

    def starts(self) -> NDArray[np.int64]:
        """The index in `logps` at which each completion begins, `[M]`."""
        return np.cumsum(self.lengths) - self.lengths


def write_shard(
    folder: Path, key_digest: str, content: NDArray[np.int64], lengths: NDArray[np.int64], logps: NDArray[np.float32]
) -> Path:
    """Writes a shard with these arrays (see `Shard`) for the store of this key. Returns its path. OSError."""
    tensors = {"content": content, "lengths": lengths, "logps": logps}
    # A single entry: safetensors would order several in a different way each time, and the digest would differ.
    header = {_HEADER: json.dumps({"format": FORMAT, "key": key_digest})}
    data = save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}, header)
    path = folder / f"{xxhash.xxh3_128_hexdigest(data)}{SUFFIX}"
    write_durably(path, data)
    return path


def open_shard(path: Path, key_digest: str) -> Shard:
    """The shard at `path`, which must be of the store of this key, every byte checked.

    DamagedError if it is not as it was written or is another store's, ValueError if its format is newer,
    FileNotFoundError if it is gone.
    """
    digest = file_digest(path)
    if digest != path.name.removesuffix(SUFFIX):
        raise DamagedError(f"its bytes have the digest {digest}, not that of its name")
    try:
        header = json.loads(_header(path)["__metadata__"][_HEADER])
        if header["format"] > FORMAT:
            raise ValueError(newer_format(path, header["format"]))
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
        raise FileNotFoundError(f"{path} went while it was opened") from error  # `load_file` opens it twice
    except (SafetensorError, KeyError, TypeError) as error:
        raise DamagedError(f"it is not a shard ({error})") from error
    if not is_consistent:
        raise DamagedError("its arrays do not fit each other")
    if header["key"] != key_digest:
        raise DamagedError(f"it belongs to another store, {header['key']}")
    return shard


def shard_size(path: Path) -> tuple[int, int]:
    """The numbers of completions and tokens in a shard, from its header alone. DamagedError if it has none."""
    try:
        header = _header(path)
        return header["lengths"]["shape"][0], header["logps"]["shape"][0]
    except (KeyError, TypeError, IndexError) as error:
        raise DamagedError("its header is not that of a shard") from error


def shard_paths(folder: Path) -> list[Path]:
    """The paths of the shards in a folder, ordered by name; none where there is no such folder."""
    try:
        return [folder / name for name in sorted(filter(SHARD_NAME.fullmatch, os.listdir(folder)))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def joined(shards: list[Shard]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Content, lengths and log-probs of all completions of the shards, ordered by content id and length.

    Of a completion that several shards have, the first shard's log-probs are taken.
    """
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
    """The slices of `values` that begin at `starts` and are `lengths` long, one after the other."""
    before = np.cumsum(lengths) - lengths
    return values[np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))]


def file_digest(path: Path) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal."""
    state = xxhash.xxh3_128()
    for chunk in _chunks(path):
        state.update(chunk)
    return state.hexdigest()


def _chunks(path: Path) -> Iterator[memoryview]:
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(buffer):
            yield memoryview(buffer)[:num_read]


def _header(path: Path) -> Any:
    """The JSON at the beginning of a safetensors file. DamagedError if it has none."""
    with path.open("rb") as file:
        try:
            (size,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(min(size, path.stat().st_size)))
        except (struct.error, ValueError) as error:
            raise DamagedError("it has no readable header") from error


def _is_consistent(shard: Shard) -> bool:
    shapes = shard.content.shape == (len(shard.lengths), 2) and shard.lengths.ndim == shard.logps.ndim == 1
    types = (shard.content.dtype, shard.lengths.dtype, shard.logps.dtype) == (np.int64, np.int64, np.float32)
    return shapes and types and bool((shard.lengths >= 0).all()) and int(shard.lengths.sum()) == len(shard.logps)
