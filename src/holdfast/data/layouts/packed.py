"""`PackedLayout`: rows hold many sequences, each with its own prompt.

Hardly any of a row is padding. A model only has to keep whole sequences apart, which more models can do than share
prompts: FlashAttention does it, for example. Given up: computing a prompt once for all of its completions, as
`SharedLayout` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from holdfast.data.layouts.filled_rows import FilledLayout, RowSegment
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.sequences import TokenSequence


@final
@dataclass(frozen=True, slots=True)
class PackedLayout(FilledLayout):
    """`input_ids`, `position_ids` and `attention_mask` [R T], as in `SharedLayout`. But here each sequence is a segment
    of its own, with its own copy of the prompt."""

    name: ClassVar[str] = "packed"
    summary: ClassVar[str] = "many sequences a row"
    shares_prompts: ClassVar[bool] = False

    def fallback(self) -> PaddedLayout:
        """A row for each sequence."""
        return PaddedLayout(self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of)

    def segments(self, sequences: Sequence[TokenSequence]) -> list[RowSegment]:
        """A segment for each sequence."""
        return [
            RowSegment(prompt=sequence.ids, sequences=[index], num_tokens=len(sequence.ids))
            for index, sequence in enumerate(sequences)
        ]
