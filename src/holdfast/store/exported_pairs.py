"""Products of pairs in an exported store: values in the Parquet file's metadata, beside its rows of log-probs.

They are no rows, since rows have the columns of a completion's log-probs. Versions of this package that know no
products pass the values over and read the rest. Each value is named by the digest of its bytes. Given up: reading them
by name in other tools.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq
import xxhash

from holdfast.store.files import DamagedError
from holdfast.store.pair_shard import PairProducts, check_pairs, joined_pairs

PAIRS = b"holdfast.pairs."
"""How the names of these values begin; the digest (XXH3-128) of the value follows."""
MOST_PAIRS_TOGETHER = 1 << 16
"""Most pairs in one value: 4.7 MB."""
_ARRAYS = {"content": ("<i8", 4), "lengths": ("<i8", 2), "products": ("<f8", 3)}
_BYTES_OF_PAIR = 72


def metadata_of(pairs: PairProducts) -> dict[bytes, bytes]:
    """The products as metadata of a Parquet file."""
    metadata: dict[bytes, bytes] = {}
    for start in range(0, len(pairs), MOST_PAIRS_TOGETHER):
        part = pairs.where(slice(start, start + MOST_PAIRS_TOGETHER))
        value = b"".join(getattr(part, name).astype(dtype).tobytes() for name, (dtype, _) in _ARRAYS.items())
        metadata[PAIRS + xxhash.xxh3_128_hexdigest(value).encode()] = value
    return metadata


def pairs_of(metadata: Mapping[bytes, bytes]) -> PairProducts:
    """The products that a Parquet file's metadata hold. DamagedError where they are not as they were written."""
    parts = [_pairs(name, value) for name, value in sorted(metadata.items()) if name.startswith(PAIRS)]
    pairs = joined_pairs(parts)
    if len(pairs) < sum(map(len, parts)):
        raise DamagedError("it has a pair twice")
    return pairs


def exported_pairs(stream: BinaryIO, file: Path) -> PairProducts:
    """The products in an exported store, which is open. ValueError where they are damaged; it names `file`."""
    stream.seek(0)
    try:
        with pq.ParquetFile(stream) as parquet:
            return pairs_of(parquet.metadata.metadata or {})
    except DamagedError as error:
        raise ValueError(
            f"the exported store {file} was to be read, but its products of pairs are damaged: {error}. Copy or export "
            "it again; nothing was taken from it."
        ) from error


def _pairs(name: bytes, value: bytes) -> PairProducts:
    if name.removeprefix(PAIRS) != xxhash.xxh3_128_hexdigest(value).encode():
        raise DamagedError("its products of pairs do not have their digest")
    num_pairs, rest = divmod(len(value), _BYTES_OF_PAIR)
    if rest:
        raise DamagedError("its products of pairs end within a pair")
    arrays, start = {}, 0
    for array, (dtype, width) in _ARRAYS.items():
        values = np.frombuffer(value, dtype, count=num_pairs * width, offset=start)
        arrays[array] = values.reshape(num_pairs, width).astype(dtype[1:])
        start += values.nbytes
    pairs = PairProducts(**arrays)
    check_pairs(pairs)
    return pairs
