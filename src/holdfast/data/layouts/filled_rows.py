"""Rows filled with many segments, up to a budget of tokens: what the prefix-shared and the packed layout share.

A segment is what must stand together: a prompt with its completions, or one sequence. Segments are spread over as few
rows as the budget allows, of about the same length, so that little of a batch is padding. The segments of each row go
along for `scoring.attention`, which keeps completions apart. The sequences have the order and the content ids of the
padded layout, but equal ones are scored once.

Given up: rows that any attention computes right. Without `scoring.attention`, completions would see each other.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from holdfast.batch import HOST_SEQUENCES, HostSequences
from holdfast.data.layouts.base import Layout, LayoutOptions
from holdfast.data.layouts.sequences import TokenSequence, check_counts, check_row_options, content_id_of, no_pairs
from holdfast.scoring.segments import SEGMENTS, Segments

ROW_TOKENS = 1_000
"""Tokens of a row by default: enough for fast matrix products, few enough for a CPU's caches."""

ROW_PADDING = 0.06
"""Largest share of a batch's tokens that may be padding. Rows become longer than `ROW_TOKENS` to keep to it."""


@dataclass(slots=True, kw_only=True)
class RowSegment:
    """What stands together in a row: a prompt, and by index the `sequences` that begin with it.

    A segment of one sequence alone has the whole sequence as its `prompt`.
    """

    prompt: np.ndarray
    sequences: list[int] = field(default_factory=list)
    num_tokens: int


def check_row_tokens(row_tokens: int | None) -> None:
    """ValueError for a budget that no token fits in."""
    if row_tokens is not None and row_tokens < 1:
        raise ValueError(
            f"row_tokens is how many tokens a row may have; found {row_tokens}. Give at least 1, such as "
            f"{ROW_TOKENS}, or None."
        )


def default_row_tokens(tokens_per_batch: int | None) -> int | None:
    """The budget of a row in a run that computes at most `tokens_per_batch` tokens at a time; None for no limit."""
    return None if tokens_per_batch is None else min(ROW_TOKENS, tokens_per_batch)


def fill_rows(
    sequences: Sequence[TokenSequence],
    segments_of: Callable[[Sequence[TokenSequence]], list[RowSegment]],
    *,
    pad_token_id: int,
    row_tokens: int | None,
    multiple: int | None,
) -> tuple[dict[str, Any], Tensor]:
    """A batch less `chosen` and `rejected`, and the index in it of each of `sequences`: equal ones become one.

    `segments_of` puts the distinct sequences into segments. A row of the batch has at most `row_tokens` tokens, or one
    segment where that has more; None is about `ROW_TOKENS`.
    """
    check_counts(np.array([sequence.num_targets for sequence in sequences]))
    distinct, index_of_each = _distinct(sequences)
    segments = segments_of(distinct)
    members_of_rows = spread_segments([segment.num_tokens for segment in segments], row_tokens)
    occurrences = np.bincount(index_of_each)
    batch = _RowsInProgress.empty(len(members_of_rows), _width(segments, members_of_rows, multiple), pad_token_id)
    predicted: dict[int, np.ndarray] = {}  # by sequence, the flat positions that predict its tokens
    for row, members in enumerate(members_of_rows):
        for member in members:
            predicted |= batch.append(row, segments[member], distinct, occurrences)
    sources = [predicted[index] for index in range(len(distinct))]
    targets = [sequence.of_targets(sequence.ids[max(sequence.num_prompt, 1) :]) for sequence in distinct]
    content, lengths = [content_id_of(sequence) for sequence in distinct], [*map(len, targets)]
    tensors = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "source": np.concatenate(sources),
        "target": np.concatenate(targets),
        "sequence": np.repeat(np.arange(len(distinct)), lengths),
        "content": np.array(content),
    }
    num_rows, num_columns = batch.input_ids.shape
    in_host_memory = {
        SEGMENTS: Segments.of(batch.lengths, num_rows, num_columns).planned(),
        HOST_SEQUENCES: HostSequences(
            content=tuple(content),
            lengths=tuple(lengths),
            rows=tuple(int(source[0]) // num_columns for source in sources),
        ),
    }
    arrays = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return arrays | in_host_memory, torch.from_numpy(index_of_each)


@dataclass(slots=True, kw_only=True)
class _RowsInProgress:
    """The rows of a batch while segments are written into them. `num_filled` are the tokens of each row so far."""

    input_ids: np.ndarray  # [R T]
    position_ids: np.ndarray
    attention_mask: np.ndarray
    lengths: list[tuple[int, int, bool]]
    num_filled: list[int]

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, pad_token_id: int) -> "_RowsInProgress":
        """Rows of nothing but padding."""
        zeros = np.zeros((num_rows, num_columns), dtype=np.int64)
        ids = np.full_like(zeros, pad_token_id)
        return cls(
            input_ids=ids, position_ids=zeros, attention_mask=zeros.copy(), lengths=[], num_filled=[0] * num_rows
        )  # fmt: skip

    def append(
        self, row: int, segment: RowSegment, sequences: Sequence[TokenSequence], occurrences: np.ndarray
    ) -> dict[int, np.ndarray]:
        """Writes the segment into the row. Returns, for each of its sequences, the flat positions that predict its
        scored tokens. `occurrences` says how many of the batch's completions each sequence is."""
        num_shared = len(segment.prompt)
        shared = self._append(row, segment.prompt, 0, occurrences[segment.sequences].sum(), is_prompt=True)
        predicted = {}
        for index in segment.sequences:
            ids, num_prompt, _ = sequences[index]
            positions = shared
            if len(ids) > num_shared:
                own = self._append(row, ids[num_shared:], num_shared, occurrences[index], is_prompt=False)
                positions = np.concatenate([shared, own])
            # Each token is predicted where the one before it stands.
            predicted[index] = sequences[index].of_targets(positions[max(num_prompt, 1) - 1 : -1])
        return predicted

    def _append(self, row: int, ids: np.ndarray, position: int, count: int, *, is_prompt: bool) -> np.ndarray:
        """Writes `ids`, the first of which has this position in its sequence. Returns their flat positions."""
        start = self.num_filled[row]
        end = self.num_filled[row] = start + len(ids)
        self.input_ids[row, start:end] = ids
        self.position_ids[row, start:end] = position + np.arange(len(ids))
        self.attention_mask[row, start:end] = count
        self.lengths.append((row, len(ids), is_prompt))
        return row * self.input_ids.shape[1] + np.arange(start, end)


