"""The products of pairs that a store holds, found by the two completions of a pair.

They are read from the files beside the store's shards, in one look at the folder, and added to with files of their own.
They are few numbers, so all of them are in memory: 72 bytes a pair. Losing one costs a forward pass when somebody asks
for it, and no training number ever depends on one. So unlike log-probs they are written in larger pieces, a kill may
lose what is not written yet, and stores that hold the same numbers under another version are not looked into.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from holdfast.batch import ContentId
from holdfast.store.files import DamagedError, UnusableError, set_aside
from holdfast.store.pair_shard import (
    PairProducts,
    in_order,
    joined_pairs,
    open_pair_shard,
    pair_keys,
    pair_shard_paths,
    write_pair_shard,
)
from holdfast.store.refusals import reading, warn_unused, writing
from holdfast.store.store import LogpStore
from holdfast.store.trust import Trust

FILE_PAIRS = 4_096
"""A file is written once the products of this many pairs have been added."""
FILE_SECONDS = 30.0
"""A file is also written with the first addition after so much time."""

PairIds = tuple[ContentId, ContentId]


@final
class PairTable:
    """The products of pairs in the folder of `store`; made by `open`."""

    def __init__(self, store: LogpStore) -> None:
        self._store = store
        self._pairs = PairProducts.empty()
        self._keys = self._pairs.keys()
        self._seen: set[str] = set()
        self._buffer: dict[tuple[PairIds, tuple[int, int]], tuple[float, float, float]] = {}
        self._unwritten: list[PairProducts] = []
        self._flushed_at = time.monotonic()

    @classmethod
    def open(cls, store: LogpStore) -> "PairTable":
        """The products that are there now. Damaged files are set aside, and those that may not be used are left in
        place, with a warning. ValueError where the folder cannot be read or a file is of a newer format."""
        table = cls(store)
        table.refresh()
        return table

    def __len__(self) -> int:
        return len(self._pairs) + len(self._buffer)

    def find(self, content: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """`[Q 3]`: for completions a and b of each pair <a, b>, <a, a> and <b, b>; NaN where that is not known.

        `content [Q 4]` are the content ids of a and b, and `lengths [Q 2]` their numbers of tokens.
        """
        is_swapped = _is_swapped(content)
        in_order_ = np.where(is_swapped[:, None], content[:, [2, 3, 0, 1]], content)
        asked = pair_keys(in_order_, np.where(is_swapped[:, None], lengths[:, ::-1], lengths))
        found = np.full((len(content), 3), np.nan)
        if len(self._keys):
            places = np.minimum(np.searchsorted(self._keys, asked), len(self._keys) - 1)
            is_here = self._keys[places] == asked
            found[is_here] = self._pairs.products[places[is_here]]
        return np.where(is_swapped[:, None], found[:, [0, 2, 1]], found)

    def add(self, products: Mapping[tuple[PairIds, tuple[int, int]], tuple[float, float, float]]) -> None:
        """Adds the products of pairs (see `find`) by content ids and numbers of tokens. They are written with the next
        file. ValueError where that is not possible, or where one of them is no finite number."""
        for ((first, second), lengths), values in products.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    "the products of the hidden states of a pair were to be stored; they are "
                    f"{', '.join(f'{value:g}' for value in values)}. Check the model's weights for NaN and its dtype "
                    "for overflow (fp16)."
                )
            if in_order(first, second):
                self._buffer[(first, second), lengths] = values
            else:
                self._buffer[(second, first), (lengths[1], lengths[0])] = values[0], values[2], values[1]
        is_late = time.monotonic() - self._flushed_at >= FILE_SECONDS
        if len(self._buffer) >= FILE_PAIRS or (self._buffer and is_late):
            self.flush()

    def add_all(self, pairs: PairProducts) -> None:
        """Adds the products of checked pairs that are not there yet."""
        is_new = np.isnan(self.find(pairs.content, pairs.lengths)[:, 0])
        self._unwritten = [*self._unwritten, pairs.where(np.flatnonzero(is_new))]

    def flush(self) -> None:
        """Writes what was added. ValueError where that is not possible."""
        new = joined_pairs([*self._unwritten, _of_buffer(self._buffer)])
        if not len(new):
            return
        self._store.check_writable()
        with writing(
            self._store.folder, f"products of {len(new)} pairs", self._store.num_completions, self._store.num_bytes
        ):
            path = write_pair_shard(self._store.folder, self._store.key.digest(), new)
        self._buffer.clear()
        self._unwritten = []
        self._flushed_at = time.monotonic()
        self._seen.add(path.name)
        self._include([new])

    def refresh(self) -> None:
        """Reads what other processes have written since."""
        new: list[PairProducts] = []
        damaged: list[tuple[Path, DamagedError]] = []
        folder = self._store.folder
        with reading(folder):
            trust = Trust.of(folder)
            for path in pair_shard_paths(folder):
                if path.name in self._seen:
                    continue
                self._seen.add(path.name)
                try:
                    new.append(open_pair_shard(path, folder.name, trust))
                except DamagedError as error:
                    damaged.append((path, error))
                except FileNotFoundError:  # merged into another, which comes with the next look
                    continue
        _set_aside(folder, damaged)
        if new:
            self._include(new)

    def _include(self, new: list[PairProducts]) -> None:
        self._pairs = joined_pairs([self._pairs, *new])
        self._keys = self._pairs.keys()


def _is_swapped(content: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the second completion's content id comes before the first one's, `[Q]`."""
    high, low, other_high, other_low = content.T
    return (other_high < high) | ((other_high == high) & (other_low < low))


def _of_buffer(
    buffer: Mapping[tuple[PairIds, tuple[int, int]], tuple[float, float, float]],
) -> PairProducts:
    return PairProducts(
        content=np.array([(*first, *second) for (first, second), _ in buffer], dtype=np.int64).reshape(-1, 4),
        lengths=np.array([lengths for _, lengths in buffer], dtype=np.int64).reshape(-1, 2),
        products=np.array([*buffer.values()], dtype=np.float64).reshape(-1, 3),
    )


def _set_aside(folder: Path, damaged: list[tuple[Path, DamagedError]]) -> None:
    unusable = [(path, error) for path, error in damaged if isinstance(error, UnusableError)]
    broken = [(path, error) for path, error in damaged if not isinstance(error, UnusableError)]
    if unusable:
        warn_unused(folder, "file(s)", unusable, "left in place, since they may be sound")
    if broken:
        are_moved = [set_aside(path) for path, _ in broken]
        left = "left in place, since renaming them is not permitted"
        warn_unused(folder, "damaged file(s)", broken, "renamed to *.corrupt" if all(are_moved) else left)
