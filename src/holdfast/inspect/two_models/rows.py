"""The rows on which two models are compared: some pairs of a dataset, tokenized by the model's tokenizer for both.

That is what training does: policy and reference are asked about the same token ids.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from datasets import Dataset, IterableDataset

from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.sequences import TokenSequence
from holdfast.data.prepare import Preparation
from holdfast.data.tokenize import check_vocabulary
from holdfast.inspect.two_models.sides import Side
from holdfast.policy.positions import check_positions
from holdfast.policy.tokenizer import padding_id

CHOSEN, REJECTED = "chosen", "rejected"
_MOST_OF_A_STREAM = 10_000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A completion behind its prompt: the number of its row in the data, its side, and its ids after truncation."""

    row: int
    side: str
    sequence: TokenSequence

    def scored_positions(self) -> np.ndarray:
        """The places of the scored tokens among the ids, in order."""
        ids, num_prompt, _ = self.sequence
        return self.sequence.of_targets(np.arange(max(num_prompt, 1), len(ids)))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Pairs to compare on: the numbers of their rows, their completions (all chosen ones, then all rejected ones), the
    layout that makes batches of them, and their raw rows."""

    numbers: tuple[int, ...]
    completions: tuple[Completion, ...]
    layout: PaddedLayout
    raw: Dataset

    @property
    def largest_id(self) -> int:
        """The largest token id of all."""
        return max(int(each.sequence.ids.max()) for each in self.completions)


def draw_rows(dataset: Any, limit: int, seed: int) -> tuple[list[int], Dataset]:
    """The numbers of at most so many rows, drawn with `seed` and in order, and these rows; of a stream the first."""
    if isinstance(dataset, IterableDataset):
        rows = list(dataset.take(min(limit, _MOST_OF_A_STREAM)))
        if not rows:
            raise ValueError("two models were to be compared on a stream that has no rows. Name one that has.")
        return list(range(len(rows))), Dataset.from_list(rows, features=dataset.features)
    numbers = sorted(random.Random(seed).sample(range(len(dataset)), min(limit, len(dataset))))
    return numbers, dataset.select(numbers)


def read_rows(
    side: Side,
    numbers: list[int],
    raw: Dataset,
    *,
    models: Sequence[Side],
    max_length: int,
    date: str | None,
    name: str,
) -> Rows:
    """The usable pairs among the rows `raw`, tokenized by the tokenizer of `side`. Messages call them `name`.

    The `models` are asked about these rows. ValueError where no row is usable, and where the rows or the tokenizer do
    not fit the models.
    """
    assert side.tokenizer is not None
    num_ids = side.facts.num_embeddings if models else None
    if num_ids is not None:
        check_vocabulary(side.tokenizer, num_ids)
    numbered = raw.add_column(_NUMBER, numbers) if _NUMBER not in raw.column_names else raw  # type: ignore[call-arg]
    preparation = Preparation(processing_class=side.tokenizer, max_length=max_length,
                              vocab_size=num_ids, template_date=date, disable_tqdm=True)  # fmt: skip
    prepared: Any = preparation.of(numbered, name)
    check_positions([each.model for each in models], {name: prepared}, max_length)
    layout = PaddedLayout(padding_id(side.tokenizer, None), max_length)
    features = list(prepared)
    sequences = layout.truncated(features)
    places = [(int(each[_NUMBER]), side_of) for side_of in (CHOSEN, REJECTED) for each in features]
    return Rows(
        numbers=tuple(int(each[_NUMBER]) for each in features),
        completions=tuple(
            Completion(row=row, side=side_of, sequence=sequence)
            for (row, side_of), sequence in zip(places, sequences, strict=True)
        ),
        layout=layout,
        raw=raw,
    )


_NUMBER = "holdfast_row_number"
