"""`PackedLayout`: rows hold many sequences, each with its own prompt.

Hardly any of a row is padding. A model only has to keep whole sequences apart, which more models can do than share
prompts: FlashAttention does it, for example. Given up: computing a prompt once for all of its completions, as
`SharedLayout` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

from torch import Tensor

from holdfast.data.layouts.base import Layout, LayoutOptions
from holdfast.data.layouts.filled_rows import RowSegment, check_row_tokens, default_row_tokens, fill_rows
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.sequences import TokenSequence, check_row_options, no_pairs


@final
@dataclass(frozen=True, slots=True)
class PackedLayout(Layout):
    """`input_ids`, `position_ids` and `attention_mask` [R T], as in `SharedLayout`. But here each sequence is a segment
    of its own, with its own copy of the prompt."""

    name: ClassVar[str] = "packed"
    summary: ClassVar[str] = "many sequences a row"
    fills_rows: ClassVar[bool] = True
    shares_prompts: ClassVar[bool] = False

    row_tokens: int | None = None

    def __post_init__(self) -> None:
        check_row_options(self.max_length, self.truncation_mode, self.pad_to_multiple_of)
        check_row_tokens(self.row_tokens)

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

    def fallback(self) -> PaddedLayout:
        """A row for each sequence."""
        return PaddedLayout(self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of)

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
            _segment_each,
            pad_token_id=self.pad_token_id,
            row_tokens=self.row_tokens,
            multiple=self.pad_to_multiple_of,
        )


def _segment_each(sequences: Sequence[TokenSequence]) -> list[RowSegment]:
    """A segment for each sequence."""
    return [
        RowSegment(prompt=sequence.ids, sequences=[index], num_tokens=len(sequence.ids))
        for index, sequence in enumerate(sequences)
    ]
