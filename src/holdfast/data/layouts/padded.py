"""`PaddedLayout`: a row for each completion, the chosen ones first, padded on the right.

Every model computes such rows right, so the other layouts are compared with this one. Padding costs what the longest
row of a batch needs. Given up: computing a prompt once for both of its completions, which these rows cannot express.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import numpy as np
import torch

from holdfast.batch import COMPLETION_MASK, HOST_SEQUENCES, HostSequences
from holdfast.data.layouts.base import Layout, LayoutOptions
from holdfast.data.layouts.sequences import (
    TokenSequence,
    check_counts,
    check_row_options,
    completion_masks,
    content_id_of,
    no_pairs,
    padded_rows,
    pairs_of_halves,
)


@final
@dataclass(frozen=True, slots=True)
class PaddedLayout(Layout):
    """`input_ids` and `attention_mask` [2P T], the P chosen rows first, padded on the right to the longest row of the
    batch (and up to a multiple of `pad_to_multiple_of`). The rest of a batch is that of every `Layout`, and
    `completion_mask` [2P T] for scripts that read batches: 1 at the tokens that count. `host_sequences` is no
    tensor: it says in host memory what `content`, `sequence` and `source` say."""

    name: ClassVar[str] = "padded"
    summary: ClassVar[str] = "a row each"
    fills_rows: ClassVar[bool] = False
    shares_prompts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_row_options(self.max_length, self.truncation_mode, self.pad_to_multiple_of)

    @classmethod
    def of_options(cls, pad_token_id: int, options: LayoutOptions) -> Self:
        """See `Layout.of_options`."""
        return cls(pad_token_id, options.max_length, options.truncation_mode, options.pad_to_multiple_of)

    def fallback(self) -> None:
        """None: every model computes padded rows right."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.of_pairs(self.truncated(features))

    def of_pairs(self, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        """The batch of truncated sequences: all chosen ones, then all rejected ones."""
        return self._laid_out(sequences) | pairs_of_halves(len(sequences))

    def of_completions(self, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        """See `Layout.of_completions`."""
        return self._laid_out(sequences) | no_pairs()

    def tokens_in_rows(self, *, num_tokens: int, num_sequences: int, longest: int) -> int:
        """See `Layout.tokens_in_rows`: each row is as long as the longest."""
        return longest * num_sequences

    def _laid_out(self, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        """Everything but `chosen` and `rejected`."""
        input_ids, attention_mask = padded_rows(sequences, self.pad_token_id, self.pad_to_multiple_of)
        num_tokens = input_ids.shape[1]
        first = np.array([max(sequence.num_prompt, 1) for sequence in sequences])
        counts = np.array([len(sequence.ids) for sequence in sequences]) - first
        row = np.repeat(np.arange(len(sequences)), counts)
        rank = np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)
        position = row * num_tokens + first[row] + rank
        if any(sequence.scored is not None for sequence in sequences):
            of_each = zip(sequences, np.split(position, counts.cumsum()[:-1]), strict=True)
            scored = [sequence.of_targets(positions) for sequence, positions in of_each]
            counts = np.array([*map(len, scored)])
            position, row = np.concatenate(scored), np.repeat(np.arange(len(sequences)), counts)
        check_counts(counts)
        content = [content_id_of(sequence) for sequence in sequences]
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            COMPLETION_MASK: completion_masks(sequences, attention_mask),
            "source": position - 1,
            "target": input_ids.reshape(-1)[position],
            "sequence": row,
            "content": np.array(content),
        }
        in_host_memory = HostSequences(
            content=tuple(content), lengths=tuple(counts.tolist()), rows=tuple(range(len(sequences)))
        )
        return {name: torch.from_numpy(array) for name, array in tensors.items()} | {HOST_SEQUENCES: in_host_memory}
