"""A store exported to one Parquet file, and imported from it.

The columns are `content_high`, `content_low` (int64, the two halves of the content id) and `logps` (list of fp32), so
any tool reads them. The file's metadata has the manifest, a checksum of the content, and the products of pairs
(`exported_pairs`). An import adds nothing before all of the file is checked (`exported`). A store's folder may also be
copied as it is; one file is easier to share. Given up: a file that grows, since it is written in one go.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.batch import ContentId
from holdfast.store.exported import (
    BATCH_ROWS,
    BATCH_TOKENS,
    CHECKSUM,
    MANIFEST,
    SCHEMA,
    Batch,
    Checksum,
    batches,
    opened,
)
from holdfast.store.exported_pairs import exported_pairs, metadata_of
from holdfast.store.files import PARTIAL, DamagedError, NewerFormatError, flush_folder, remove
from holdfast.store.index import Index
from holdfast.store.key import StoreKey
from holdfast.store.manifest import Manifest, read_manifest
from holdfast.store.pair_shard import PairProducts, joined_pairs, open_pair_shard, pair_shard_paths
from holdfast.store.pair_table import PairTable
from holdfast.store.shard import Shard, gathered, open_shard, shard_paths
from holdfast.store.store import LogpStore
from holdfast.store.trust import Trust


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

    ValueError if the store's manifest or a shard is damaged or not believed, or if the file's path is that of something
    else; OSError where the file cannot be written.
    """
    file = _writable(file)
    manifest, shards, pairs = _readable(folder)
    index = Index()
    index.add(shards)
    checksum = Checksum(manifest)
    partial = file.with_name(f"{uuid.uuid4().hex}{PARTIAL}")
    try:
        with pq.ParquetWriter(partial, SCHEMA, compression="zstd", use_dictionary=False) as writer:
            for number, shard in enumerate(shards):
                located = index.find(shard.content, shard.lengths)
                # A completion that several shards have is written once, from the first.
                is_first = (located.shard == number) & (located.start == shard.starts())
                for rows in _parts(np.flatnonzero(is_first), shard.lengths):
                    lengths = shard.lengths[rows]
                    logps = gathered(shard.logps, shard.starts()[rows], lengths)
                    batch = Batch(content=shard.content[rows], lengths=lengths, logps=logps)
                    checksum.update(batch)
                    writer.write_table(_table(batch))
            whole = {MANIFEST: manifest.to_bytes(), CHECKSUM: checksum.digest().encode()}
            writer.add_key_value_metadata(whole | metadata_of(pairs))
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
    """Adds the completions of an exported file, and the products of its pairs, to the store of its key in `root`.

    ValueError, and nothing is added, if the file is damaged, is no exported store, has a newer format, or has another
    key than `key`; the message names what differs.
    """
    with opened(file) as (manifest, stream):
        if key is not None:
            _check_key(file, manifest, key)
        pairs = exported_pairs(stream, file)
        num_tokens, num_rows = 0, 0
        with LogpStore.open(root, manifest.key) as store:
            before = store.num_completions
            for batch in batches(stream):
                for part in _by_id(batch):
                    store.add(part)
                num_rows += len(batch.content)
                num_tokens += len(batch.logps)
            table = PairTable.open(store)
            table.add_all(pairs)
            table.flush()
            return TransferReport(
                key=manifest.key,
                num_completions=num_rows,
                num_tokens=num_tokens,
                num_new=store.num_completions - before,
            )


def _check_key(file: Path, manifest: Manifest, key: StoreKey) -> None:
    if key.digest() != manifest.key.digest():
        expected, exported = key.facts(), manifest.key.facts()
        name = next((name for name in expected if expected[name] != exported[name]), "numerics")
        description = " ".join(manifest.key.description.split()) or "without a description"
        raise ValueError(
            f"log-probs of the store {key.digest()} were to be imported; {file} holds those of {manifest.key.digest()} "
            f"({description}), whose {name!r} is {exported[name]!r}, not {expected[name]!r}. Export the store of this "
            "reference, with these numerics, or compute the log-probs here."
        )


def coverage(source: LogpStore | Path, ids: Iterable[ContentId]) -> tuple[int, int]:
    """The number of distinct `ids` that a store or an exported file holds, and the number of distinct `ids`."""
    distinct = set(ids)
    if isinstance(source, LogpStore):
        return len(distinct) - len(source.missing(distinct)), len(distinct)
    with opened(source) as (_, stream):
        stored = {tuple(pair) for batch in batches(stream) for pair in batch.content.tolist()}
    return len(stored & distinct), len(distinct)


def _readable(folder: Path) -> tuple[Manifest, list[Shard], PairProducts]:
    """The manifest, the shards and the products of pairs of a folder, checked. ValueError if one of them is damaged or
    not believed."""
    try:
        trust = Trust.of(folder)
        pairs = joined_pairs([open_pair_shard(path, folder.name, trust) for path in pair_shard_paths(folder)])
        return read_manifest(folder), [open_shard(path, folder.name, trust) for path in shard_paths(folder)], pairs
    except (DamagedError, NewerFormatError, OSError) as error:
        raise ValueError(
            f"the store {folder} was to be exported, but not all of it can be read: {error}. `holdfast store verify` "
            "names what is damaged; a run that uses the store sets it aside and computes it again."
        ) from error


def _writable(file: Path) -> Path:
    """The path to write to, links followed. ValueError where there is something else than a file, or no folder."""
    target = file.expanduser().resolve()
    found = "something that is no file" if target.exists() and not target.is_file() else None
    if not target.parent.is_dir():
        found = "no folder for it"
    if found:
        raise ValueError(
            f"a store was to be exported to {str(file)!r}, where there is {found}. Give the path of a file, which is "
            "written, in a folder that is there."
        )
    return target


def _parts(rows: NDArray[np.intp], lengths: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """`rows`, of which each has `lengths[row]` log-probs, in parts of bounded size."""
    numbers = np.arange(len(rows)) // BATCH_ROWS + np.cumsum(lengths[rows]) // BATCH_TOKENS
    yield from filter(len, np.split(rows, np.flatnonzero(np.diff(numbers)) + 1))


def _table(batch: Batch) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum(batch.lengths)])
    values = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(batch.logps, pa.float32()))
    return pa.Table.from_arrays([pa.array(batch.content[:, 0]), pa.array(batch.content[:, 1]), values], schema=SCHEMA)


def _by_id(batch: Batch) -> Iterator[dict[ContentId, Tensor]]:
    """The completions of a batch by content id. One that is there with several lengths is in as many parts."""
    part: dict[ContentId, Tensor] = {}
    for (high, low), logps in zip(
        batch.content.tolist(), torch.from_numpy(batch.logps).split(batch.lengths.tolist()), strict=True
    ):
        if (high, low) in part:
            yield part
            part = {}
        part[high, low] = logps
    yield part
