"""Which shard of a store has a completion, and where: 32 bytes for each, found by bisection, 100,000 at a time.

An entry is identified by content id and length together: a stored completion of another length than the one looked up
counts as another completion. Entries stand in sorted runs. New ones begin a run, and runs of similar size are merged,
so adding stays cheap however many entries there are. Given up: a plain dict, which takes eight times as much memory in
each process.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from holdfast.store.shard import Shard, gathered

_ID_BYTES, _KEY_BYTES = 16, 20

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """M entries, ordered by `keys [M]`: content id and length, big-endian, 20 bytes each. `shard`, `start`: `[M]`."""

    keys: NDArray[np.bytes_]
    shard: NDArray[np.int32]
    start: Ints

    def raw(self) -> NDArray[np.uint8]:
        """The keys' bytes, `[M 20]`."""
        return self.keys.view(np.uint8).reshape(-1, _KEY_BYTES)

    def lengths(self) -> Ints:
        """The completions' lengths, `[M]`."""
        return np.ascontiguousarray(self.raw()[:, _ID_BYTES:]).view(">u4").ravel().astype(np.int64)

    def select(self, indices: NDArray[np.intp]) -> "_Run":
        """The entries at `indices`, in that order."""
        return _Run(keys=self.keys[indices], shard=self.shard[indices], start=self.start[indices])


@dataclass(frozen=True, slots=True, kw_only=True)
class Locations:
    """Of each of Q completions: the number of its shard (-1: in none), its first index there, and its length; `[Q]`."""

    shard: Ints
    start: Ints
    length: Ints


@final
class Index:
    """Where the completions of shards are. Shards are numbered in the order in which they are added."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._num_shards = 0
        self.num_completions = 0
        self.num_tokens = 0

    def add(self, shards: list[Shard]) -> None:
        """Adds shards. Of a completion that several shards have, the first shard's entry stays."""
        if not shards:
            return
        numbers = range(self._num_shards, self._num_shards + len(shards))
        self._num_shards += len(shards)
        run = _Run(
            keys=_keys(
                np.concatenate([shard.content for shard in shards]), np.concatenate([shard.lengths for shard in shards])
            ),
            shard=np.repeat(np.array(numbers, dtype=np.int32), [len(shard.lengths) for shard in shards]),
            start=np.concatenate([shard.starts() for shard in shards]),
        )
        run = _sorted(run.select(np.flatnonzero(self._locate(run.keys).shard < 0)))
        self.num_completions += len(run.keys)
        self.num_tokens += int(run.lengths().sum())
        self._runs.append(run)
        while len(self._runs) > 1 and 2 * len(self._runs[-1].keys) >= len(self._runs[-2].keys):
            last = self._runs.pop()
            self._runs[-1] = _merged(self._runs[-1], last)

    def find(self, content: Ints, lengths: Ints | None) -> Locations:
        """Where the completions with these content ids `[Q 2]` and `lengths` `[Q]` are; None for lengths means any."""
        if lengths is not None:
            is_possible = (lengths >= 0) & (lengths < 1 << 32)
            located = self._locate(_keys(content, np.where(is_possible, lengths, 0)))
            return Locations(shard=np.where(is_possible, located.shard, -1), start=located.start, length=lengths)
        return self._locate(_keys(content, np.zeros(len(content), dtype=np.int64)), has_length=False)

    def _locate(self, keys: NDArray[np.bytes_], *, has_length: bool = True) -> Locations:
        num_bytes = _KEY_BYTES if has_length else _ID_BYTES
        prefixes = keys.view(np.uint8).reshape(-1, _KEY_BYTES)[:, :num_bytes]
        shard = np.full(len(keys), -1, dtype=np.int64)
        start, length = np.zeros_like(shard), np.zeros_like(shard)
        for run in self._runs:
            if len(run.keys) == 0:
                continue
            # A key without a length ends in zeros, so it sorts before every entry of its content id.
            entry = np.minimum(np.searchsorted(run.keys, keys), len(run.keys) - 1)
            is_here = (run.raw()[entry, :num_bytes] == prefixes).all(1)
            entries = entry[is_here]
            shard[is_here], start[is_here] = run.shard[entries], run.start[entries]
            length[is_here] = run.select(entries).lengths()
        return Locations(shard=shard, start=start, length=length)


def sums_at(located: Locations, logps: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """The sum of the log-probs at each location `[Q]`, in fp64; NaN for a completion that is in no shard. `logps` are
    those of the shards, by number."""
    sums = np.full(len(located.shard), np.nan)
    order = np.argsort(located.shard, kind="stable")
    bounds = np.searchsorted(located.shard[order], np.arange(len(logps) + 1))
    for number, values in enumerate(logps):
        rows = order[bounds[number] : bounds[number + 1]]
        if len(rows):
            lengths = located.length[rows]
            ends = np.cumsum(lengths)
            wide = gathered(values, located.start[rows], lengths).astype(np.float64)
            sums[rows] = np.add.reduceat(np.append(wide, 0.0), ends - lengths) * (lengths > 0)
    return sums


def _keys(content: Ints, lengths: Ints) -> NDArray[np.bytes_]:
    """`_Run.keys` of these completions. They are bytes, because numpy cannot bisect pairs of integers."""
    raw = np.empty((len(content), _KEY_BYTES), dtype=np.uint8)
    raw[:, :_ID_BYTES] = content.astype(">i8").view(np.uint8).reshape(-1, _ID_BYTES)
    raw[:, _ID_BYTES:] = lengths.astype(">u4").view(np.uint8).reshape(-1, _KEY_BYTES - _ID_BYTES)
    return raw.view(f"S{_KEY_BYTES}").reshape(-1)


def _sorted(run: _Run) -> _Run:
    """The run in order; of entries with equal keys, the first."""
    run = run.select(np.argsort(run.keys, kind="stable"))
    is_first = np.ones(len(run.keys), dtype=bool)
    is_first[1:] = run.keys[1:] != run.keys[:-1]
    return run.select(np.flatnonzero(is_first))


def _merged(first: _Run, second: _Run) -> _Run:
    both = _Run(
        keys=np.concatenate([first.keys, second.keys]),
        shard=np.concatenate([first.shard, second.shard]),
        start=np.concatenate([first.start, second.start]),
    )
    return both.select(np.argsort(both.keys, kind="stable"))
