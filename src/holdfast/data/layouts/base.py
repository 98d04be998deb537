"""`Layout`: what every layout can do, and what it answers about itself.

A layout decides in which rows the tokens of a batch stand. It is the run's data collator: tokenized pairs go in, the
complete tensors of a `PairBatch` come out. The layout itself answers what other modules must know of it: how the next
layout to try is found, how many tokens its rows take, how it is made from the options of a run. So a new layout is its
own file and a line in `choose.LAYOUTS`.

Given up: layouts that depend on anything but the rows of one batch.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from holdfast.data.layouts.sequences import TokenSequence, truncated_sequences
from holdfast.data.tokenize import TruncationMode


class LayoutOptions(Protocol):
    """The options of a run (`DPOConfig`) from which a layout is made."""

    max_length: int | None
    truncation_mode: Any
    pad_to_multiple_of: Any
    tokens_per_batch: int | None


@dataclass(frozen=True, slots=True)
class Layout(abc.ABC):
    """A data collator: rows with `prompt_ids`, `chosen_ids` and `rejected_ids` -> what `PairBatch.from_tensors` takes.
    Rows may have `chosen_mask` and `rejected_mask`, which say the completion tokens that are scored.

    Whatever the layout, a batch has `source`, `target`, `sequence` [N], `chosen`, `rejected` [P] and `content` [S 2]
    beside the model's inputs. A completion token at the start of its sequence has no predecessor and is not among
    the N, nor is one that is not scored. Sequences are cut to `max_length` tokens; rows are padded to a multiple of
    `pad_to_multiple_of`.
    """

    name: ClassVar[str]
    """The value of the option `layout` that names it."""
    summary: ClassVar[str]
    """What its rows hold, in a few words for the option's help."""
    fills_rows: ClassVar[bool]
    """Whether a row holds several sequences, which not every model can compute."""
    shares_prompts: ClassVar[bool]
    """Whether a prompt is computed once for all of its completions in a batch."""

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    pad_to_multiple_of: int | None = None

    @classmethod
    @abc.abstractmethod
    def of_options(cls, pad_token_id: int, options: LayoutOptions) -> Self:
        """The layout as a run's options ask for it."""

    @abc.abstractmethod
    def fallback(self) -> "Layout | None":
        """The layout to try next where a model computes this one wrongly, with the same truncation and padding. None
        where every model computes this one right."""

    @abc.abstractmethod
    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these pairs. ValueError for one that has no completion token to predict after truncation."""

    @abc.abstractmethod
    def of_completions(self, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        """The batch of these truncated sequences, without pairs: `chosen` and `rejected` are empty."""

    @abc.abstractmethod
    def tokens_in_rows(self, *, num_tokens: int, num_sequences: int, longest: int) -> int:
        """About how many tokens the rows of `num_sequences` sequences have, padding included. `num_tokens` counts the
        tokens of all of them, a shared prompt once; `longest` counts those of the longest."""

    def truncated(self, features: Sequence[Mapping[str, Any]]) -> list[TokenSequence]:
        """The truncated sequences of these pairs: all chosen ones, then all rejected ones."""
        return truncated_sequences(features, self.max_length, self.truncation_mode)
