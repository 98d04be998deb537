"""One shard of a store: a file of log-probs that is written once, never changed, and named by the digest of its bytes.

A shard is a safetensors file called `<XXH3-128 of the whole file>.safetensors`. Anything that reads safetensors opens
it, it is mapped rather than read, and it cannot hold code. The name makes it unique, so any number of processes write
into one folder without locks. It also makes the file checkable, so no flipped bit, truncation or mix-up passes for a
log-prob.

XXH3 digests several GB/s on one core, where BLAKE2b makes less than one, so every byte is checked whenever a store is
opened. Given up: protection from somebody who forges files; `trust.py` says whose are read. A forged one is damage like
any other wherever its header, its arrays or its values cannot be right. `write_arrays` and `open_arrays` know such
files with any arrays in them; those of pairs are in `pair_shard.py`.
"""

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from holdfast.store.files import (
    FORMAT,
    DamagedError,
    NewerFormatError,
    is_newer,
    newer_format,
    open_file,
    parsed_json,
    write_durably,
)
from holdfast.store.trust import Trust

SUFFIX = ".safetensors"
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
MOST_TOKENS = 1 << 24
"""A completion has no more tokens."""
MOST_NATS = 0.1
"""No log-prob is above 0, but for rounding: in fp32, that of logits up to a million explains so much."""
Declared = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""By name, the type (as safetensors names it) and the shape of each array in a file. A letter is a size that a file may
choose; the same letter is the same size."""
_ARRAYS: Declared = {"content": ("I64", ("M", 2)), "lengths": ("I64", ("M",)), "logps": ("F32", ("N",))}
_HEADER = "holdfast"
_MOST_HEADER_BYTES = 1 << 16
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
    return write_arrays(folder, SUFFIX, key_digest, {"content": content, "lengths": lengths, "logps": logps})


def write_arrays(folder: Path, suffix: str, key_digest: str, arrays: Mapping[str, NDArray[Any]]) -> Path:
    """Writes a file with these arrays for the store of this key, named by its digest and the `suffix`. Returns its
    path. OSError."""
    # A single entry: safetensors would order several in a different way each time, and the digest would differ.
    header = {_HEADER: json.dumps({"format": FORMAT, "key": key_digest})}
    data = save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, header)
    path = folder / f"{xxhash.xxh3_128_hexdigest(data)}{suffix}"
    write_durably(path, data)
    return path


def open_shard(path: Path, key_digest: str, trust: Trust | None = None) -> Shard:
    """The shard at `path`, which must be of the store of this key, every byte and every value checked.

    DamagedError if it is not as it was written or is another store's, UnusableError if it cannot be read or `trust`
    does not believe it, NewerFormatError if its format is newer, FileNotFoundError if it is gone.
    """
    header, arrays = open_arrays(path, SUFFIX, _ARRAYS, trust)
    shard = Shard(name=path.name, **arrays, num_bytes=header.num_bytes)
    _check_arrays(shard)
    header.check_key(key_digest)
    return shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the header of a file of arrays says: the digest of its store's key, the sizes of its arrays by letter (see
    `Declared`), and the file's bytes."""

    key: str
    sizes: Mapping[str, int]
    num_bytes: int

    def check_key(self, key_digest: str) -> None:
        """DamagedError where the file is of another store than the one with this key."""
        if self.key != key_digest:
            name = self.key if re.fullmatch("[0-9a-f]{32}", self.key) else repr(self.key[:40])
            raise DamagedError(f"it belongs to another store, {name}")


def open_arrays(path: Path, suffix: str, declared: Declared, trust: Trust | None) -> tuple[Header, dict[str, Any]]:
    """The header of the file at `path` and its arrays, mapped. Every byte is checked, and what the values mean is not.
    The errors of `open_shard`."""
    with open_file(path) as file:
        if trust is not None:
            trust.check(os.fstat(file.fileno()))
        digest = _digest(file)
        if digest != path.name.removesuffix(suffix):
            raise DamagedError(f"its bytes have the digest {digest}, not that of its name")
        header = _header(file, path, declared)
        return header, _arrays(_same_file(file, path, trust), path)


def header_of(path: Path, declared: Declared) -> Header:
    """What the header of the file of arrays at `path` says; its size fits it. The errors of `open_shard`."""
    with open_file(path) as file:
        return _header(file, path, declared)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts:
    """What a shard's header says: the digest of its store's key, and its sizes."""

    key: str
    num_completions: int
    num_tokens: int
    num_bytes: int


def shard_facts(path: Path) -> ShardFacts:
    """What the header of the shard at `path` says; its size fits it. The errors of `open_shard`."""
    header = header_of(path, _ARRAYS)
    return ShardFacts(
        key=header.key,
        num_completions=header.sizes["M"],
        num_tokens=header.sizes["N"],
        num_bytes=header.num_bytes,
    )


