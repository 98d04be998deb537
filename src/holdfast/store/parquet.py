"""A store exported to one Parquet file, and imported from it.

The columns are `content_high`, `content_low` (int64, the two halves of the content id) and `logps` (list of fp32), so
any tool reads them. The file's metadata has the manifest and a checksum of the content. An import adds nothing before
all of the file is checked. A store's folder may also be copied as it is; one file is easier to share. Given up: a file
that grows, since it is written in one go.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from numpy.typing import NDArray

from holdfast.batch import ContentId
from holdfast.store.files import PARTIAL, DamagedError, flush_folder, remove
from holdfast.store.index import Index
from holdfast.store.key import StoreKey
from holdfast.store.manifest import Manifest, read_manifest
from holdfast.store.shard import Shard, gathered, open_shard, shard_paths
from holdfast.store.store import LogpStore

_MANIFEST, _CHECKSUM = b"holdfast.manifest", b"holdfast.checksum"
_SCHEMA = pa.schema([("content_high", pa.int64()), ("content_low", pa.int64()), ("logps", pa.large_list(pa.float32()))])
_ROWS = 16_384
"""Rows of a file that are read at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """What an export or import transferred: the store's key, and its numbers of completions and of their tokens.

    `num_new` completions were new to the store or file that they went to.
    """

    key: StoreKey
    num_completions: int
    num_tokens: int
    num_new: int


def export_store(folder: Path, file: Path) -> TransferReport:
    """Writes all completions of a store's folder into one Parquet file, in one piece.

    ValueError if the store's manifest or a shard is damaged; OSError where the file cannot be written.
    """
    manifest, shards = _readable(folder)
    index = Index()
    index.add(shards)
    checksum = _Checksum(manifest)
    partial = file.with_name(f"{uuid.uuid4().hex}{PARTIAL}")
    try:
        with pq.ParquetWriter(partial, _SCHEMA, compression="zstd", use_dictionary=False) as writer:
            for number, shard in enumerate(shards):
                located = index.find(shard.content, shard.lengths)
                # A completion that several shards have is written once, from the first.
                is_first = (located.shard == number) & (located.start == shard.starts())
                content, lengths = shard.content[is_first], shard.lengths[is_first]
                logps = gathered(shard.logps, shard.starts()[is_first], lengths)
                checksum.update(content, lengths, logps)
                writer.write_table(_table(content, lengths, logps))
            writer.add_key_value_metadata({_MANIFEST: manifest.to_bytes(), _CHECKSUM: checksum.digest().encode()})
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    except BaseException:
        remove(partial)
        raise
    flush_folder(file.parent)
    return TransferReport(
        key=manifest.key,
        num_completions=index.num_completions,
        num_tokens=index.num_tokens,
        num_new=index.num_completions,
    )


def import_store(root: Path, file: Path, key: StoreKey | None = None) -> TransferReport:
    """Adds the completions of an exported file to the store of its key in `root`.

    ValueError, and nothing is added, if the file is damaged, is no exported store, has a newer format, or has another
    key than `key`; the message names what differs.
    """
    manifest = read_exported(file)
    if key is not None and key.digest() != manifest.key.digest():
        expected, exported = key.facts(), manifest.key.facts()
        name = next((name for name in expected if expected[name] != exported[name]), "numerics")
        raise ValueError(
            f"log-probs of the store {key.digest()} were to be imported; {file} holds those of {manifest.key.digest()} "
            f"({manifest.key.description or 'without a description'}), whose {name!r} is {exported[name]!r}, not "
            f"{expected[name]!r}. Export the store of this reference, with these numerics, or compute the log-probs "
            "here."
        )
    num_tokens, num_rows = 0, 0
    with LogpStore.open(root, manifest.key) as store:
        before = store.num_completions
        for content, lengths, logps in _batches(file):
            ids = map(tuple, content.tolist())
            store.add(dict(zip(ids, torch.from_numpy(logps).split(lengths.tolist()), strict=True)))
            num_rows += len(content)
            num_tokens += len(logps)
        return TransferReport(
            key=manifest.key,
            num_completions=num_rows,
            num_tokens=num_tokens,
            num_new=store.num_completions - before,
        )


