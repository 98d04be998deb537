"""What a reference is to score ahead: the completions of a dataset, each once, in batches of like length.

A completion of many pairs is scored once. Completions are sorted by length and cut to a budget of tokens, so that
little of a batch is padding; where the layout shares prompts, those of a prompt stay together. No batch is larger than
the longest pairs would make the training's own, nor, on a CPU, than is of use there. That needs to know how rows are
laid out; under a user's own data collator the batches are its pairs, in the order of the dataset.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import xxhash
from accelerate import Accelerator
from datasets import Dataset

from holdfast.batch import ContentId, PairBatch
from holdfast.data.columns import REFERENCE_COLUMNS, TOKENIZED_COLUMNS
from holdfast.data.layouts.base import Layout
from holdfast.data.layouts.choose import layout_of
from holdfast.data.layouts.rows import Row, content_of

Blocks = Callable[[Sequence[ContentId]], Iterable[Sequence[ContentId]]]
"""From all ids to those that are to be scored now, block by block; the next is asked for when one is done."""
Missing = Callable[[Sequence[ContentId]], Sequence[ContentId]]
"""Those of the ids that are not known yet."""

_ROWS_AT_A_TIME = 1_000

CPU_TOKENS = 3_200
"""On a CPU, the tokens of a batch (more where a prompt with a completion has more), which gains nothing by larger
matrices."""


class Pending(Protocol):
    """Data that a reference scores ahead."""

    def batches(self, blocks: Blocks, missing: Missing) -> Iterator[PairBatch]:
        """The batches to be scored; the next is asked for when one is done."""
        ...

    def num_completions(self) -> int:
        """How many completions there are."""
        ...

    def given(self) -> "Iterator[GivenSum]":
        """The log-prob sums that the data bring along, of both completions of every pair, or none at all."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenSum:
    """What a row of a dataset says the log-prob of a completion of `num_tokens` tokens is (nats; not checked)."""

    content: ContentId
    num_tokens: int
    value: Any
    where: str


