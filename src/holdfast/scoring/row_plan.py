"""`RowPlan`: what the kernels of a device read about the rows of a batch, as one tensor of whole numbers.

It follows from the lengths of prompts and completions alone, so the data collator makes it in host memory, where the
lengths are known. It travels with the batch: pinned, copied to the device once, and read there by every layer of the
policy and of the reference. Making it on the device would take many small kernels, and reading lengths from the device
would wait for it.

Given up: numbers that depend on the model, such as windows. Those a route adds itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, Self, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

SegmentLengths = tuple[int, Sequence[int]]
"""The number of tokens of a segment's prompt, and of each of its completions."""

PADDING = -1
"""The segment of a padding token."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """The numbers of a batch of rows, by name; all rows are laid end to end, so a token's place is row * T + column.

    A *span* is what is attended as one sequence: a prompt, a completion, or the padding of a row.

    - `query_ends`, `key_ends` [spans + 1]: 0, and where each span's queries and keys end. The keys of a completion are
      those of its prompt and its own; those of another span are its own.
    - `keys` [K]: the places of the keys of all spans, one span after another. Empty where keys are read as they lie,
      because no prompt is shared.
    - `segment`, `completion`, `position` [R T]: of each token its segment's number in its row (`PADDING` for padding),
      its completion's number in its segment (0 for a prompt), and its position in its sequence.

    `longest_query` and `longest_key` are the largest numbers of queries and keys of a span.
    """

    numbers: Int[Tensor, "n"]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[SegmentLengths]], num_columns: int) -> Self:
        """The plan of rows of these segments, each padded to `num_columns` tokens."""
        spans = [span for row, segments in enumerate(rows) for span in _spans(row, segments, num_columns)]
        num_queries = [span.num_tokens for span in spans]
        num_keys = [span.num_prompt + span.num_tokens for span in spans]
        is_shared = num_keys != num_queries
        shape = (len(rows), num_columns)
        arrays = {
            "query_ends": np.array([0, *accumulate(num_queries)]),
            "key_ends": np.array([0, *accumulate(num_keys)]),
            "keys": _joined(run for span in spans for run in span.key_runs()) if is_shared else np.empty(0),
            "segment": np.repeat([span.segment for span in spans], num_queries).reshape(shape),
            "completion": np.repeat([span.completion for span in spans], num_queries).reshape(shape),
            "position": _joined((span.num_prompt, span.num_tokens) for span in spans).reshape(shape),
        }
        flat = np.concatenate([array.reshape(-1) for array in arrays.values()]).astype(np.int32)
        return cls(
            numbers=torch.from_numpy(flat),
            shapes=tuple((name, array.shape) for name, array in arrays.items()),
            longest_query=max(num_queries),
            longest_key=max(num_keys),
        )

    def part(self, name: str) -> Int[Tensor, "..."]:
        """The numbers of this name, int32, as a view."""
        start = 0
        for other, shape in self.shapes:
            if other == name:
                return self.numbers[start : start + prod(shape)].view(shape)
            start += prod(shape)
        raise KeyError(name)

    @property
    def gathers(self) -> bool:
        """Whether keys have to be gathered, because completions share prompts."""
        return dict(self.shapes)["keys"] != (0,)

    def pin_memory(self) -> Self:
        """The plan in memory from which it is copied to a device without waiting."""
        return replace(self, numbers=self.numbers.pin_memory())

    def to(self, device: Any, non_blocking: bool = True) -> Self:
        """The plan on `device`."""
        return replace(self, numbers=self.numbers.to(device, non_blocking=non_blocking))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """`num_tokens` tokens from `start` on. Of a completion also the `num_prompt` tokens of its prompt, from
    `prompt_start` on."""

    start: int
    num_tokens: int
    segment: int
    completion: int = 0
    prompt_start: int = 0
    num_prompt: int = 0

    def key_runs(self) -> Iterator[tuple[int, int]]:
        """The runs of places of its keys: where each begins, and its number of tokens."""
        if self.num_prompt > 0:
            yield self.prompt_start, self.num_prompt
        yield self.start, self.num_tokens


def _spans(row: int, segments: Sequence[SegmentLengths], num_columns: int) -> Iterator[_Span]:
    """The spans of a row that have tokens, in reading order."""
    start = row * num_columns
    for number, (prompt, completions) in enumerate(segments):
        prompt_start = start
        if prompt > 0:
            yield _Span(start=start, num_tokens=prompt, segment=number)
            start += prompt
        for which, length in enumerate(completions, 1):
            if length > 0:
                yield _Span(
                    start=start,
                    num_tokens=length,
                    segment=number,
                    completion=which,
                    prompt_start=prompt_start,
                    num_prompt=prompt,
                )
                start += length
    num_padding = (row + 1) * num_columns - start
    if num_padding > 0:
        yield _Span(start=start, num_tokens=num_padding, segment=PADDING)


def _joined(runs: Iterable[tuple[int, int]]) -> np.ndarray:
    """The whole numbers of all runs, one run after another: each `length` numbers from `start` on."""
    return np.concatenate([np.arange(start, start + length) for start, length in runs])
