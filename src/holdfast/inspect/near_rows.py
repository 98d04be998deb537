"""Rows that are nearly the same as another one, found without comparing each with each (MinHash: Broder 1997).

A row is taken as the set of its stretches of three tokens, in the end of its prompt and in both completions, with the
side that they are on: a pair with its sides swapped is another one. Of each of sixteen hash functions the smallest hash
over that set is kept. The share of functions for which two rows have the same one estimates how many stretches they
share (Jaccard: common / all). Rows that agree in four of them that stand together are looked at. Given up: certainty.
Of rows that share nine of ten stretches about one in five is missed.
"""

from collections.abc import Sequence

import numpy as np

from holdfast.inspect.pairs import Pair

NUM_HASHES, _BAND = 16, 4
AGREEING = 14
"""So many of the hashes are the same in rows that are nearly the same."""
_END_OF_PROMPT = 128
"""A prompt may begin with a long text that all rows share."""
_BETWEEN, _CHOSEN, _REJECTED = 2**31, 2**32, 2**33
"""What stands between prompt and completions, and what is added to a completion's ids: no token ids."""

_draw = np.random.default_rng(0)
_OF_TOKENS = _draw.integers(1, 2**63, 3, dtype=np.uint64) | np.uint64(1)
_OF_STRETCH = _draw.integers(1, 2**63, dtype=np.uint64) | np.uint64(1)
_OF_HASHES = _draw.integers(1, 2**63, NUM_HASHES, dtype=np.uint64) | np.uint64(1)
_HALF = np.uint64(32)


def signatures(pairs: Sequence[Pair]) -> np.ndarray:
    """The smallest hashes of each pair, uint32 [R 16]."""
    between = np.array([_BETWEEN])
    parts = [
        np.concatenate([
            pair.chosen.prompt[-_END_OF_PROMPT:], between, pair.chosen.completion.astype(np.int64) + _CHOSEN,
            between, pair.rejected.completion.astype(np.int64) + _REJECTED, between, between,
        ])
        for pair in pairs
    ]  # fmt: skip
    tokens = np.concatenate(parts).astype(np.uint64)
    stretches = tokens[:-2] * _OF_TOKENS[0] ^ tokens[1:-1] * _OF_TOKENS[1] ^ tokens[2:] * _OF_TOKENS[2]
    stretches = (stretches ^ stretches >> _HALF) * _OF_STRETCH
    lengths = np.array([len(part) for part in parts])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    bounds = np.stack([starts, ends - 2], axis=1).reshape(-1)[:-1]  # the last two begin no stretch of their row
    smallest = [np.minimum.reduceat(_mixed(stretches ^ each), bounds)[::2] for each in _OF_HASHES]
    return np.stack(smallest, axis=1).astype(np.uint32)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A 32-bit hash of each value."""
    values = values * _OF_STRETCH
    return (values ^ values >> _HALF) * _OF_TOKENS[0] >> _HALF


def nearly_repeated(signature: np.ndarray) -> np.ndarray:
    """Whether each row is nearly the same as an earlier one, or is the same."""
    is_near = np.zeros(len(signature), dtype=bool)
    for start in range(0, NUM_HASHES, _BAND):
        first = _first_of_band(signature[:, start : start + _BAND].astype(np.uint64))
        agreeing = (signature == signature[first]).sum(axis=1)
        is_near |= (agreeing >= AGREEING) & (first != np.arange(len(signature)))
    return is_near


def _first_of_band(band: np.ndarray) -> np.ndarray:
    """For each row, the first row that has the same hashes in this band."""
    key = (band[:, 0] << _HALF | band[:, 1]) * _OF_STRETCH ^ (band[:, 2] << _HALF | band[:, 3])
    _, first, same = np.unique(key, return_index=True, return_inverse=True)
    return first[same.reshape(-1)]
