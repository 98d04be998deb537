"""The two records that cross modules: a batch of preference pairs, and the log-probs of its completions.

A layout (padded, packed, prefix-shared) decides where the N completion tokens of a batch stand. `PairBatch` says so in
three vectors, so losses, references, the store and metrics need not know the layout. A completion that belongs to
several pairs of one prompt is one sequence, scored once. Given up: the familiar `[2P, T]` halves, chosen rows first.
Code indexes by `chosen` and `rejected` instead.

Dimensions: P pairs, S sequences (completions), R rows, T tokens per row, N completion tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import compress
from typing import Any, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ContentId = tuple[int, int]
"""A completion's 128-bit content id, as two signed 64-bit halves (see `data.tokenize.content_id`)."""

HOST_SEQUENCES = "host_sequences"
"""The key under which a layout puts a batch's `HostSequences`."""

COMPLETION_MASK = "completion_mask"
"""The key under which padded rows say which tokens are scored, for scripts; no input of a model."""
PAIR_WEIGHTS, PAIR_MARGINS = "pair_weights", "pair_margins"
"""The keys of a batch under which it has a number of each pair that the data bring along."""
HOST_SOURCES, PAIR_SOURCES = "host_sources", "pair_sources"
"""The keys of a batch under which it says which source of the data each pair comes from."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HostSequences:
    """Of each of a batch's S sequences: its content id, its number of completion tokens, and the row it stands in.

    It holds Python numbers and no tensor, so it stays in host memory wherever the batch goes. Reading the same from a
    device would wait for the device.
    """

    content: tuple[ContentId, ...]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Any]) -> "HostSequences":
        """What the tensors of a batch say, which are in host memory."""
        content: Any = tensors["content"].tolist()
        lengths: Any = torch.bincount(tensors["sequence"], minlength=len(content))
        rows: Any = torch.zeros(len(content), dtype=torch.int64)
        rows[tensors["sequence"]] = tensors["source"] // tensors["input_ids"].shape[1]
        return cls(
            content=tuple((high, low) for high, low in content),
            lengths=tuple(lengths.tolist()),
            rows=tuple(rows.tolist()),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HostSources:
    """The names of the sources of the data that a batch has pairs of, and for each of its P pairs the place of its
    source among them. Like `HostSequences` it stays in host memory."""

    names: tuple[str, ...]
    places: tuple[int, ...]

    def counts(self) -> list[int]:
        """The number of pairs of each source."""
        return [self.places.count(place) for place in range(len(self.names))]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """A batch of preference pairs, laid out for one forward pass.

    `inputs` are the model's keyword arguments (`input_ids [R T]`, `attention_mask`, ..., and what a layout tells the
    attention). Completion token n is the token `target[n]`. The hidden state at the flat position `source[n]` (row * T
    + column) predicts it, and it belongs to sequence `sequence[n]`. `sequence` never decreases, and the tokens of a
    sequence stand in reading order. Tokens of a completion that are seen and not scored are not among the N.
    `chosen[p]` and `rejected[p]` are the two sequences of pair p. `content[s]` is the 128-bit content id of sequence s
    (see `data.tokenize.content_id`).

    Eight fields are optional. `reference_logps[n]` is the reference's log-prob of token n, where it was computed before
    the batch's turn. `host_sequences` repeats in host memory what `content`, `sequence` and `source` say of the
    sequences. `unidentified_inputs` names the inputs that the content ids do not cover, so that log-probs of this batch
    must not be stored. In an evaluation by source, `host_sources` says which sources of the data the pairs come from,
    and `pair_sources` repeats their places on the device. `pair_weights` says how much each pair counts, and
    `pair_margins` which margin it is to reach (beta * nats), where the data say so. `sums_states` asks whoever scores
    the batch for `SequenceLogps.state_sums`.
    """

    inputs: dict[str, Any]
    source: Int[Tensor, "N"]
    target: Int[Tensor, "N"]
    sequence: Int[Tensor, "N"]
    chosen: Int[Tensor, "P"]
    rejected: Int[Tensor, "P"]
    content: Int[Tensor, "S 2"]
    reference_logps: Float[Tensor, "N"] | None = None
    host_sequences: HostSequences | None = None
    unidentified_inputs: tuple[str, ...] = ()
    host_sources: HostSources | None = None
    pair_sources: Int[Tensor, "P"] | None = None
    pair_weights: Float[Tensor, "P"] | None = None
    pair_margins: Float[Tensor, "P"] | None = None
    sums_states: bool = False

    def of_pairs(self, keep: Any) -> Self:
        """The batch with only some of its pairs, chosen by a slice or a mask over P. Rows and sequences stay."""
        names = ("chosen", "rejected", PAIR_WEIGHTS, PAIR_MARGINS)
        pairs: dict[str, Any] = {name: None if (of := getattr(self, name)) is None else of[keep] for name in names}
        if self.host_sources is None or self.pair_sources is None:
            return replace(self, **pairs)
        places = self.host_sources.places
        kept = places[keep] if isinstance(keep, slice) else tuple(compress(places, keep.tolist()))
        sources = replace(self.host_sources, places=kept)
        return replace(self, **pairs, host_sources=sources, pair_sources=self.pair_sources[keep])

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.content.shape[0]

    def content_ids(self) -> list[ContentId]:
        """The content id of each of the S sequences; read from the device where the batch has no `host_sequences`."""
        if self.host_sequences is not None:
            return list(self.host_sequences.content)
        content: Any = self.content
        return [(high, low) for high, low in content.tolist()]

    def lengths(self) -> list[int]:
        """Number of completion tokens of each of the S sequences; read from where `content_ids` reads."""
        if self.host_sequences is not None:
            return list(self.host_sequences.lengths)
        counts: Any = torch.bincount(self.sequence, minlength=self.num_sequences)
        return counts.tolist()

    def tokens_of_rows(self) -> list[int]:
        """Number of completion tokens of each of the R rows; read from where `content_ids` reads."""
        num_rows, num_columns = self.inputs["input_ids"].shape
        if self.host_sequences is None:
            counts: Any = torch.bincount(self.source // num_columns, minlength=num_rows)
            return counts.tolist()
        tokens = [0] * num_rows
        for row, length in zip(self.host_sequences.rows, self.host_sequences.lengths, strict=True):
            tokens[row] += length
        return tokens

    def check_identified(self) -> None:
        """ValueError where log-probs of this batch must not be stored: content ids do not cover all its inputs."""
        if self.unidentified_inputs:
            raise ValueError(
                "Reference log-probs were to be kept for later, but of the model inputs "
                f"{list(self.unidentified_inputs)} that the data collator adds nobody can tell which completion they "
                "belong to, so another input would find the same numbers. Give them one row per completion "
                "([2P, ...], chosen first), or ask the reference batch by batch: precompute_ref_log_probs=False."
            )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Self:
        """The batch from a plain dict, as data loaders carry it. Entries that are no field are model inputs, but for
        `completion_mask`, which `source` and `target` stand for."""
        names = {field.name for field in fields(cls)} - {"inputs"}
        optional = {"reference_logps", HOST_SEQUENCES, "unidentified_inputs", HOST_SOURCES, PAIR_SOURCES, "sums_states"}
        optional |= {PAIR_WEIGHTS, PAIR_MARGINS}
        missing = sorted(names - tensors.keys() - optional)
        if missing:
            raise ValueError(
                f"a batch of preference pairs needs the tensors {sorted(names - optional)}; "
                f"{missing} are missing from {sorted(tensors)}. Use `holdfast.data.layouts.PaddedLayout` as the data "
                "collator, or return the keys of `DataCollatorForPreference`."
            )
        sources: HostSources | None = tensors.get(HOST_SOURCES)
        if sources is not None and len(sources.places) != len(tensors["chosen"]):
            raise ValueError(
                f"the data collator returned {len(tensors['chosen'])} pairs for {len(sources.places)} rows, so nobody "
                "can tell which source of the data they come from. Return one for each row, or drop the column "
                "'source' of the evaluation data."
            )
        for name in (PAIR_WEIGHTS, PAIR_MARGINS):
            if name in tensors and len(tensors[name]) != len(tensors["chosen"]):
                raise ValueError(
                    f"the data collator returned {len(tensors['chosen'])} pairs for {len(tensors[name])} rows, so "
                    f"nobody can tell whose {name.removeprefix('pair_')} are whose. Return one for each row, or leave "
                    "weight_column and margin_column out."
                )
        inputs = {name: tensor for name, tensor in tensors.items() if name not in {*names, COMPLETION_MASK}}
        return cls(inputs=inputs, **{name: tensors[name] for name in names & tensors.keys()})


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLogps:
    """Log-probs (nats, fp32) of the N completion tokens of a batch, and the sequence that each token belongs to.

    `state_sums` has for each sequence the sum of the hidden states that the head turned into these log-probs, in fp32
    or wider. It is there where the batch asked for it and one model has computed the log-probs.
    """

    per_token: Float[Tensor, "N"]
    sequence: Int[Tensor, "N"]
    num_sequences: int
    state_sums: Float[Tensor, "S h"] | None = None

    def sums(self) -> Float[Tensor, "S"]:
        """`log pi(y|x)` of each sequence, nats: the sum over its tokens."""
        return self.segment_sum(self.per_token)

    def lengths(self) -> Int[Tensor, "S"]:
        """Number of scored completion tokens per sequence."""
        ones = torch.ones_like(self.sequence)
        return ones.new_zeros(self.num_sequences).index_add(0, self.sequence, ones)

    def ranks(self) -> Int[Tensor, "N"]:
        """0-based index of each token within its completion."""
        lengths = self.lengths()
        starts = lengths.cumsum(0) - lengths
        return torch.arange(len(self.sequence), device=self.sequence.device) - starts[self.sequence]

    def segment_sum(self, values: Float[Tensor, "N"]) -> Float[Tensor, "S"]:
        """Sum of one value per token over the tokens of each sequence.

        Added up in fp64: in fp32, the rounding errors of a long completion would show in exp(log ratio).
        """
        wide = values.dtype if values.device.type == "mps" else torch.float64  # MPS has no fp64
        total = values.new_zeros(self.num_sequences, dtype=wide).index_add(0, self.sequence, values.to(wide))
        return total.to(values.dtype)

    def in_sequences(self, sequences: Int[Tensor, "K"]) -> Bool[Tensor, "N"]:
        """True where a token belongs to one of `sequences`."""
        member = torch.zeros(self.num_sequences, dtype=torch.bool, device=self.sequence.device)
        return member.index_fill(0, sequences, True)[self.sequence]
