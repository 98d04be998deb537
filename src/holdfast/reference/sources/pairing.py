"""The two completions of a pair brought together while a dataset is scored: the products of their hidden states.

A forward pass gives the sum of each completion's hidden states. A pair's products (`store.pair_shard`) need both sums,
and its completions may come in different batches. So a sum waits in host memory for the other completions that it makes
pairs with, and is let go once it has met them. What must wait too long for the memory that there is, or is scored by
another process or in another run, is left open: `Reference.fill` scores such pairs again where somebody asks for them.

Given up: writing sums down, which would take a hundred times the bytes of a completion's log-probs.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from holdfast.batch import ContentId, PairBatch
from holdfast.store.pair_table import PairIds, PairTable
from holdfast.store.store import LogpStore

MOST_BYTES = 1 << 28
"""Most bytes of sums that wait: 256 MiB, which is 16,384 completions of a model with 4,096 channels."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """The sum of a completion's hidden states over so many tokens."""

    length: int
    total: NDArray[np.floating]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """The sums of hidden states `[S h]` of completions by content id, with their numbers of scored tokens, and the
    `pairs` that are known of them beside those of the dataset."""

    ids: tuple[ContentId, ...]
    lengths: tuple[int, ...]
    sums: NDArray[np.floating]
    pairs: tuple[PairIds, ...]

    @classmethod
    def of(cls, batch: PairBatch, sums: Tensor) -> "Summed":
        """Those of a batch, whose `sums` are in host memory."""
        ids, pairs = batch.content_ids(), ()
        if batch.num_pairs:
            sides = zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)
            pairs = tuple((ids[chosen], ids[rejected]) for chosen, rejected in sides)
        return cls(ids=tuple(ids), lengths=tuple(batch.lengths()), sums=sums.numpy(), pairs=pairs)


Collect = Callable[[Summed], None]
"""Takes the sums of completions that were scored."""


@contextlib.contextmanager
def pairing(store: LogpStore, pairs: Callable[[], Iterable[PairIds]]) -> Iterator[Collect]:
    """A context that gives what collects sums of hidden states, and puts the products of `pairs`, and of the pairs that
    come with the sums, beside the shards of `store`. Both are looked at once the first sums come. ValueError where they
    cannot be written."""
    made: list[Pairing] = []

    def collect(summed: Summed) -> None:
        if not made:
            made.append(Pairing(PairTable.open(store), pairs()))
        made[0].add(summed)

    try:
        yield collect
    except BaseException:
        with contextlib.suppress(ValueError):  # the first error is the one to tell
            for each in made:
                each.table.flush()
        raise
    for each in made:
        each.table.flush()


@final
class Pairing:
    """Puts the products of `pairs` into `table`, as the sums of their completions come in."""

    def __init__(self, table: PairTable, pairs: Iterable[PairIds], most_bytes: int = MOST_BYTES) -> None:
        self.table = table
        self._most_bytes = most_bytes
        self._open: dict[ContentId, set[ContentId]] = {}
        self._waiting: dict[ContentId, _Waiting] = {}
        self._num_bytes = 0
        for pair in pairs:
            self._expect(pair)

    def add(self, summed: Summed) -> None:
        """Takes the sums of completions. ValueError where products cannot be written."""
        for pair in summed.pairs:
            self._expect(pair)
        products = {}
        for content_id, length, total in zip(summed.ids, summed.lengths, summed.sums, strict=True):
            if content_id not in self._open:
                continue
            own = _Waiting(length=length, total=total.copy())
            for other in [*self._open[content_id]]:
                if (met := self._waiting.get(other)) is not None:
                    products[(content_id, other), (length, met.length)] = _products(own.total, met.total)
                    self._close(content_id, other)
            if content_id in self._open and content_id not in self._waiting:
                self._waiting[content_id] = own
                self._num_bytes += own.total.nbytes
        while self._num_bytes > self._most_bytes:
            self._let_go(next(iter(self._waiting)))  # the one that waits for longest
        self.table.add(products)

    def _expect(self, pair: PairIds) -> None:
        first, second = pair
        if first != second:
            self._open.setdefault(first, set()).add(second)
            self._open.setdefault(second, set()).add(first)

    def _close(self, first: ContentId, second: ContentId) -> None:
        for one, other in ((first, second), (second, first)):
            self._open[one].discard(other)
            if not self._open[one]:
                del self._open[one]
                self._let_go(one)

    def _let_go(self, content_id: ContentId) -> None:
        if (waiting := self._waiting.pop(content_id, None)) is not None:
            self._num_bytes -= waiting.total.nbytes


def _products(one: NDArray[np.floating], other: NDArray[np.floating]) -> tuple[float, float, float]:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other), float(one @ one), float(other @ other)
