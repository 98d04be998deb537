"""An exported store: the file's layout, and how one that comes from somewhere is checked before anything is taken.

A Parquet file can say in a few kilobytes that it holds gigabytes. So its own sizes are compared with the file's before
anything is unpacked, and it is read in batches of bounded size. One descriptor serves for checking and for taking: what
is taken is what was checked, though another file may have the name by then. Given up: a file of which a row group has
more than `MOST_GROUP_TOKENS` log-probs. Earlier versions wrote one where a merged shard had completions of more than
4,096 tokens on average; export it again.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from holdfast.store.files import DamagedError, open_file
from holdfast.store.manifest import Manifest
from holdfast.store.shard import MOST_TOKENS, are_logps, has_duplicates

MANIFEST, CHECKSUM = b"holdfast.manifest", b"holdfast.checksum"
SCHEMA = pa.schema([("content_high", pa.int64()), ("content_low", pa.int64()), ("logps", pa.large_list(pa.float32()))])
BATCH_ROWS, BATCH_TOKENS = 16_384, 1 << 20
"""Most rows, and by their mean length most log-probs, that are written or read at a time."""
MOST_GROUP_TOKENS = 1 << 28
"""Most log-probs in a row group, which may have to be unpacked at once."""
_MOST_TOKENS_PER_BYTE, _MOST_ROWS_PER_BYTE = 64, 1
"""A log-prob is about 4 bytes of noise, and a row has 16 of a digest: no packing makes them so small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """M completions: content ids `[M 2]`, their lengths `[M]`, and their log-probs `[N]`, one after the other."""

    content: NDArray[np.int64]
    lengths: NDArray[np.int64]
    logps: NDArray[np.float32]


@final
class Checksum:
    """XXH3-128 of a manifest and of all rows. It does not depend on how the rows are cut into batches."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = xxhash.xxh3_128(manifest.to_bytes())
        self._columns = (xxhash.xxh3_128(), xxhash.xxh3_128(), xxhash.xxh3_128())

    def update(self, batch: Batch) -> None:
        """Adds more rows."""
        for state, column in zip(self._columns, (batch.content, batch.lengths, batch.logps), strict=True):
            state.update(np.ascontiguousarray(column).data)

    def digest(self) -> str:
        """The checksum, in hexadecimal."""
        return xxhash.xxh3_128_hexdigest(b"".join(state.digest() for state in (self._manifest, *self._columns)))


def read_exported(file: Path) -> Manifest:
    """The manifest of an exported store, once all of the file is checked. ValueError if it is damaged or no exported
    store, or cannot be read."""
    with opened(file) as (manifest, _):
        return manifest


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[Manifest, BinaryIO]]:
    """The manifest of an exported store and its open file, once all of it is checked. ValueError as `read_exported`."""
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(open_file(file))
            manifest = _checked(stream, file)
        except FileNotFoundError as error:
            raise ValueError(
                f"the exported store {file} was to be read; there is no such file. Give the path of a file that "
                "`holdfast store export` wrote."
            ) from error
        except (DamagedError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"the exported store {file} was to be read, but it is damaged or something else: {error}. Copy or "
                "export it again; nothing was taken from it."
            ) from error
        yield manifest, stream


def batches(stream: BinaryIO) -> Iterator[Batch]:
    """The rows of an exported store's file. DamagedError, or an error of Arrow, if it is damaged."""
    stream.seek(0)
    with pq.ParquetFile(stream, buffer_size=1 << 20) as parquet:
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            num_rows = BATCH_TOKENS * group.num_rows // max(1, group.column(2).num_values)
            num_rows = min(max(1, num_rows), BATCH_ROWS)
            for batch in parquet.iter_batches(num_rows, row_groups=[number], use_threads=False):
                if any(column.null_count for column in batch.columns) or batch["logps"].flatten().null_count:
                    raise DamagedError("it has empty cells")
                yield Batch(
                    content=np.column_stack([batch["content_high"].to_numpy(), batch["content_low"].to_numpy()]),
                    lengths=batch["logps"].value_lengths().to_numpy(),
                    logps=batch["logps"].flatten().to_numpy(zero_copy_only=False).copy(),
                )


def _checked(stream: BinaryIO, file: Path) -> Manifest:
    """The manifest. DamagedError or an error of Arrow where anything in the file is not as it was written."""
    with pq.ParquetFile(stream) as parquet:
        metadata = parquet.metadata.metadata or {}
        if MANIFEST not in metadata or CHECKSUM not in metadata:
            raise DamagedError("it has no manifest of a store")
        manifest = Manifest.from_bytes(metadata[MANIFEST], file)
        if not parquet.schema_arrow.equals(SCHEMA):
            raise DamagedError(f"its columns are {parquet.schema_arrow.names} of other types")
        _check_sizes(parquet.metadata, stream.seek(0, 2))
    checksum, content, lengths = Checksum(manifest), [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
    for batch in batches(stream):
        if batch.lengths.max(initial=0) > MOST_TOKENS:
            raise DamagedError(f"a completion has {batch.lengths.max():,} tokens; {MOST_TOKENS:,} are the most")
        if not are_logps(batch.logps):
            raise DamagedError("it has log-probs that are NaN, infinite or above 0")
        checksum.update(batch)
        content.append(batch.content)
        lengths.append(batch.lengths)
    if checksum.digest().encode() != metadata[CHECKSUM]:
        raise DamagedError("its content does not have its checksum")
    if has_duplicates(np.concatenate(content), np.concatenate(lengths)):
        raise DamagedError("it has a completion twice")
    return manifest


def _check_sizes(metadata: pq.FileMetaData, num_bytes: int) -> None:
    """DamagedError where the sizes in a file's metadata are more than any store's, or than a file of `num_bytes` can
    have."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [(group.num_rows, group.column(2).num_values) for group in groups]
    for num_rows, num_values in sizes:
        if not 0 <= num_values <= min(MOST_GROUP_TOKENS, num_rows * MOST_TOKENS):
            raise DamagedError(
                f"a row group has {num_values:,} log-probs in {num_rows:,} row(s); a completion has at most "
                f"{MOST_TOKENS:,}, and a row group at most {MOST_GROUP_TOKENS:,}"
            )
    num_rows, num_values = (sum(column) for column in zip((0, 0), *sizes, strict=True))
    is_possible = (
        num_rows <= BATCH_ROWS + _MOST_ROWS_PER_BYTE * num_bytes
        and num_values <= MOST_TOKENS + _MOST_TOKENS_PER_BYTE * num_bytes
    )
    if not is_possible:
        raise DamagedError(
            f"it has {num_values:,} log-probs in {num_rows:,} rows, too many for its {num_bytes:,} bytes"
        )
