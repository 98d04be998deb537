"""Tokenized pairs -> rows filled with many sequences, in which every prompt stands once, followed by its completions.

`SharedLayout` groups the completions of a batch by prompt; a completion that several pairs have stands once as well.
One prompt with its completions is a segment, and segments fill rows up to a budget of tokens, so that padding is what
rows differ by. The segments of each row go along for `scoring.attention`, which keeps completions apart; positions go
on from the prompt for each. What is scored, its order and its content ids are those of `PaddedLayout`. With
`shares_prompts=False` each sequence is a segment of its own, prompt and all (packed).

Given up: rows that a model can be given without that attention. Its answers would be wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from holdfast.batch import HOST_SEQUENCES, HostSequences
from holdfast.data.layouts.padded import PaddedLayout, Row, check_counts, content_of, truncated_rows
from holdfast.data.tokenize import TruncationMode
from holdfast.scoring.segments import SEGMENTS, Segments

ROW_TOKENS = 1_000
"""Rows of about so many tokens are computed best: long enough for the matrix products, short enough for caches."""

ROW_PADDING = 0.06
"""But no more of a batch than this part of its tokens is to be padding: longer rows are better than that."""


@final
@dataclass(frozen=True, slots=True)
class SharedLayout:
    """A data collator: rows with `prompt_ids`, `chosen_ids` and `rejected_ids` -> what `PairBatch.from_tensors` takes.

    `input_ids`, `position_ids` and `attention_mask` [R T]: R rows of at most `row_tokens` tokens (or of one segment, if
    that has more), as evenly filled as they come, padded on the right to the longest (and to a multiple of
    `pad_to_multiple_of`); by default of about `ROW_TOKENS`, or as many more as leave next to no padding.
    `source`, `target`, `sequence` [N], `chosen`, `rejected` [P] and `content` [S 2] as in `PaddedLayout`, with a
    completion that occurs again left out the second time. Two values are no tensors, and stay in host memory:
    `row_segments`, the `Segments` of the rows, and `host_sequences`, the `HostSequences`.

    `attention_mask` says in how many of the 2P sequences a token is, 0 for padding: so weighted, means over tokens (the
    load-balancing loss of models with experts) are those of padded rows. With `shares_prompts=False` every sequence is
    one segment, which counts as a prompt without completions.

    Raises `ValueError` for a row that has no completion token to predict after truncation.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    pad_to_multiple_of: int | None = None
    row_tokens: int | None = None
    shares_prompts: bool = True

    def __post_init__(self) -> None:
        PaddedLayout(self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of)  # checks them
        if self.row_tokens is not None and self.row_tokens < 1:
            raise ValueError(
                f"row_tokens is how many tokens a row may have; found {self.row_tokens}. Give at least 1, such as "
                f"{ROW_TOKENS}, or None."
            )

    @property
    def name(self) -> Literal["prefix_shared", "packed"]:
        """The value of the option `layout`."""
        return "prefix_shared" if self.shares_prompts else "packed"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tensors, places = self._laid_out(truncated_rows(features, self.max_length, self.truncation_mode))
        chosen, rejected = torch.from_numpy(places).chunk(2)
        return tensors | {"chosen": chosen, "rejected": rejected}

    def of_completions(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The same for completions without pairs: `chosen` and `rejected` are empty."""
        none = torch.empty(0, dtype=torch.int64)
        return self._laid_out(rows)[0] | {"chosen": none, "rejected": none}

    def _laid_out(self, rows: Sequence[Row]) -> tuple[dict[str, Any], np.ndarray]:
        """Everything but `chosen` and `rejected`, and which sequence each of `rows` has become."""
        check_counts(np.array([len(row.ids) - max(row.num_prompt, 1) for row in rows]))
        sequences, places = _distinct(rows)
        segments = _segments(sequences) if self.shares_prompts else _lone_segments(sequences)
        packed = _packed([segment.num_tokens for segment in segments], self.row_tokens)
        counts = np.bincount(places)
        laid = _Rows.empty(len(packed), self._width(segments, packed), self.pad_token_id)
        predicted: dict[int, np.ndarray] = {}  # by sequence, the flat positions that predict its tokens
        for row, members in enumerate(packed):
            for member in members:
                predicted |= laid.append(row, segments[member], sequences, counts)
        sources = [predicted[index] for index in range(len(sequences))]
        targets = [sequence.ids[max(sequence.num_prompt, 1) :] for sequence in sequences]
        content, lengths = [content_of(sequence) for sequence in sequences], [*map(len, targets)]
        tensors = {
            "input_ids": laid.input_ids,
            "position_ids": laid.position_ids,
            "attention_mask": laid.attention_mask,
            "source": np.concatenate(sources),
            "target": np.concatenate(targets),
            "sequence": np.repeat(np.arange(len(sequences)), lengths),
            "content": np.array(content),
        }
        in_host_memory = {
            SEGMENTS: Segments.of(laid.lengths, *laid.input_ids.shape),
            HOST_SEQUENCES: HostSequences(
                content=tuple(content),
                lengths=tuple(lengths),
                rows=tuple(int(source[0]) // laid.input_ids.shape[1] for source in sources),
            ),
        }
        return {name: torch.from_numpy(array) for name, array in tensors.items()} | in_host_memory, places

    def _width(self, segments: "Sequence[_Segment]", packed: Sequence[Sequence[int]]) -> int:
        longest = max(sum(segments[member].num_tokens for member in members) for members in packed)
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


def unshared(tensors: Mapping[str, Any], pad_token_id: int) -> dict[str, Tensor]:
    """The pairs of a batch of `SharedLayout` as `PaddedLayout` lays them out; any other batch as it is.

    For who needs a row a completion, [2P T], such as a function that is shown logits.
    """
    if SEGMENTS not in tensors:
        return dict(tensors)
    ids, positions, source, target, sequence = (
        tensors[name].reshape(-1).cpu().numpy()
        for name in ("input_ids", "position_ids", "source", "target", "sequence")
    )
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    rows = []
    for first, completion in zip(source[starts], np.split(target, starts[1:]), strict=True):
        num_prompt = positions[first] + 1  # or the completion's own first token, where there is no prompt
        rows.append(Row(np.concatenate([ids[first + 1 - num_prompt : first + 1], completion]), int(num_prompt)))
    order = torch.cat([tensors["chosen"], tensors["rejected"]]).tolist()
    return PaddedLayout(pad_token_id).of_pairs([rows[index] for index in order])


@dataclass(slots=True, kw_only=True)
class _Segment:
    """A prompt and the sequences that begin with it, or a whole sequence that is its only one."""

    prompt: np.ndarray
    sequences: list[int] = field(default_factory=list)
    num_tokens: int


@dataclass(slots=True, kw_only=True)
class _Rows:
    """Rows while they are filled."""

    input_ids: np.ndarray  # [R T]
    position_ids: np.ndarray
    attention_mask: np.ndarray
    lengths: list[tuple[int, int, bool]]
    filled: list[int]

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, pad_token_id: int) -> "_Rows":
        """Nothing but padding."""
        zeros = np.zeros((num_rows, num_columns), dtype=np.int64)
        ids = np.full_like(zeros, pad_token_id)
        return cls(
            input_ids=ids, position_ids=zeros, attention_mask=zeros.copy(), lengths=[], filled=[0] * num_rows
        )  # fmt: skip

    def append(
        self, row: int, segment: _Segment, sequences: Sequence[Row], counts: np.ndarray
    ) -> dict[int, np.ndarray]:
        """Where the tokens of each of the segment's sequences, which occur so often, are predicted, once it stands in
        the row."""
        prompt = len(segment.prompt)
        shared = self._append(row, segment.prompt, 0, counts[segment.sequences].sum(), is_prompt=True)
        predicted = {}
        for index in segment.sequences:
            ids, num_prompt = sequences[index]
            places = shared
            if len(ids) > prompt:
                places = np.concatenate(
                    [shared, self._append(row, ids[prompt:], prompt, counts[index], is_prompt=False)]
                )
            # Each token is predicted where the one before it stands.
            predicted[index] = places[max(num_prompt, 1) - 1 : -1]
        return predicted

    def _append(self, row: int, ids: np.ndarray, position: int, count: int, *, is_prompt: bool) -> np.ndarray:
        """The flat positions at which `ids` stand now."""
        start = self.filled[row]
        end = self.filled[row] = start + len(ids)
        self.input_ids[row, start:end] = ids
        self.position_ids[row, start:end] = position + np.arange(len(ids))
        self.attention_mask[row, start:end] = count
        self.lengths.append((row, len(ids), is_prompt))
        return row * self.input_ids.shape[1] + np.arange(start, end)


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], np.ndarray]:
    """The rows without repetitions, in their order, and the place of each row among them."""
    found: dict[tuple[int, bytes], int] = {}
    sequences, places = [], []
    for row in rows:
        key = (row.num_prompt, row.ids.tobytes())
        if key not in found:
            found[key] = len(sequences)
            sequences.append(row)
        places.append(found[key])
    return sequences, np.array(places)


def _segments(sequences: Sequence[Row]) -> list[_Segment]:
    """One for each prompt, in the order of the prompts."""
    segments: dict[bytes, _Segment] = {}
    for index, (ids, num_prompt) in enumerate(sequences):
        prompt = ids[:num_prompt]
        segment = segments.setdefault(prompt.tobytes(), _Segment(prompt=prompt, num_tokens=num_prompt))
        segment.sequences.append(index)
        segment.num_tokens += len(ids) - num_prompt
    return list(segments.values())


def _lone_segments(sequences: Sequence[Row]) -> list[_Segment]:
    """One for each sequence."""
    return [_Segment(prompt=row.ids, sequences=[index], num_tokens=len(row.ids)) for index, row in enumerate(sequences)]


def _packed(sizes: Sequence[int], budget: int | None) -> list[list[int]]:
    """Which segments each row has: few rows of at most `budget` tokens, or of the largest segment, alike in length; for
    None rows of `ROW_TOKENS`, or fewer and longer ones until `ROW_PADDING` is all that they leave empty."""
    total = sum(sizes)
    if budget is None:
        num_rows = max(1, min(-(-total // ROW_TOKENS), len(sizes)))
        while True:
            rows, longest = _spread(sizes, num_rows)
            if num_rows == 1 or num_rows * longest <= (1 + ROW_PADDING) * total:
                return rows
            num_rows -= max(1, num_rows // 8)
    capacity = max(budget, *sizes) if sizes else budget
    num_rows = -(-total // capacity)
    while True:  # with as many rows as segments it fits
        rows, longest = _spread(sizes, num_rows)
        if longest <= capacity:
            return rows
        num_rows += 1


def _spread(sizes: Sequence[int], num_rows: int) -> tuple[list[list[int]], int]:
    """So many rows, and the tokens of the longest: the longest segment first, each into the row that has least."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    filled = [0] * num_rows
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        row = filled.index(min(filled))
        rows[row].append(index)
        filled[row] += sizes[index]
    return [sorted(row) for row in rows], max(filled, default=0)