def _distinct(sequences: Sequence[TokenSequence]) -> tuple[list[TokenSequence], np.ndarray]:
    """The distinct sequences, in the order in which they first come, and the index among them of each sequence."""
    indices: dict[tuple[int, bytes, bytes | None], int] = {}
    distinct, index_of_each = [], []
    for sequence in sequences:
        scored = None if sequence.scored is None else sequence.scored.tobytes()
        key = (sequence.num_prompt, sequence.ids.tobytes(), scored)
        if key not in indices:
            indices[key] = len(distinct)
            distinct.append(sequence)
        index_of_each.append(indices[key])
    return distinct, np.array(index_of_each)


def _width(segments: Sequence[RowSegment], members_of_rows: Sequence[Sequence[int]], multiple: int | None) -> int:
    """Tokens of the longest row, padded to a multiple."""
    longest = max(sum(segments[member].num_tokens for member in members) for members in members_of_rows)
    return -(-longest // (multiple or 1)) * (multiple or 1)


def spread_segments(sizes: Sequence[int], budget: int | None) -> list[list[int]]:
    """The segments of each row, by number, where `sizes` are the tokens of each segment.

    Rows are few and alike in length. None has more than `budget` tokens, unless one segment has. Without a budget, rows
    have `ROW_TOKENS`; they become fewer and longer until at most `ROW_PADDING` of the batch is padding.
    """
    total = sum(sizes)
    if budget is None:
        num_rows = max(1, min(-(-total // ROW_TOKENS), len(sizes)))
        while True:
            rows, longest = _into_rows(sizes, num_rows)
            if num_rows == 1 or num_rows * longest <= (1 + ROW_PADDING) * total:
                return rows
            num_rows -= max(1, num_rows // 8)
    capacity = max([budget, *sizes])
    num_rows = -(-total // capacity)
    while True:  # ends at the latest with a row for each segment
        rows, longest = _into_rows(sizes, num_rows)
        if longest <= capacity:
            return rows
        num_rows += 1


def _into_rows(sizes: Sequence[int], num_rows: int) -> tuple[list[list[int]], int]:
    """The segments of each of `num_rows` rows, and the tokens of the longest row. The longest segment comes first, and
    each goes into the row that has least."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    num_filled = [0] * num_rows
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        row = num_filled.index(min(num_filled))
        rows[row].append(index)
        num_filled[row] += sizes[index]
    return [sorted(row) for row in rows], max(num_filled, default=0)


@dataclass(frozen=True, slots=True)
class FilledLayout(Layout):
    """A layout of rows that are filled with segments. A subclass says which sequences make a segment.

    A row has at most `row_tokens` tokens, unless one segment has more; by default about `ROW_TOKENS`.
    """

    fills_rows: ClassVar[bool] = True

    row_tokens: int | None = None

    def __post_init__(self) -> None:
        check_row_options(self.max_length, self.truncation_mode, self.pad_to_multiple_of)
        check_row_tokens(self.row_tokens)

    @abc.abstractmethod
    def segments(self, sequences: Sequence[TokenSequence]) -> list[RowSegment]:
        """The segments of these sequences, each of which is in one."""

    @classmethod
    def of_options(cls, pad_token_id: int, options: LayoutOptions) -> Self:
        """See `Layout.of_options`; rows are no longer than what is computed at a time."""
        return cls(
            pad_token_id,
            options.max_length,
            options.truncation_mode,
            options.pad_to_multiple_of,
            default_row_tokens(options.tokens_per_batch),
        )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tensors, index_of_each = self._filled(self.truncated(features))
        chosen, rejected = index_of_each.chunk(2)
        return tensors | {"chosen": chosen, "rejected": rejected}

    def of_completions(self, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        """See `Layout.of_completions`."""
        return self._filled(sequences)[0] | no_pairs()

    def tokens_in_rows(self, *, num_tokens: int, num_sequences: int, longest: int) -> int:
        """See `Layout.tokens_in_rows`: rows have next to no padding."""
        return num_tokens

    def _filled(self, sequences: Sequence[TokenSequence]) -> tuple[dict[str, Any], Tensor]:
        """See `fill_rows`."""
        return fill_rows(
            sequences,
            self.segments,
            pad_token_id=self.pad_token_id,
            row_tokens=self.row_tokens,
            multiple=self.pad_to_multiple_of,
        )