def shard_paths(folder: Path) -> list[Path]:
    """The paths of the shards in a folder, ordered by name; none where there is no such folder."""
    return named_paths(folder, SHARD_NAME)


def named_paths(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """The paths of the entries of a folder that have such names, ordered by name; none where there is no such
    folder."""
    try:
        return [folder / name for name in sorted(filter(names.fullmatch, os.listdir(folder)))]
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
    """XXH3-128 of a file's bytes, in hexadecimal. The errors of `open_file`."""
    with open_file(path) as file:
        return _digest(file)


def has_duplicates(content: NDArray[np.int64], lengths: NDArray[np.int64]) -> bool:
    """Whether two completions have the same content id `[M 2]` and length `[M]`."""
    if len(np.unique(content[:, 0])) == len(content):  # quick, and so with ids that are digests
        return False
    identity = np.column_stack([content, lengths])[np.lexsort((lengths, content[:, 1], content[:, 0]))]
    return bool((identity[1:] == identity[:-1]).all(1).any())


def are_logps(values: NDArray[np.float32]) -> bool:
    """Whether all are finite, and none is above 0 by more than rounding."""
    return len(values) == 0 or bool(np.isfinite(values.min()) and values.max() <= np.float32(MOST_NATS))


def _digest(file: BinaryIO) -> str:
    state, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
    while num_read := file.readinto(buffer):  # type: ignore[attr-defined]
        state.update(memoryview(buffer)[:num_read])
    return state.hexdigest()


def _header(file: BinaryIO, path: Path, declared: Declared) -> Header:
    """What the header at the beginning of a file of arrays says. DamagedError if it is none, or the file's size is
    another."""
    num_bytes = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < size <= min(_MOST_HEADER_BYTES, num_bytes - 8):
        raise DamagedError("it has no readable header")
    header = parsed_json(file.read(size))
    try:
        own = parsed_json(header["__metadata__"][_HEADER].encode())
        if is_newer(own["format"], FORMAT):
            raise NewerFormatError(newer_format(path, own["format"]))
        sizes = {
            letter: header[name]["shape"][axis]
            for name, (_, shape) in declared.items()
            for axis, letter in enumerate(shape)
            if isinstance(letter, str)
        }
        is_right = header.keys() == {"__metadata__", *declared} and isinstance(own["key"], str)
    except (KeyError, TypeError, IndexError, AttributeError, UnicodeEncodeError) as error:
        raise DamagedError("its header is not that of a shard") from error
    expected = 8 + size
    for name, (dtype, of_letters) in declared.items():
        shape = [sizes[size] if isinstance(size, str) else size for size in of_letters]
        is_right = is_right and _is_array(header[name], dtype, shape)
        expected += int(dtype[1:]) // 8 * math.prod(shape) if is_right else 0
    if not is_right or num_bytes != expected:
        raise DamagedError("its header is not that of a shard")
    return Header(key=own["key"], sizes=sizes, num_bytes=num_bytes)


def _is_array(facts: Any, dtype: str, shape: list[Any]) -> bool:
    are_sizes = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
    return are_sizes and isinstance(facts, dict) and (facts.get("dtype"), facts.get("shape")) == (dtype, shape)


def _same_file(file: BinaryIO, path: Path, trust: Trust | None) -> Path:
    """A path of the open file. Where others may put another file in its place, not its name."""
    by_descriptor = Path(f"/proc/self/fd/{file.fileno()}")
    is_exposed = trust is not None and trust.users is not None
    return by_descriptor if is_exposed and by_descriptor.exists() else path


def _arrays(source: Path, path: Path) -> dict[str, Any]:
    """The arrays in a shard, mapped."""
    try:
        return {name: tensor.numpy() for name, tensor in load_file(source).items()}
    except RuntimeError as error:
        if path.exists():
            raise
        raise FileNotFoundError(f"{path} went while it was opened") from error  # `load_file` opens it twice
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"it is not a shard ({error})") from error


def _check_arrays(shard: Shard) -> None:
    """DamagedError where arrays do not fit each other, or hold what no log-probs are."""
    if not _is_consistent(shard):
        raise DamagedError("its arrays do not fit each other")
    if has_duplicates(shard.content, shard.lengths):
        raise DamagedError("it has a completion twice")
    if not are_logps(shard.logps):
        raise DamagedError("it has log-probs that are NaN, infinite or above 0")


def _is_consistent(shard: Shard) -> bool:
    shapes = shard.content.shape == (len(shard.lengths), 2) and shard.lengths.ndim == shard.logps.ndim == 1
    types = (shard.content.dtype, shard.lengths.dtype, shard.logps.dtype) == (np.int64, np.int64, np.float32)
    if not shapes or not types:
        return False
    most = min(len(shard.logps), MOST_TOKENS)  # so their sum cannot overflow
    are_lengths = bool(((shard.lengths >= 0) & (shard.lengths <= most)).all())
    return are_lengths and int(shard.lengths.sum()) == len(shard.logps)
