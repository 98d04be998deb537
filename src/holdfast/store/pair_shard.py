"""A file of products of pairs, beside a store's shards: how alike the hidden states of two completions are.

For completions with the sums s and r of their hidden states, it has <s, r>, <s, s> and <r, r>. CHES is made of these
(`holdfast.inspect.pair_numbers`), so no hidden state is kept. Such a file is written, named, trusted and checked like a
shard of log-probs (`shard.py`). A store without one is whole: a pair without products is one whose products are not
known. Given up: products with other completions than those of a dataset's pairs, for which vectors would be needed.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from holdfast.batch import ContentId
from holdfast.store.files import DamagedError
from holdfast.store.shard import MOST_TOKENS, Declared, Header, header_of, named_paths, open_arrays, write_arrays
from holdfast.store.trust import Trust

PAIR_SUFFIX = ".pairs"
PAIR_NAME = re.compile(r"[0-9a-f]{32}\.pairs")
PAIR_ARRAYS: Declared = {"content": ("I64", ("M", 4)), "lengths": ("I64", ("M", 2)), "products": ("F64", ("M", 3))}
_ROUNDING = 1e-9
"""How far beyond the product of two norms a product may be, as a share of it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PairProducts:
    """The products of M pairs, each pair in the order of its content ids.

    `content [M 4]` (int64) are the content ids of the first and the second completion, two halves each. `lengths [M 2]`
    (int64) are their numbers of scored tokens. `products [M 3]` (fp64) are <s, r>, <s, s> and <r, r> of the sums s of
    the first and r of the second completion's hidden states.
    """

    content: NDArray[np.int64]
    lengths: NDArray[np.int64]
    products: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.content)

    @classmethod
    def empty(cls) -> "PairProducts":
        """Those of no pair."""
        return cls(content=np.zeros((0, 4), np.int64), lengths=np.zeros((0, 2), np.int64), products=np.zeros((0, 3)))

    def where(self, rows: NDArray[np.intp] | slice) -> "PairProducts":
        """Those of some pairs."""
        return PairProducts(content=self.content[rows], lengths=self.lengths[rows], products=self.products[rows])

    def keys(self) -> NDArray[np.bytes_]:
        """`[M]`: content ids and lengths of each pair as bytes, by which pairs are found."""
        return pair_keys(self.content, self.lengths)


def pair_keys(content: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """`PairProducts.keys` of pairs that are in order, or of the same numbers in any order."""
    numbers = np.column_stack([content, lengths]).astype(">i8")
    return np.ascontiguousarray(numbers).view(f"S{8 * numbers.shape[1]}").reshape(-1)


def in_order(first: ContentId, second: ContentId) -> bool:
    """Whether a pair of these completions is in the order of its content ids."""
    return first <= second


def joined_pairs(parts: list[PairProducts]) -> PairProducts:
    """The products of all pairs, ordered by key. Of a pair that several parts have, those of the first part are
    taken."""
    parts = [PairProducts.empty(), *parts]
    everything = PairProducts(
        content=np.concatenate([part.content for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        products=np.concatenate([part.products for part in parts]),
    )
    _, rows = np.unique(everything.keys(), return_index=True)  # the first of equal ones
    return everything.where(rows)


def write_pair_shard(folder: Path, key_digest: str, pairs: PairProducts) -> Path:
    """Writes a file with these products for the store of this key. Returns its path. OSError."""
    arrays = {"content": pairs.content, "lengths": pairs.lengths, "products": pairs.products}
    return write_arrays(folder, PAIR_SUFFIX, key_digest, arrays)


def open_pair_shard(path: Path, key_digest: str, trust: Trust | None = None) -> PairProducts:
    """The products in the file at `path`, every byte and every value checked. The errors of `shard.open_shard`."""
    header, arrays = open_arrays(path, PAIR_SUFFIX, PAIR_ARRAYS, trust)
    pairs = PairProducts(**arrays)
    check_pairs(pairs)
    header.check_key(key_digest)
    return pairs


def pair_shard_header(path: Path) -> Header:
    """What the header of the file at `path` says. The errors of `shard.open_shard`."""
    return header_of(path, PAIR_ARRAYS)


def pair_shard_paths(folder: Path) -> list[Path]:
    """The paths of the files of products in a folder, ordered by name; none where there is no such folder."""
    return named_paths(folder, PAIR_NAME)


def check_pairs(pairs: PairProducts) -> None:
    """DamagedError where the numbers are products of no pairs."""
    cross, first, second = pairs.products.T
    if not np.isfinite(pairs.products).all() or (pairs.products[:, 1:] < 0).any():
        raise DamagedError("it has products that are NaN or infinite, or squares below 0")
    with np.errstate(under="ignore"):
        bound = np.sqrt(first) * np.sqrt(second)
    if (np.abs(cross) > bound * (1 + _ROUNDING)).any():
        raise DamagedError("it has products that are larger than the norms allow")
    if ((pairs.lengths < 1) | (pairs.lengths > MOST_TOKENS)).any():
        raise DamagedError("it has completions with an impossible number of tokens")
    keys = pairs.keys()
    if len(np.unique(keys)) < len(keys):
        raise DamagedError("it has a pair twice")
