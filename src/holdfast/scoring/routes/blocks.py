"""Which blocks of 128 queries and 128 keys hold tokens that see each other, from the lengths of a batch alone.

All rows of a batch are laid end to end. A batch consists of *pieces*: prompts and completions. A piece sees itself, and
a completion sees its prompt. The part of a block in which two pieces meet is a rectangle of positions, so the rules of
`routes.rules` are decided by its bounds. Nothing of size [T T] is made, and nothing is read from a device: everything
here is numpy.

Given up: fewer blocks for a mask function that is not recognised. The kernel then asks it for every pair of tokens
whose pieces see each other.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.scoring.routes.rules import Bounds, Rule, allowed_of
from holdfast.scoring.segments import Segments

BLOCK = 128
"""Queries and keys of a block."""

LEAST_TOKENS = BLOCK + 1
"""Fewest tokens that a kernel is called with, so that there are two blocks at least. To the compiler a dimension of 1,
and fewer tokens than a block, are another function."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The N prompts and completions of a batch, all rows laid end to end. Every array is [N].

    `start` is a piece's first column, `length` its number of tokens, `position` the position of its first token, and
    `prompt` the number of the piece that is its prompt; a prompt is its own.
    """

    start: np.ndarray
    length: np.ndarray
    position: np.ndarray
    prompt: np.ndarray
    num_tokens: int
    """Tokens of all rows, with padding; at least `LEAST_TOKENS`."""

    @classmethod
    def of(cls, segments: Segments) -> "Pieces":
        """The pieces of a batch, in reading order."""
        pieces: list[tuple[int, int, int, int]] = []
        for row, row_segments in enumerate(segments.rows):
            start = row * segments.num_columns
            for segment in row_segments:
                prompt = len(pieces)
                pieces.append((start, segment.prompt, 0, prompt))
                start += segment.prompt
                for length in (length for group in segment.groups for length in group):
                    pieces.append((start, length, segment.prompt, prompt))
                    start += length
        start, length, position, prompt = np.array(pieces, dtype=np.int64).reshape(-1, 4).T
        num_tokens = max(LEAST_TOKENS, len(segments.rows) * segments.num_columns)
        return cls(start=start, length=length, position=position, prompt=prompt, num_tokens=num_tokens)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // BLOCK)

    def token_ids(self) -> np.ndarray:
        """Of each token its piece, its prompt's piece, and its position: [3 T], int32.

        A query sees a key of its own piece or of its prompt's. Each padding token is a piece of its own.
        """
        ids = np.zeros((3, self.num_tokens), dtype=np.int32)
        ids[:2] = -1 - np.arange(self.num_tokens, dtype=np.int32)
        columns = _ranges(self.start, self.length)
        ids[0, columns] = np.repeat(np.arange(len(self.length)), self.length)
        ids[1, columns] = np.repeat(self.prompt, self.length)
        ids[2, columns] = _ranges(self.position, self.length)
        return ids


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Which blocks a kernel computes: [B B] booleans, queries by keys. In those of `is_full` every query sees every
    key; in those of `is_partial` the kernel asks for each pair."""

    is_partial: np.ndarray
    is_full: np.ndarray

    @classmethod
    def of(cls, pieces: Pieces, rule: Rule, reach: int) -> "Blocks":
        """The blocks in which a token sees another by a rule; no more than are needed, unless it is `Rule.OTHER`."""
        num_blocks = pieces.num_blocks
        cells, queries, keys = _rectangles(pieces)
        any_seen, all_seen = allowed_of(rule, reach, queries, keys)
        is_needed = np.bincount(cells[any_seen], minlength=num_blocks**2) > 0
        num_pairs = (queries[1] - queries[0] + 1) * (keys[1] - keys[0] + 1)
        num_seen = np.bincount(cells[all_seen], weights=num_pairs[all_seen], minlength=num_blocks**2)
        is_full = (num_seen == BLOCK * BLOCK).reshape(num_blocks, num_blocks)
        is_needed = is_needed.reshape(num_blocks, num_blocks) | np.eye(num_blocks, dtype=bool)  # all see themselves
        return cls(is_partial=is_needed & ~is_full, is_full=is_full)

    def lists(self) -> list[np.ndarray]:
        """What a kernel reads, int32: of each block of queries the number [B] and the places [B B] of its partial
        blocks of keys, then of its full ones; then the same of each block of keys, whose queries the backward pass
        needs."""
        of_queries = [array for dense in (self.is_partial, self.is_full) for array in _ordered(dense)]
        of_keys = [array for dense in (self.is_partial.T, self.is_full.T) for array in _ordered(dense)]
        return of_queries + of_keys


def _rectangles(pieces: Pieces) -> tuple[np.ndarray, Bounds, Bounds]:
    """Of each part of a block in which queries of one piece meet keys of one piece that it sees: the number of the
    block, row by row, and the bounds of the queries' positions and of the keys'."""
    numbers = np.arange(len(pieces.length))
    completions = numbers[pieces.prompt != numbers]
    of_query = np.concatenate([numbers, completions])
    of_key = np.concatenate([numbers, pieces.prompt[completions]])
    has_tokens = (pieces.length[of_query] > 0) & (pieces.length[of_key] > 0)
    of_query, of_key = of_query[has_tokens], of_key[has_tokens]
    first_query, last_query = _blocks_of(pieces, of_query)
    first_key, last_key = _blocks_of(pieces, of_key)
    num_keys = last_key - first_key + 1
    counts = (last_query - first_query + 1) * num_keys
    meeting = np.repeat(np.arange(len(counts)), counts)
    place = _ranges(np.zeros_like(counts), counts)
    query = first_query[meeting] + place // num_keys[meeting]
    key = first_key[meeting] + place % num_keys[meeting]
    queries = _positions_in(pieces, of_query[meeting], query)
    keys = _positions_in(pieces, of_key[meeting], key)
    return query * pieces.num_blocks + key, queries, keys


def _blocks_of(pieces: Pieces, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last block that a piece has tokens in."""
    start, length = pieces.start[which], pieces.length[which]
    return start // BLOCK, (start + length - 1) // BLOCK


def _positions_in(pieces: Pieces, which: np.ndarray, block: np.ndarray) -> Bounds:
    """The least and the largest position of a piece's tokens in a block."""
    start, length = pieces.start[which], pieces.length[which]
    first = np.maximum(start, block * BLOCK)
    last = np.minimum(start + length, (block + 1) * BLOCK) - 1
    return first - start + pieces.position[which], last - start + pieces.position[which]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one range after another."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def _ordered(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of True in each line [B], and their places [B B], then zeros; int32."""
    line, place = np.nonzero(dense)
    counts = dense.sum(1)
    places = np.zeros(dense.shape, dtype=np.int32)
    places[line, _ranges(np.zeros_like(counts), counts)] = place
    return counts.astype(np.int32), places