@final
class Completions:
    """The completions of `dataset`, truncated and laid out by `layout`. `pair_batch` makes a batch of what a layout
    gives; `num_pairs` is how many pairs a batch of the training has, and `most_tokens` bounds those of a batch here."""

    def __init__(
        self,
        dataset: Dataset,
        layout: Layout,
        pair_batch: Callable[[Mapping[str, Any]], PairBatch],
        num_pairs: int,
        most_tokens: int | None = None,
    ) -> None:
        self._dataset = dataset.select_columns(list(TOKENIZED_COLUMNS))
        self._columns = dataset.select_columns(_given_columns(dataset))
        self._layout = layout
        self._pair_batch = pair_batch
        self._num_pairs = num_pairs
        self._most_tokens = most_tokens
        self._places: dict[ContentId, _Place] | None = None

    def num_completions(self) -> int:
        """Unlike ones."""
        return len(self._found())

    def ids(self) -> Iterable[ContentId]:
        """Of the unlike ones."""
        return self._found()

    def batches(self, blocks: Blocks, missing: Missing) -> Iterator[PairBatch]:
        """See `Pending.batches`: what `blocks` asks for, the longest first."""
        places = self._found()
        budget = 2 * self._num_pairs * max(place.length for place in places.values())
        budget = min(budget, self._most_tokens or budget)
        for block in blocks(self._order(places)):
            for group in _within(budget, [places[key] for key in block], self._layout):
                yield self._pair_batch(self._layout.of_completions(self._rows(group)))

    def _order(self, places: "dict[ContentId, _Place]") -> list[ContentId]:
        """The longest first, each with the others of its prompt where they are laid out together."""
        if not self._layout.shares_prompts:
            return sorted(places, key=lambda key: (-places[key].length, key))
        longest: dict[int, int] = {}
        for place in places.values():
            longest[place.prompt] = max(place.length, longest.get(place.prompt, 0))
        return sorted(
            places, key=lambda key: (-longest[places[key].prompt], places[key].prompt, -places[key].length, key)
        )

    def given(self) -> Iterator[GivenSum]:
        """See `Pending.given`: what the columns `ref_chosen_logps` and `ref_rejected_logps` hold."""
        if not self._columns.column_names:
            return
        columns = [self._columns[name][:] for name in REFERENCE_COLUMNS]
        for start in range(0, len(self._dataset), _ROWS_AT_A_TIME):
            for side, index, row in self._sides(range(start, min(start + _ROWS_AT_A_TIME, len(self._dataset)))):
                yield GivenSum(
                    content=content_of(row),
                    num_tokens=len(row.ids) - max(row.num_prompt, 1),
                    value=columns[side][index],
                    where=f"row {index} of {REFERENCE_COLUMNS[side]!r}",
                )

    def _found(self) -> "dict[ContentId, _Place]":
        if self._places is None:
            self._places = {}
            for start in range(0, len(self._dataset), _ROWS_AT_A_TIME):
                for side, index, row in self._sides(range(start, min(start + _ROWS_AT_A_TIME, len(self._dataset)))):
                    place = _Place(
                        index=index,
                        side=side,
                        length=len(row.ids),
                        num_prompt=row.num_prompt,
                        prompt=xxhash.xxh3_64_intdigest(row.ids[: row.num_prompt].tobytes()),
                    )
                    self._places.setdefault(content_of(row), place)
        return self._places

    def _sides(self, indices: Sequence[int]) -> Iterator[tuple[int, int, Row]]:
        """(0 for chosen or 1 for rejected, index, row) of both completions of each of these pairs."""
        table = self._dataset[list(indices)]
        pairs = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        rows = self._layout.truncated(pairs)
        for place, row in enumerate(rows):
            yield place // len(indices), indices[place % len(indices)], row

    def _rows(self, places: "Sequence[_Place]") -> list[Row]:
        indices = sorted({place.index for place in places})
        rows = {(side, index): row for side, index, row in self._sides(indices)}
        return [rows[place.side, place.index] for place in places]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a completion stands in the dataset, its tokens, prompt included, and those of the prompt, with a number
    that is another for another prompt (if not, batches are larger than they should be)."""

    index: int
    side: int
    length: int
    num_prompt: int
    prompt: int


def _within(budget: int, places: "Sequence[_Place]", layout: Layout) -> "Iterator[list[_Place]]":
    """`places` in groups that take at most `budget` tokens in rows of `layout`, padding included."""
    group: list[_Place] = []
    num_tokens = longest = 0
    for together, size in _together(budget, places, layout):
        longest = max(longest, together[0].length)
        num_rows_tokens = layout.tokens_in_rows(
            num_tokens=num_tokens + size, num_sequences=len(group) + len(together), longest=longest
        )
        if group and num_rows_tokens > budget:
            yield group
            group, num_tokens, longest = [], 0, together[0].length
        group += together
        num_tokens += size
    if group:
        yield group


def _together(budget: int, places: "Sequence[_Place]", layout: Layout) -> "Iterator[tuple[list[_Place], int]]":
    """`places` one by one; or those of one prompt at once, where that is computed once, unless they are too many. With
    the tokens that they take."""
    together: list[_Place] = []
    num_tokens = 0
    for place in places:
        is_prompt_there = layout.shares_prompts and bool(together) and together[-1].prompt == place.prompt
        size = place.length - (place.num_prompt if is_prompt_there else 0)
        if together and not (is_prompt_there and num_tokens + size <= budget):
            yield together, num_tokens
            together, num_tokens, size = [], 0, place.length
        together.append(place)
        num_tokens += size
    if together:
        yield together, num_tokens


@final
@dataclass(frozen=True, slots=True)
class CollatedPairs:
    """`collate` of every `size` rows of this process's share of `dataset`: where only a collator knows the rows."""

    dataset: Dataset
    size: int
    collate: Callable[[list[dict[str, Any]]], PairBatch]
    accelerator: Accelerator

    def num_completions(self) -> int:
        """Two a pair of this process's share."""
        return 2 * len(self._rows())

    def batches(self, blocks: Blocks, missing: Missing) -> Iterator[PairBatch]:
        """See `Pending.batches`; a batch comes whole where any of it is missing."""
        rows = self._rows()
        for start in rows[:: self.size]:
            stop = min(start + self.size, rows.stop)
            batch = self.collate([self.dataset[row] for row in range(start, stop)])
            batch.check_identified()
            if missing(batch.content_ids()):
                yield batch

    def given(self) -> Iterator[GivenSum]:
        """None. ValueError where the dataset has the columns: of what they are the log-probs cannot be known."""
        if columns := _given_columns(self.dataset):
            raise ValueError(
                f"the dataset brings reference log-probs along, in the columns {columns}, but how its rows are cut is "
                "up to a data collator of your own. Drop the columns, or leave `data_collator` out."
            )
        return iter(())

    def _rows(self) -> range:
        share = -(-len(self.dataset) // self.accelerator.num_processes)
        first = min(self.accelerator.process_index * share, len(self.dataset))
        return range(first, min(first + share, len(self.dataset)))


def _given_columns(dataset: Dataset) -> list[str]:
    return [column for column in REFERENCE_COLUMNS if column in dataset.column_names]


def pending(
    dataset: Dataset,
    size: int,
    collator: Any,
    pair_batch: Callable[[Mapping[str, Any]], PairBatch],
    collate: Callable[[list[dict[str, Any]]], PairBatch],
    accelerator: Accelerator,
) -> Pending:
    """What of `dataset` is to be scored, in batches of about `size` pairs, under the data collator of the run."""
    if (layout := layout_of(collator)) is not None:
        most_tokens = CPU_TOKENS if accelerator.device.type == "cpu" else None
        return Completions(dataset, layout, pair_batch, size, most_tokens)
    return CollatedPairs(dataset, size, collate, accelerator)


def all_pending(datasets: Mapping[str, Any], args: Any, *how: Any) -> dict[str, Pending]:
    """`pending` of those of the datasets that have an end, in batches as large as `args` (`DPOConfig`) says; a stream
    is not read ahead of its turn."""
    sizes = {"train": args.per_device_train_batch_size}
    given, otherwise = args.precompute_ref_batch_size, args.per_device_eval_batch_size
    return {
        name: pending(part, given or sizes.get(name, otherwise), *how)
        for name, part in datasets.items()
        if isinstance(part, Dataset)
    }


def by_name(datasets: Any, name: str = "eval") -> dict[str, Any]:
    """One dataset, a dict of them or None as a dict of names."""
    if datasets is None:
        return {}
    return {str(key): part for key, part in datasets.items()} if isinstance(datasets, Mapping) else {name: datasets}
