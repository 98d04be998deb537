"""A store in one file and back: Parquet, with the manifest and a checksum of the content in its metadata.

The columns are `content_high`, `content_low` (int64, the two halves of the content id) and `logps` (list of fp32), so
that any tool reads them. Nothing of a file is taken over before all of it was checked. A store's folder may as well be
copied as it is; a file is for places that keep files. Given up: a file that grows; it is written in one go.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from numpy.typing import NDArray

from holdfast.batch import ContentId
from holdfast.store.index import Index
from holdfast.store.manifest import Manifest, StoreKey, read_manifest
from holdfast.store.shard import (
    PARTIAL,
    Damaged,
    Shard,
    flush_folder,
    gathered,
    open_shard,
    remove,
    shard_paths,
)
from holdfast.store.store import LogpStore

_MANIFEST, _CHECKSUM = b"holdfast.manifest", b"holdfast.checksum"
_SCHEMA = pa.schema([("content_high", pa.int64()), ("content_low", pa.int64()), ("logps", pa.large_list(pa.float32()))])
_ROWS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """What was exported or imported: the store's key, its completions and their tokens, and how many of them were new
    to where they went."""

    key: StoreKey
    num_completions: int
    num_tokens: int
    num_new: int


def export_store(folder: Path, file: Path) -> Transferred:
    """Writes all completions of a store's folder into one Parquet file, in one piece. ValueError if the store's
    manifest or a shard is damaged; OSError where the file cannot be written."""
    manifest, shards = _readable(folder)
    index = Index()
    index.add(shards)
    checksum = _Checksum(manifest)
    partial = file.with_name(f"{uuid.uuid4().hex}{PARTIAL}")
    try:
        with pq.ParquetWriter(partial, _SCHEMA, compression="zstd", use_dictionary=False) as writer:
            for number, shard in enumerate(shards):
                places = index.find(shard.content, shard.lengths)
                is_first = (places.shard == number) & (places.start == shard.starts())  # others hold the rest
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
    return Transferred(
        key=manifest.key,
        num_completions=index.num_completions,
        num_tokens=index.num_tokens,
        num_new=index.num_completions,
    )


def import_store(root: Path, file: Path, key: StoreKey | None = None) -> Transferred:
    """Adds the completions of an exported file to the store of its key in `root`. ValueError if the file is damaged,
    not an exported store, of a newer format, or of another key than `key`, naming what differs; then nothing is added.
    """
    manifest = read_exported(file)
    if key is not None and key.digest() != manifest.key.digest():
        asked, found = key.facts(), manifest.key.facts()
        name = next((name for name in asked if asked[name] != found[name]), "numerics")
        raise ValueError(
            f"log-probs of the store {key.digest()} were to be imported; {file} holds those of {manifest.key.digest()} "
            f"({manifest.key.description or 'without a description'}), whose {name!r} is {found[name]!r}, not "
            f"{asked[name]!r}. Export the store of this reference, with these numerics, or compute the log-probs here."
        )
    num_tokens, num_rows = 0, 0
    with LogpStore.open(root, manifest.key) as store:
        before = store.num_completions
        for content, lengths, logps in _batches(file):
            ids = map(tuple, content.tolist())
            store.add(dict(zip(ids, torch.from_numpy(logps).split(lengths.tolist()), strict=True)))
            num_rows += len(content)
            num_tokens += len(logps)
        return Transferred(
            key=manifest.key,
            num_completions=num_rows,
            num_tokens=num_tokens,
            num_new=store.num_completions - before,
        )


def read_exported(file: Path) -> Manifest:
    """The manifest of an exported store, all of the file checked. ValueError as `import_store`."""
    try:
        with pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata.metadata or {}
        if _MANIFEST not in metadata or _CHECKSUM not in metadata:
            raise Damaged("it has no manifest of a store")
        manifest = Manifest.from_bytes(metadata[_MANIFEST], file)
        checksum = _Checksum(manifest)
        for batch in _batches(file):
            checksum.update(*batch)
        if checksum.digest().encode() != metadata[_CHECKSUM]:
            raise Damaged("its content does not have its checksum")
    except FileNotFoundError as error:
        raise ValueError(
            f"the exported store {file} was to be read; there is no such file. Give the path of a file that "
            "`holdfast store export` wrote."
        ) from error
    except (Damaged, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the exported store {file} was to be read, but it is damaged or something else: {error}. Copy or export "
            "it again; nothing was taken from it."
        ) from error
    return manifest


def coverage(source: LogpStore | Path, ids: Iterable[ContentId]) -> tuple[int, int]:
    """How many of the different `ids` a store, or an exported one's file, holds, and how many different ones there
    are."""
    asked = set(ids)
    if isinstance(source, LogpStore):
        return len(asked) - len(source.missing(asked)), len(asked)
    read_exported(source)
    found = {tuple(pair) for content, _, _ in _batches(source) for pair in content.tolist()}
    return len(found & asked), len(asked)


@final
class _Checksum:
    """XXH3-128 of a manifest and of all rows, however they are cut into batches."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = xxhash.xxh3_128(manifest.to_bytes())
        self._columns = (xxhash.xxh3_128(), xxhash.xxh3_128(), xxhash.xxh3_128())

    def update(self, *columns: NDArray[Any]) -> None:
        """Takes in the content ids, lengths and log-probs of more rows."""
        for state, column in zip(self._columns, columns, strict=True):
            state.update(np.ascontiguousarray(column).data)

    def digest(self) -> str:
        """In hexadecimal."""
        return xxhash.xxh3_128_hexdigest(b"".join(state.digest() for state in (self._manifest, *self._columns)))


def _readable(folder: Path) -> tuple[Manifest, list[Shard]]:
    """All that a folder holds, checked. ValueError if any of it is damaged."""
    try:
        return read_manifest(folder), [open_shard(path, folder.name) for path in shard_paths(folder)]
    except (Damaged, FileNotFoundError) as error:
        raise ValueError(
            f"the store {folder} was to be exported, but not all of it can be read: {error}. `holdfast store verify` "
            "names what is damaged; a run that uses the store sets it aside and computes it again."
        ) from error


def _table(content: NDArray[np.int64], lengths: NDArray[np.int64], logps: NDArray[np.float32]) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(logps, pa.float32()))
    return pa.Table.from_arrays([pa.array(content[:, 0]), pa.array(content[:, 1]), values], schema=_SCHEMA)


def _batches(file: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Content ids, lengths and log-probs of the file's rows. Damaged or an error of Arrow where it cannot be read."""
    with pq.ParquetFile(file) as parquet:
        if not parquet.schema_arrow.equals(_SCHEMA):
            raise Damaged(f"its columns are {parquet.schema_arrow.names} of other types")
        for batch in parquet.iter_batches(_ROWS):
            if any(column.null_count for column in batch.columns) or batch["logps"].flatten().null_count:
                raise Damaged("it has empty cells")
            content = np.column_stack([batch["content_high"].to_numpy(), batch["content_low"].to_numpy()])
            logps = batch["logps"].flatten().to_numpy(zero_copy_only=False).copy()
            yield content, batch["logps"].value_lengths().to_numpy(), logps
