"""Tokenized rows as training reads them: each completion behind its prompt, cut to `max_length`, and what is scored.

Whatever of a row a batch has, its numbers and its picture are made of the same `Sequence`s here. They are cut by the
function that cuts the sequences of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import numpy as np
import pyarrow as pa
from datasets import Dataset

from holdfast.data.columns import (
    CHOSEN_IDS,
    CHOSEN_MASK,
    PROMPT_IDS,
    REJECTED_IDS,
    REJECTED_MASK,
    TOKENIZED_COLUMNS,
    columns_of_pairs,
)
from holdfast.data.completion_mask import cut
from holdfast.data.tokenize import TruncationMode

MASKS = {CHOSEN_IDS: CHOSEN_MASK, REJECTED_IDS: REJECTED_MASK}
"""The column that says which tokens of a completion are scored, by the column of its ids."""

_ROWS_AT_A_TIME = 1_000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How sequences are cut; see `holdfast.data.completion_mask.cut`."""

    max_length: int | None
    truncation_mode: TruncationMode


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """A prompt and one of its completions. The model is shown the ids of `prompt` in `seen_prompt`, then those of
    `completion` in `seen_completion`. `scored` says of each token of the whole completion whether it is scored."""

    prompt: np.ndarray
    completion: np.ndarray
    seen_prompt: slice
    seen_completion: slice
    scored: np.ndarray
    num_beyond: int
    """The tokens for which `max_length` has no room."""

    @classmethod
    def of(cls, prompt: np.ndarray, completion: np.ndarray, mask: np.ndarray | None, cutting: Cutting) -> "Sequence":
        """The sequence of these ids. Without a mask all tokens are scored. The first token of a sequence has no
        predecessor that could predict it, and tokens that the model is not shown are not scored."""
        positions = np.arange(len(prompt)), np.arange(len(completion))
        seen = cut(*positions, mask, cutting.max_length, cutting.truncation_mode)
        seen_prompt, seen_completion = _as_slice(seen[0]), _as_slice(seen[1])
        scored = np.zeros(len(completion), dtype=bool)
        scored[seen_completion] = True if mask is None else mask[seen_completion]
        if len(seen[0]) == 0:
            scored[seen_completion.start : seen_completion.start + 1] = False
        num_needed = len(prompt) + len(completion)
        if mask is not None:  # tokens after the last scored one need no room
            num_needed = sum(map(len, cut(*positions, mask, None, cutting.truncation_mode)[:2]))
        most = cutting.max_length
        return cls(
            prompt=prompt,
            completion=completion,
            seen_prompt=seen_prompt,
            seen_completion=seen_completion,
            scored=scored,
            num_beyond=0 if most is None else max(0, num_needed - most),
        )

    @property
    def num_seen(self) -> int:
        """The tokens that the model is shown: those of the row in a batch."""
        prompt, completion = self.seen_prompt, self.seen_completion
        return prompt.stop - prompt.start + completion.stop - completion.start


def _as_slice(positions: np.ndarray) -> slice:
    return slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(0, 0)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A row: its number in the dataset, counted from 0, and its two sequences."""

    index: int
    chosen: Sequence
    rejected: Sequence


def read_pairs(dataset: Dataset, cutting: Cutting) -> Iterator[list[Pair]]:
    """The pairs of a dataset with token ids, in order, some at a time."""
    tables: Any = dataset.select_columns(columns_of_pairs(dataset.column_names)).with_format("arrow")
    first = 0
    for table in tables.iter(_ROWS_AT_A_TIME):
        yield _pairs_of(table, first, cutting)
        first += len(table)


def pair_at(dataset: Dataset, index: int, cutting: Cutting) -> Pair:
    """The pair of one row."""
    columns: Any = dataset.select_columns(columns_of_pairs(dataset.column_names)).with_format("arrow")
    return _pairs_of(columns[index : index + 1], index, cutting)[0]


def _pairs_of(table: pa.Table, first: int, cutting: Cutting) -> list[Pair]:
    ids = {name: _arrays(table[name]) for name in TOKENIZED_COLUMNS}
    masks = {name: _masks(table, name, ids[name]) for name in MASKS}
    pairs = []
    for row in range(len(table)):
        prompt = ids[PROMPT_IDS][row]
        chosen, rejected = (
            Sequence.of(prompt, ids[name][row], masks[name][row], cutting) for name in (CHOSEN_IDS, REJECTED_IDS)
        )
        pairs.append(Pair(index=first + row, chosen=chosen, rejected=rejected))
    return pairs


def _masks(table: pa.Table, name: str, ids: list[np.ndarray]) -> list[np.ndarray | None]:
    """The mask of each row; None where all of its tokens are scored."""
    if MASKS[name] not in table.column_names:
        return [None] * len(ids)
    masks = [mask.astype(bool) for mask in _arrays(table[MASKS[name]])]
    return [mask if len(mask) and not mask.all() else None for mask in masks]


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column as arrays; empty ones for None."""
    if pa.types.is_null(column.type):
        return [np.empty(0, dtype=np.int64)] * len(column)
    lists: Any = pa.concat_arrays(column.chunks)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum([0, *np.asarray(lists.value_lengths().fill_null(0))])
    return [values[start:stop] for start, stop in pairwise(ends)]
