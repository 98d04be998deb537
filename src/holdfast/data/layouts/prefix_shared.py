"""`SharedLayout`: each prompt stands once, followed by all of its completions; a row holds many prompts.

The completions of a batch are grouped by prompt, and a completion that several pairs have stands once as well. So a
prompt is computed once however many pairs it has, and hardly any of a row is padding. The positions of each completion
go on from its prompt. Given up: models that cannot keep completions apart; `choose` finds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

from torch import Tensor

from holdfast.data.layouts.base import Layout, LayoutOptions
from holdfast.data.layouts.filled_rows import RowSegment, check_row_tokens, default_row_tokens, fill_rows
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.sequences import TokenSequence, check_row_options, no_pairs


@final
@dataclass(frozen=True, slots=True)
class SharedLayout(Layout):
    """`input_ids`, `position_ids` and `attention_mask` [R T]: R rows of segments, each a prompt and its completions.

    A row has at most `row_tokens` tokens, unless one segment has more. Rows are filled evenly, and padded on the right
    to the longest. By default they have about `ROW_TOKENS` tokens, or more where that saves padding. Equal completions
    of a prompt are one sequence. Two values are no tensors, and stay in host memory: `row_segments`, the `Segments` of
    the rows, and `host_sequences`, the `HostSequences`.

    `attention_mask` counts the sequences, of the 2P, that contain a token; it is 0 for padding. A mean over tokens with
    these weights (the load-balancing loss of models with experts) is that of padded rows.
    """

    name: ClassVar[str] = "prefix_shared"
    summary: ClassVar[str] = "each prompt once, many completions a row"
    fills_rows: ClassVar[bool] = True
    shares_prompts: ClassVar[bool] = True

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

    def fallback(self) -> PackedLayout:
        """Rows of as many tokens, in which each sequence has its own prompt."""
        return PackedLayout(
            self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of, self.row_tokens
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
            _segments_by_prompt,
            pad_token_id=self.pad_token_id,
            row_tokens=self.row_tokens,
            multiple=self.pad_to_multiple_of,
        )


def _segments_by_prompt(sequences: Sequence[TokenSequence]) -> list[RowSegment]:
    """A segment for each prompt, in the order of the prompts."""
    segments: dict[bytes, RowSegment] = {}
    for index, (ids, num_prompt) in enumerate(sequences):
        prompt = ids[:num_prompt]
        segment = segments.setdefault(prompt.tobytes(), RowSegment(prompt=prompt, num_tokens=num_prompt))
        segment.sequences.append(index)
        segment.num_tokens += len(ids) - num_prompt
    return list(segments.values())
