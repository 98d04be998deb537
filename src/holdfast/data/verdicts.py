"""Which rows of tokenized columns can be used: `unusable_reason` for many rows together, and the check of their ids.

Columns are read as two flat arrays each, ids and the ends of the rows, so that nothing is done row by row but comparing
completions of equal length. A column in which something is not a list of ids of the vocabulary, or not a mask, goes
through the check of single rows, which says what and where.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, final

import numpy as np
import pyarrow as pa

from holdfast.data.columns import (
    CHOSEN_IDS,
    CHOSEN_MASK,
    MASK_COLUMNS,
    REJECTED_IDS,
    REJECTED_MASK,
    TOKENIZED_COLUMNS,
)
from holdfast.data.completion_mask import read_mask
from holdfast.data.ragged import Ragged, last_scored
from holdfast.data.row_error import RowError
from holdfast.data.tokenize import TokenizedPair, TruncationMode
from holdfast.data.usability import (
    EMPTY_COMPLETION,
    EQUAL_COMPLETIONS,
    NO_SCORED_TOKEN,
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
        """Why the row cannot be used, or None. Raises `ValueError` for columns that do not hold token ids or masks."""
        prompt_ids, chosen_ids, rejected_ids = (
            self._checked_ids(row[column], column, index) for column in TOKENIZED_COLUMNS
        )
        pair = TokenizedPair(
            prompt_ids=prompt_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            cut_ids=[],
            chosen_mask=self._checked_mask(row, CHOSEN_MASK, CHOSEN_IDS, len(chosen_ids), index),
            rejected_mask=self._checked_mask(row, REJECTED_MASK, REJECTED_IDS, len(rejected_ids), index),
        )
        return unusable_reason(pair, self.max_length, self.truncation_mode)

    def verdicts(self, table: pa.Table, first_index: int) -> np.ndarray:
        """The verdict on each row of a table, whose rows have numbers from `first_index` on. Raises as `reason`."""
        columns = [Ragged.of(table[column]) for column in TOKENIZED_COLUMNS]
        ragged = [column for column in columns if column is not None and self._is_in_vocabulary(column)]
        if len(ragged) == len(columns):
            prompt, *completions = ragged
            scored: list[np.ndarray | None] = []
            with suppress(ValueError):  # a row is at fault, and is found below
                for ids, name in zip(completions, MASK_COLUMNS, strict=True):
                    scored.append(ids.scored(table[name] if name in table.column_names else None))
            if len(scored) == len(completions):
                chosen, rejected = (
                    _Side.cut(prompt, ids, flags, self.max_length, self.truncation_mode)
                    for ids, flags in zip(completions, scored, strict=True)
                )
                return _verdicts(chosen, rejected, max_length=self.max_length)
        reasons = [self.reason(row, first_index + n) for n, row in enumerate(table.to_pylist())]
        return np.array([USABLE if r is None else UNUSABLE_REASONS.index(r) for r in reasons], dtype=np.int8)

    def _is_in_vocabulary(self, column: Ragged) -> bool:
        ids = column.ids
        return not ids.size or (ids.min() >= 0 and (self.vocab_size is None or ids.max() < self.vocab_size))

    def _checked_mask(
        self, row: Mapping[str, Any], column: str, ids_column: str, num_tokens: int, index: int
    ) -> np.ndarray | None:
        try:
            return read_mask(row.get(column), column, ids_column, num_tokens)
        except ValueError as error:
            raise RowError(self.name, index, str(error)) from error

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
class _Side:
    """The chosen or the rejected completions of many rows, cut as `completion_mask.cut` cuts one.

    Of row n, `num_prompt[n]` tokens of the prompt are left, and of the completion `ids[starts[n] : stops[n]]`.
    `num_whole` is its length before, `num_scored` the number of scored tokens that are left, and `num_targets` that of
    those which have a token before them. `scored` is None where all of `ids` are.
    """

    ids: np.ndarray
    scored: np.ndarray | None
    num_prompt: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    num_whole: np.ndarray
    num_scored: np.ndarray
    num_targets: np.ndarray

    @classmethod
    def cut(
        cls, prompt: Ragged, completion: Ragged, scored: np.ndarray | None, max_length: int | None, mode: TruncationMode
    ) -> Self:
        """The completions of rows with these prompts."""
        starts, stops = completion.ends[:-1].astype(np.int64), completion.ends[1:].astype(np.int64)
        if scored is not None:
            stops = last_scored(scored, starts, stops)
        num_prompt, num_left = _truncated_lengths(prompt.lengths(), stops - starts, max_length, mode)
        starts, stops = (stops - num_left, stops) if mode == "keep_end" else (starts, starts + num_left)
        num_scored, num_targets = num_left, num_left - (num_prompt == 0)
        if scored is not None:
            stops = last_scored(scored, starts, stops)
            before = np.concatenate([[0], scored.cumsum()])
            num_scored = before[stops] - before[starts]
            num_targets = before[stops] - before[np.minimum(starts + (num_prompt == 0), stops)]
        return cls(
            ids=completion.ids, scored=scored, num_prompt=num_prompt, starts=starts, stops=stops,
            num_whole=completion.lengths(), num_scored=num_scored, num_targets=num_targets,
        )  # fmt: skip

    def is_same(self, row: int, other: "_Side") -> bool:
        """Whether a row has the same completion on both sides, scored alike."""
        ours, theirs = (slice(side.starts[row], side.stops[row]) for side in (self, other))
        if not np.array_equal(self.ids[ours], other.ids[theirs]):
            return False
        if self.scored is None and other.scored is None:
            return True
        flags, others = (
            np.ones(place.stop - place.start, dtype=bool) if side.scored is None else side.scored[place]
            for side, place in ((self, ours), (other, theirs))
        )
        return np.array_equal(flags, others)


def _verdicts(chosen: _Side, rejected: _Side, *, max_length: int | None) -> np.ndarray:
    """`unusable_reason` of each row, as an int8 verdict."""
    sides = chosen, rejected
    found = np.full(len(chosen.starts), USABLE, dtype=np.int8)
    found[np.minimum(chosen.num_targets, rejected.num_targets) < 1] = _code(NOTHING_TO_PREDICT)
    for row in np.flatnonzero(chosen.stops - chosen.starts == rejected.stops - rejected.starts).tolist():
        if chosen.is_same(row, rejected):
            found[row] = _code(EQUAL_COMPLETIONS)
    has_none = [side.num_scored == 0 for side in sides]
    found[has_none[0] | has_none[1]] = _code(NO_SCORED_TOKEN)
    fills = [none & (side.num_prompt == max_length) for side, none in zip(sides, has_none, strict=True)]
    found[fills[0] | fills[1]] = _code(PROMPT_FILLS)
    found[(chosen.num_whole == 0) | (rejected.num_whole == 0)] = _code(EMPTY_COMPLETION)
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