def read_exported(file: Path) -> Manifest:
    """The manifest of an exported store, once all of the file is checked. ValueError where `import_store` raises it."""
    try:
        with pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata.metadata or {}
        if _MANIFEST not in metadata or _CHECKSUM not in metadata:
            raise DamagedError("it has no manifest of a store")
        manifest = Manifest.from_bytes(metadata[_MANIFEST], file)
        checksum = _Checksum(manifest)
        for content, lengths, logps in _batches(file):
            checksum.update(content, lengths, logps)
        if checksum.digest().encode() != metadata[_CHECKSUM]:
            raise DamagedError("its content does not have its checksum")
    except FileNotFoundError as error:
        raise ValueError(
            f"the exported store {file} was to be read; there is no such file. Give the path of a file that "
            "`holdfast store export` wrote."
        ) from error
    except (DamagedError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the exported store {file} was to be read, but it is damaged or something else: {error}. Copy or export "
            "it again; nothing was taken from it."
        ) from error
    return manifest


def coverage(source: LogpStore | Path, ids: Iterable[ContentId]) -> tuple[int, int]:
    """The number of distinct `ids` that a store or an exported file holds, and the number of distinct `ids`."""
    distinct = set(ids)
    if isinstance(source, LogpStore):
        return len(distinct) - len(source.missing(distinct)), len(distinct)
    read_exported(source)
    stored = {tuple(pair) for content, _, _ in _batches(source) for pair in content.tolist()}
    return len(stored & distinct), len(distinct)


@final
class _Checksum:
    """XXH3-128 of a manifest and of all rows. It does not depend on how the rows are cut into batches."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = xxhash.xxh3_128(manifest.to_bytes())
        self._columns = (xxhash.xxh3_128(), xxhash.xxh3_128(), xxhash.xxh3_128())

    def update(self, content: NDArray[np.int64], lengths: NDArray[np.int64], logps: NDArray[np.float32]) -> None:
        """Adds the content ids, lengths and log-probs of more rows."""
        for state, column in zip(self._columns, (content, lengths, logps), strict=True):
            state.update(np.ascontiguousarray(column).data)

    def digest(self) -> str:
        """The checksum, in hexadecimal."""
        return xxhash.xxh3_128_hexdigest(b"".join(state.digest() for state in (self._manifest, *self._columns)))


def _readable(folder: Path) -> tuple[Manifest, list[Shard]]:
    """The manifest and the shards of a folder, checked. ValueError if one of them is damaged."""
    try:
        return read_manifest(folder), [open_shard(path, folder.name) for path in shard_paths(folder)]
    except (DamagedError, FileNotFoundError) as error:
        raise ValueError(
            f"the store {folder} was to be exported, but not all of it can be read: {error}. `holdfast store verify` "
            "names what is damaged; a run that uses the store sets it aside and computes it again."
        ) from error


def _table(content: NDArray[np.int64], lengths: NDArray[np.int64], logps: NDArray[np.float32]) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(logps, pa.float32()))
    return pa.Table.from_arrays([pa.array(content[:, 0]), pa.array(content[:, 1]), values], schema=_SCHEMA)


def _batches(file: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Content ids, lengths and log-probs of the file's rows. DamagedError, or an error of Arrow, if it is damaged."""
    with pq.ParquetFile(file) as parquet:
        if not parquet.schema_arrow.equals(_SCHEMA):
            raise DamagedError(f"its columns are {parquet.schema_arrow.names} of other types")
        for batch in parquet.iter_batches(_ROWS):
            if any(column.null_count for column in batch.columns) or batch["logps"].flatten().null_count:
                raise DamagedError("it has empty cells")
            content = np.column_stack([batch["content_high"].to_numpy(), batch["content_low"].to_numpy()])
            logps = batch["logps"].flatten().to_numpy(zero_copy_only=False).copy()
            yield content, batch["logps"].value_lengths().to_numpy(), logps
