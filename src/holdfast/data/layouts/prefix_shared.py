"""`SharedLayout`: each prompt stands once, followed by all of its completions; a row holds many prompts.

The completions of a batch are grouped by prompt, and a completion that several pairs have stands once as well. So a
prompt is computed once however many pairs it has, and hardly any of a row is padding. The positions of each completion
go on from its prompt. Given up: models that cannot keep completions apart; `choose` finds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from holdfast.data.layouts.filled_rows import FilledLayout, RowSegment
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.sequences import TokenSequence


@final
@dataclass(frozen=True, slots=True)
class SharedLayout(FilledLayout):
    """`input_ids`, `position_ids` and `attention_mask` [R T]: R rows of segments, each a prompt and its completions.

    A row has at most `row_tokens` tokens, unless one segment has more. Rows are filled evenly, and padded on the right
    to the longest. By default they have about `ROW_TOKENS` tokens, or more where that saves padding. Equal completions
    of a prompt are one sequence. Two values are no tensors, and stay in host memory: `row_segments`, the `Segments` of
    the rows, whose plan goes to the device, and `host_sequences`, the `HostSequences`.

    `attention_mask` counts the sequences, of the 2P, that contain a token; it is 0 for padding. A mean over tokens with
    these weights (the load-balancing loss of models with experts) is that of padded rows.
    """

    name: ClassVar[str] = "prefix_shared"
    summary: ClassVar[str] = "each prompt once, many completions a row"
    shares_prompts: ClassVar[bool] = True

    def fallback(self) -> PackedLayout:
        """Rows of as many tokens, in which each sequence has its own prompt."""
        return PackedLayout(
            self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of, self.row_tokens
        )

    def segments(self, sequences: Sequence[TokenSequence]) -> list[RowSegment]:
        """A segment for each prompt, in the order of the prompts."""
        segments: dict[bytes, RowSegment] = {}
        for index, (ids, num_prompt, _) in enumerate(sequences):
            prompt = ids[:num_prompt]
            segment = segments.setdefault(prompt.tobytes(), RowSegment(prompt=prompt, num_tokens=num_prompt))
            segment.sequences.append(index)
            segment.num_tokens += len(ids) - num_prompt
        return list(segments.values())
