"""Which rows of tokenized columns can be used: `unusable_reason` for many rows together, and the check of their ids.

Columns are read as two flat arrays each, ids and the ends of the rows, so that nothing is done row by row but comparing
completions of equal length. A column in which something is not a list of ids of the vocabulary goes through the check
of single rows, which says what and where.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import numpy as np
import pyarrow as pa

from holdfast.data.columns import CHOSEN_IDS, PROMPT_IDS, REJECTED_IDS, TOKENIZED_COLUMNS
from holdfast.data.row_error import RowError
from holdfast.data.tokenize import TokenizedPair, TruncationMode
from holdfast.data.usability import (
    EMPTY_COMPLETION,
    EQUAL_COMPLETIONS,
    NOTHING_TO_PREDICT,
    PROMPT_FILLS,
    UNUSABLE_REASONS,
    unusable_reason,
)

USABLE = -1
"""The verdict on a usable row; that on any other is the place of its reason in `UNUSABLE_REASONS`."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Judges rows by their token ids. `vocab_size` None leaves unchecked whether the model has embeddings for them."""

    max_length: int | None
    truncation_mode: TruncationMode
    vocab_size: int | None
    name: str

    def reason(self, row: Mapping[str, Any], index: int) -> str | None:
        """Why the row cannot be used, or None. Raises `ValueError` for columns that do not hold token ids."""
        pair = TokenizedPair(
            prompt_ids=self._checked_ids(row[PROMPT_IDS], PROMPT_IDS, index),
            chosen_ids=self._checked_ids(row[CHOSEN_IDS], CHOSEN_IDS, index),
            rejected_ids=self._checked_ids(row[REJECTED_IDS], REJECTED_IDS, index),
            cut_ids=[],
        )
        return unusable_reason(pair, self.max_length, self.truncation_mode)

    def verdicts(self, table: pa.Table, first_index: int) -> np.ndarray:
        """The verdict on each row of a table, whose rows have numbers from `first_index` on. Raises as `reason`."""
        columns = [_Ragged.of(table[column]) for column in TOKENIZED_COLUMNS]
        ragged = [column for column in columns if column is not None and self._is_in_vocabulary(column)]
        if len(ragged) == len(columns):
            return verdicts(*ragged, max_length=self.max_length, mode=self.truncation_mode)
        reasons = [self.reason(row, first_index + n) for n, row in enumerate(table.to_pylist())]
        return np.array([USABLE if r is None else UNUSABLE_REASONS.index(r) for r in reasons], dtype=np.int8)

    def _is_in_vocabulary(self, column: "_Ragged") -> bool:
        ids = column.ids[column.ends[0] : column.ends[-1]]
        return not ids.size or (ids.min() >= 0 and (self.vocab_size is None or ids.max() < self.vocab_size))

    def _checked_ids(self, value: Any, column: str, index: int) -> Any:
        try:
            ids = np.asarray([] if value is None else value)
        except ValueError:  # lists of unlike lengths inside of it
            ids = np.empty((0, 0))
        if value is None or ids.ndim != 1 or (ids.size > 0 and ids.dtype.kind not in "iu"):
            found = "None" if value is None else f"{type(value).__name__} {str(value)[:60]}"
            problem = f"the column {column!r} must hold a list of token ids; found {found}. Correct the row or drop it."
            raise RowError(self.name, index, problem)
        if ids.size > 0 and (ids.min() < 0 or (self.vocab_size is not None and ids.max() >= self.vocab_size)):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            limit = "at least 0" if self.vocab_size is None else f"in 0..{self.vocab_size - 1}, the model's vocabulary"
            raise RowError(
                self.name,
                index,
                f"the token ids in the column {column!r} must be {limit}; found {wrong}. Tokenize with the tokenizer "
                "of the model, or call `model.resize_token_embeddings(len(tokenizer))`.",
            )
        return ids


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Ragged:
    """A column of lists of ids: row n has `ids[ends[n] : ends[n + 1]]`."""

    ids: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self | None:
        """The column; None if it holds something else than lists of whole numbers."""
        kind = column.type
        is_lists = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)
        if not is_lists or column.null_count or len(column) == 0:
            return None
        lists: Any = pa.concat_arrays(column.chunks)
        if lists.flatten().null_count:
            return None
        return cls(ids=lists.values.to_numpy(zero_copy_only=False), ends=lists.offsets.to_numpy())

    def lengths(self) -> np.ndarray:
        """The number of ids in each row."""
        return np.diff(self.ends).astype(np.int64)


def verdicts(
    prompt: _Ragged, chosen: _Ragged, rejected: _Ragged, *, max_length: int | None, mode: TruncationMode
) -> np.ndarray:
    """`unusable_reason` of each row, as an int8 verdict."""
    whole = chosen.lengths(), rejected.lengths()
    cut = [_truncated_lengths(prompt.lengths(), completion, max_length, mode) for completion in whole]
    (chosen_prompt, chosen_left), (rejected_prompt, rejected_left) = cut
    found = np.full(len(chosen_left), USABLE, dtype=np.int8)
    found[np.minimum(chosen_prompt + chosen_left, rejected_prompt + rejected_left) < 2] = _code(NOTHING_TO_PREDICT)
    is_from_end = mode == "keep_end"
    for row in np.flatnonzero(chosen_left == rejected_left):
        length = int(chosen_left[row])
        starts = [
            int(side.ends[row + 1]) - length if is_from_end else int(side.ends[row]) for side in (chosen, rejected)
        ]
        ours, theirs = (
            side.ids[start : start + length] for side, start in zip((chosen, rejected), starts, strict=True)
        )
        if np.array_equal(ours, theirs):
            found[row] = _code(EQUAL_COMPLETIONS)
    found[(chosen_left == 0) | (rejected_left == 0)] = _code(PROMPT_FILLS)
    found[(whole[0] == 0) | (whole[1] == 0)] = _code(EMPTY_COMPLETION)
    return found


def _truncated_lengths(
    prompt: np.ndarray, completion: np.ndarray, max_length: int | None, mode: TruncationMode
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of prompt and completion after `truncate`."""
    if max_length is None:
        return prompt, completion
    excess = np.maximum(0, prompt + completion - max_length)
    if mode == "keep_start":
        from_completion = np.minimum(excess, completion)
        return prompt - (excess - from_completion), completion - from_completion
    from_prompt = np.minimum(excess, prompt)
    return prompt - from_prompt, completion - (excess - from_prompt)


def _code(reason: str) -> int:
    return UNUSABLE_REASONS.index(reason)


def reasons_by_row(found: Sequence[np.ndarray]) -> dict[str, list[int]]:
    """The unusable rows by reason, from the verdicts on consecutive tables."""
    all_rows = np.concatenate(found) if found else np.zeros(0, dtype=np.int8)
    rows = {reason: np.flatnonzero(all_rows == code).tolist() for code, reason in enumerate(UNUSABLE_REASONS)}
    return {reason: numbers for reason, numbers in rows.items() if numbers}
