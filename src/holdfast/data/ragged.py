"""Arrow columns of lists as flat arrays, so that nothing is done row by row: token ids, masks, numbers of tokens."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self, final

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from holdfast.data.columns import CHOSEN_IDS, CHOSEN_MASK, PROMPT_IDS, REJECTED_IDS, REJECTED_MASK

_IDS_OF = {CHOSEN_MASK: CHOSEN_IDS, REJECTED_MASK: REJECTED_IDS}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """A column of lists of ids: row n has `ids[ends[n] : ends[n + 1]]`."""

    ids: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self | None:
        """The column; None if it holds something else than lists of whole numbers."""
        kind = column.type
        if not _is_lists(kind) or not pa.types.is_integer(kind.value_type) or column.null_count or len(column) == 0:
            return None
        lists: Any = pa.concat_arrays(column.chunks)
        values = lists.flatten()
        if values.null_count:
            return None
        ends = lists.offsets.to_numpy()
        return cls(ids=values.to_numpy(zero_copy_only=False), ends=ends - ends[0])

    def lengths(self) -> Int[np.ndarray, "R"]:
        """The number of ids in each row."""
        return np.diff(self.ends).astype(np.int64)

    def scored(self, column: pa.ChunkedArray | None) -> Bool[np.ndarray, "N"] | None:
        """For each of `ids`, whether it is scored, as the column of masks says that belongs to it; None where all are.

        Raises `ValueError` where the column holds anything else than a mask of the row's length, None or an empty list.
        """
        if column is None or pa.types.is_null(column.type):
            return None
        kind = column.type
        if pa.types.is_fixed_size_list(kind):
            kind = pa.list_(kind.value_type)
        if not _is_lists(kind):
            raise ValueError("no lists")
        masks: Any = pa.concat_arrays(column.chunks).cast(kind)
        values = masks.flatten()
        if len(values) == 0:
            return None
        is_flags = pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
        lengths, own = np.asarray(masks.value_lengths().fill_null(0)), self.lengths()
        has_mask = lengths > 0
        if not is_flags or values.null_count or not np.array_equal(lengths[has_mask], own[has_mask]):
            raise ValueError("no masks")
        flags = values.to_numpy(zero_copy_only=False)
        scored = flags == 1
        if not (scored | (flags == 0)).all():
            raise ValueError("other values than 0 and 1")
        if scored.all():
            return None
        if has_mask.all():
            return scored
        all_scored = np.ones(len(self.ids), dtype=bool)
        all_scored[np.repeat(has_mask, own)] = scored
        return all_scored


def lists_of(column: pa.ChunkedArray) -> list[Any]:
    """The lists of a column: of ids as arrays, of anything else as they are."""
    ragged = Ragged.of(column)
    if ragged is None:
        return column.to_pylist()
    return [ragged.ids[start:stop] for start, stop in pairwise(ragged.ends.tolist())]


def last_scored(
    scored: Bool[np.ndarray, "N"], starts: Int[np.ndarray, "R"], stops: Int[np.ndarray, "R"]
) -> Int[np.ndarray, "R"]:
    """Where each run of tokens ends if what follows its last scored token is left out: at its start if none is."""
    last = np.maximum.accumulate(np.where(scored, np.arange(1, len(scored) + 1), 0))
    return np.maximum(starts, np.where(stops > starts, last[stops - 1], 0))


def lengths_of_pairs(table: pa.Table) -> tuple[Int[np.ndarray, "R"], Int[np.ndarray, "R"], Int[np.ndarray, "R"]]:
    """The numbers of tokens of prompt, chosen and rejected in the rows of a table of prepared pairs: before truncation,
    and without the tokens after the last scored one."""
    prompt = np.asarray(table[PROMPT_IDS].combine_chunks().value_lengths())
    return prompt, _lengths(table, CHOSEN_IDS, CHOSEN_MASK), _lengths(table, REJECTED_IDS, REJECTED_MASK)


def scored_in(table: pa.Table, mask_column: str) -> Bool[np.ndarray, "N"] | None:
    """`Ragged.scored` of one side's completions in a table of prepared pairs; None where all their tokens are."""
    if mask_column not in table.column_names:
        return None
    column = Ragged.of(table[_IDS_OF[mask_column]])
    return None if column is None else column.scored(table[mask_column])


def _lengths(table: pa.Table, ids: str, mask_column: str) -> Int[np.ndarray, "R"]:
    scored = scored_in(table, mask_column)
    if scored is None:
        return np.asarray(table[ids].combine_chunks().value_lengths())
    column = Ragged.of(table[ids])
    assert column is not None, "its masks were read"
    return last_scored(scored, column.ends[:-1], column.ends[1:]) - column.ends[:-1]


def _is_lists(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
