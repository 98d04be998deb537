"""The two records that everything else is written against: a batch of pairs, and the log-probs of its completions.

A layout (padded today; packed and prefix-shared look the same from here) decides where the N completion tokens of a
batch sit; `PairBatch` says it in three vectors, so that losses, references, stores and metrics never ask. A completion
that belongs to several pairs of one prompt is one sequence, scored once. Given up: the familiar `[2P, T]` halves
"chosen first, rejected second"; who needs them can index by `chosen` and `rejected`.

Dimensions: P pairs, S sequences (completions), R rows, T tokens per row, N completion tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ContentId = tuple[int, int]
"""A completion's 128-bit content id, as two signed 64-bit halves (see `data.tokenize.content_id`)."""

SEQUENCES = "sequences"
"""Where a batch has its `Sequences`."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """The content ids of a batch's sequences, how many of their tokens count, and the row in which each is predicted.

    Python numbers and no tensor, so that they stay in host memory wherever the batch goes: to read them from a device
    is to wait for it.
    """

    content: tuple[ContentId, ...]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """A batch of preference pairs, laid out for one forward pass.

    `inputs` are the model's keyword arguments (`input_ids [R T]`, `attention_mask`, ..., and what a layout tells the
    attention). Completion token n is the token `target[n]`, predicted by the hidden state at the flat position
    `source[n]` (row * T + column), and belongs to sequence `sequence[n]`; `sequence` never decreases, and within a
    sequence tokens stand in reading order. `chosen[p]` and `rejected[p]` are the two sequences of pair p. `content[s]`
    is the 128-bit content id of sequence s (see `data.tokenize.content_id`). `reference[n]` is the reference's log-prob
    of token n, where it was computed ahead. `sequences` says of the sequences in host memory what `content` and
    `sequence` say, where a layout does. `unidentified` names the inputs that `content` does not cover.
    """

    inputs: dict[str, Any]
    source: Int[Tensor, "N"]
    target: Int[Tensor, "N"]
    sequence: Int[Tensor, "N"]
    chosen: Int[Tensor, "P"]
    rejected: Int[Tensor, "P"]
    content: Int[Tensor, "S 2"]
    reference: Float[Tensor, "N"] | None = None
    sequences: Sequences | None = None
    unidentified: tuple[str, ...] = ()

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.content.shape[0]

    def content_ids(self) -> list[ContentId]:
        """Of each of the S sequences; read from the device where the batch has no `sequences`."""
        if self.sequences is not None:
            return list(self.sequences.content)
        content: Any = self.content
        return [(high, low) for high, low in content.tolist()]

    def lengths(self) -> list[int]:
        """Number of completion tokens of each of the S sequences; read like `content_ids`."""
        if self.sequences is not None:
            return list(self.sequences.lengths)
        counts: Any = torch.bincount(self.sequence, minlength=self.num_sequences)
        return counts.tolist()

    def tokens_of_rows(self) -> list[int]:
        """Number of completion tokens that are predicted in each of the R rows; read like `content_ids`."""
        num_rows, num_columns = self.inputs["input_ids"].shape
        if self.sequences is None:
            counts: Any = torch.bincount(self.source // num_columns, minlength=num_rows)
            return counts.tolist()
        tokens = [0] * num_rows
        for row, length in zip(self.sequences.rows, self.sequences.lengths, strict=True):
            tokens[row] += length
        return tokens

    def check_identified(self) -> None:
        """ValueError where a log-prob of this batch must not be kept, since an input of it is in no content id."""
        if self.unidentified:
            raise ValueError(
                f"Reference log-probs were to be kept for later, but of the model inputs {list(self.unidentified)} "
                "that the data collator adds nobody can tell which completion they belong to, so another input would "
                "find the same numbers. Give them one row per completion ([2P, ...], chosen first), or ask the "
                "reference batch by batch: precompute_ref_log_probs=False."
            )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Self:
        """The batch in a plain dict of tensors, as data loaders carry it: what is not a field is a model input."""
        names = {field.name for field in fields(cls)} - {"inputs"}
        optional = {"reference", SEQUENCES, "unidentified"}
        missing = sorted(names - tensors.keys() - optional)
        if missing:
            raise ValueError(
                f"a batch of preference pairs needs the tensors {sorted(names - optional)}; "
                f"{missing} are missing from {sorted(tensors)}. Use `holdfast.data.layouts.PaddedLayout` as the data "
                "collator, or return the keys of `DataCollatorForPreference`."
            )
        inputs = {name: tensor for name, tensor in tensors.items() if name not in names}
        return cls(inputs=inputs, **{name: tensors[name] for name in names & tensors.keys()})


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLogps:
    """Log-probs (nats, fp32) of the N completion tokens of a batch, and which of its S sequences each belongs to."""

    per_token: Float[Tensor, "N"]
    sequence: Int[Tensor, "N"]
    num_sequences: int

    def sums(self) -> Float[Tensor, "S"]:
        """`log pi(y|x)` per sequence, nats: the sum over its tokens."""
        return self.segment_sum(self.per_token)

    def lengths(self) -> Int[Tensor, "S"]:
        """Number of scored completion tokens per sequence."""
        ones = torch.ones_like(self.sequence)
        return ones.new_zeros(self.num_sequences).index_add(0, self.sequence, ones)

    def ranks(self) -> Int[Tensor, "N"]:
        """0-based place of each token within its completion."""
        lengths = self.lengths()
        starts = lengths.cumsum(0) - lengths
        return torch.arange(len(self.sequence), device=self.sequence.device) - starts[self.sequence]

    def segment_sum(self, values: Float[Tensor, "N"]) -> Float[Tensor, "S"]:
        """Sum of one value per token over the tokens of each sequence, added up in fp64: one after another in fp32, the
        errors of a long completion would show in exp(log ratio)."""
        wide = values.dtype if values.device.type == "mps" else torch.float64  # which MPS does not have
        total = values.new_zeros(self.num_sequences, dtype=wide).index_add(0, self.sequence, values.to(wide))
        return total.to(values.dtype)

    def in_sequences(self, sequences: Int[Tensor, "K"]) -> Bool[Tensor, "N"]:
        """True where a token belongs to one of the given sequences."""
        member = torch.zeros(self.num_sequences, dtype=torch.bool, device=self.sequence.device)
        return member.index_fill(0, sequences, True)[self.sequence]
