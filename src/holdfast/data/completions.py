"""What a reference scores ahead of training: the completions of a dataset, in batches of like length.

A completion that several pairs have is scored once. Completions are sorted by length and cut into batches by a budget
of tokens, so that little of a batch is padding. Completions of one prompt stay together where the layout shares
prompts. The budget is that of a training batch made of the longest completions. On a CPU it is at most `CPU_TOKENS`.

Where all processes score together (sharded weights), the batches are dealt to them in turn: they are the batches of
one process, and each process has equally many. One that would have no more gets a batch of another's again.

This takes a layout, which says how many tokens rows have. A user's own data collator does not say it. Under one, pairs
are scored in the order of the dataset, and a completion is scored once for each pair that has it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import xxhash
from accelerate import Accelerator
from datasets import Dataset

from holdfast.batch import ContentId, PairBatch
from holdfast.data.columns import REFERENCE_COLUMNS, columns_of_pairs
from holdfast.data.layouts.base import Layout
from holdfast.data.layouts.choose import layout_of
from holdfast.data.layouts.sequences import TokenSequence, content_id_of
from holdfast.data.pair_content import PairContent, PairContentInProgress
from holdfast.data.ragged import lists_of

ChooseBlocks = Callable[[Sequence[ContentId]], Iterable[Sequence[ContentId]]]
"""Takes all content ids and returns those to be scored, block by block. The next block is asked for once a block is
scored."""
FindMissing = Callable[[Sequence[ContentId]], Sequence[ContentId]]
"""Takes content ids and returns those whose log-probs are not known yet."""

CPU_TOKENS = 3_200
"""Tokens of a batch on a CPU, which gains nothing by larger matrices. A prompt with one completion may have more."""

_ROWS_AT_A_TIME = 1_000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """The share of the process number `process` (from 0) where the batches are dealt to `num_processes` in turn."""

    process: int
    num_processes: int

    def own(self, groups: "Sequence[_Group]") -> "Iterator[_Group]":
        """This process's groups of those of all processes; equally many for each, so the last group may come again."""
        for first in range(0, len(groups), self.num_processes):
            yield groups[min(first + self.process, len(groups) - 1)]


NO_DEAL = Deal(process=0, num_processes=1)
"""All batches are this process's."""


class CompletionsToScore(Protocol):
    """The completions of a dataset that a reference scores ahead."""

    def batches(self, blocks: ChooseBlocks, missing: FindMissing, deal: Deal = NO_DEAL) -> Iterator[PairBatch]:
        """The batches to be scored. The next batch is asked for once a batch is scored. With a `deal` all processes
        ask, `blocks` and `missing` answer all of them alike, and each gets equally many batches."""
        ...

    def num_completions(self) -> int:
        """How many completions there are."""
        ...

    def pairs(self) -> Iterable[tuple[ContentId, ContentId]]:
        """The content ids of the chosen and the rejected completion of each pair; none where the batches say them."""
        ...

    def user_logps(self) -> "Iterator[UserLogp]":
        """The log-probs in the dataset's own columns, of both completions of every pair; nothing without columns."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UserLogp:
    """A completion's log-prob as a user's dataset gives it: `value`, a sum in nats over `num_tokens` tokens, not
    checked. `where` names its row and column."""

    content: ContentId
    num_tokens: int
    value: Any
    where: str


@final
class Completions:
    """The distinct completions of `dataset`, truncated and laid out by `layout`.

    `pair_batch` makes a batch of what a layout returns. `num_pairs` is how many pairs a training batch has.
    `most_tokens` bounds the tokens of a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: Layout,
        pair_batch: Callable[[Mapping[str, Any]], PairBatch],
        num_pairs: int,
        most_tokens: int | None = None,
    ) -> None:
        self._pairs: Any = dataset.select_columns(columns_of_pairs(dataset.column_names)).with_format("arrow")
        self._logps = dataset.select_columns(_reference_columns(dataset))
        self._layout = layout
        self._pair_batch = pair_batch
        self._num_pairs = num_pairs
        self._most_tokens = most_tokens
        self._by_content: dict[ContentId, _Completion] | None = None
        self._content: PairContent | None = None

    def num_completions(self) -> int:
        """How many distinct completions there are."""
        return len(self._completions())

    def ids(self) -> Iterable[ContentId]:
        """The content ids of the distinct completions."""
        return self._completions()

    def batches(self, blocks: ChooseBlocks, missing: FindMissing, deal: Deal = NO_DEAL) -> Iterator[PairBatch]:
        """See `CompletionsToScore.batches`: all that `blocks` chooses, the longest first."""
        completions, budget = self._completions(), self._budget()
        for block in blocks(self._order(completions)):
            for group in deal.own([*_groups([completions[key] for key in block], budget, self._layout)]):
                yield self._pair_batch(self._layout.of_completions(self._sequences(group)))

    def pairs(self) -> list[tuple[ContentId, ContentId]]:
        """See `CompletionsToScore.pairs`: those of all rows, in their order."""
        return self.content().ids()

    def content(self) -> PairContent:
        """The completions of all pairs, by content id, with their lengths."""
        if self._content is None:
            content = PairContentInProgress()
            for side, _, sequence in self._all_sequences():
                content.add(side, sequence)
            self._content = content.done()
        return self._content

    def batches_of_pairs(
        self, pairs: Iterable[tuple[ContentId, ContentId]], deal: Deal = NO_DEAL
    ) -> Iterator[PairBatch]:
        """The completions of these pairs in batches, those of a pair close to each other; with a `deal` this process's
        share of them."""
        completions = self._completions()
        by_length = sorted(pairs, key=lambda pair: -max(completions[key].length for key in pair))
        chosen = {key: completions[key] for pair in by_length for key in pair}
        order = self._order(chosen) if self._layout.shares_prompts else [*chosen]
        for group in deal.own([*_groups([chosen[key] for key in order], self._budget(), self._layout)]):
            yield self._pair_batch(self._layout.of_completions(self._sequences(group)))

    def _budget(self) -> int:
        """The tokens of a batch."""
        budget = 2 * self._num_pairs * max(completion.length for completion in self._completions().values())
        return min(budget, self._most_tokens or budget)

    def _order(self, completions: "Mapping[ContentId, _Completion]") -> list[ContentId]:
        """The longest completion first, each with the others of its prompt where the layout shares prompts."""
        if not self._layout.shares_prompts:
            return sorted(completions, key=lambda key: (-completions[key].length, key))
        longest: dict[int, int] = {}
        for completion in completions.values():
            longest[completion.prompt] = max(completion.length, longest.get(completion.prompt, 0))

        def rank(key: ContentId) -> tuple[int, int, int, ContentId]:
            completion = completions[key]
            return -longest[completion.prompt], completion.prompt, -completion.length, key

        return sorted(completions, key=rank)

    def user_logps(self) -> Iterator[UserLogp]:
        """See `CompletionsToScore.user_logps`: the columns `ref_chosen_logps` and `ref_rejected_logps`."""
        if not self._logps.column_names:
            return
        columns = [self._logps[name][:] for name in REFERENCE_COLUMNS]
        for side, index, sequence in self._all_sequences():
            yield UserLogp(
                content=content_id_of(sequence),
                num_tokens=sequence.num_targets,
                value=columns[side][index],
                where=f"row {index} of {REFERENCE_COLUMNS[side]!r}",
            )

    def _completions(self) -> "dict[ContentId, _Completion]":
        """The distinct completions by content id; the dataset is read once for them."""
        if self._by_content is None:
            self._by_content, content = {}, PairContentInProgress()
            for side, index, sequence in self._all_sequences():
                completion = _Completion(
                    index=index,
                    side=side,
                    length=len(sequence.ids),
                    num_prompt=sequence.num_prompt,
                    prompt=xxhash.xxh3_64_intdigest(sequence.ids[: sequence.num_prompt].tobytes()),
                )
                self._by_content.setdefault(content.add(side, sequence), completion)
            self._content = content.done()
        return self._by_content

    def _all_sequences(self) -> Iterator[tuple[int, int, TokenSequence]]:
        """What `_sequences_of` gives for all pairs."""
        for start in range(0, len(self._pairs), _ROWS_AT_A_TIME):
            yield from self._sequences_of(range(start, min(start + _ROWS_AT_A_TIME, len(self._pairs))))

    def _sequences_of(self, indices: Sequence[int]) -> Iterator[tuple[int, int, TokenSequence]]:
        """(side, index of the pair, sequence) for both completions of each of these pairs. Side 0 is chosen, 1
        rejected."""
        table = self._pairs[indices if isinstance(indices, range) else list(indices)]
        lists = zip(*map(lists_of, table.columns), strict=True)
        pairs = [dict(zip(table.column_names, values, strict=True)) for values in lists]
        for number, sequence in enumerate(self._layout.truncated(pairs)):
            yield number // len(indices), indices[number % len(indices)], sequence

    def _sequences(self, completions: "Sequence[_Completion]") -> list[TokenSequence]:
        indices = sorted({completion.index for completion in completions})
        sequences = {(side, index): sequence for side, index, sequence in self._sequences_of(indices)}
        return [sequences[completion.side, completion.index] for completion in completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Completion:
    """A completion by its row in the dataset and its side (0 for chosen, 1 for rejected).

    `length` counts the tokens of prompt and completion, `num_prompt` those of the prompt alone. `prompt` is a hash of
    the prompt. If two prompts had the same hash, a batch would be too large, and no number would be wrong.
    """

    index: int
    side: int
    length: int
    num_prompt: int
    prompt: int


_Group = list[_Completion]


def _groups(completions: Sequence[_Completion], budget: int, layout: Layout) -> Iterator[_Group]:
    """The completions in groups, each of which takes at most `budget` tokens in rows of `layout`, padding included."""
    group: list[_Completion] = []
    num_tokens = longest = 0
    for unit, unit_tokens in _units(completions, budget, layout):
        longest = max(longest, unit[0].length)
        needed = layout.tokens_in_rows(
            num_tokens=num_tokens + unit_tokens, num_sequences=len(group) + len(unit), longest=longest
        )
        if group and needed > budget:
            yield group
            group, num_tokens, longest = [], 0, unit[0].length
        group += unit
        num_tokens += unit_tokens
    if group:
        yield group


def _units(
    completions: "Sequence[_Completion]", budget: int, layout: Layout
) -> "Iterator[tuple[list[_Completion], int]]":
    """Completions that stay in one group, and their number of tokens. Where the layout shares prompts, a unit is as
    many completions of one prompt as the budget allows; elsewhere it is one completion."""
    unit: list[_Completion] = []
    num_tokens = 0
    for completion in completions:
        has_prompt = layout.shares_prompts and bool(unit) and unit[-1].prompt == completion.prompt
        size = completion.length - (completion.num_prompt if has_prompt else 0)
        if unit and not (has_prompt and num_tokens + size <= budget):
            yield unit, num_tokens
            unit, num_tokens, size = [], 0, completion.length
        unit.append(completion)
        num_tokens += size
    if unit:
        yield unit, num_tokens


@final
@dataclass(frozen=True, slots=True)
class PairsInOrder:
    """The pairs of this process's share of `dataset`, `size` at a time, under a user's own data collator. `collate`
    makes a batch of rows of the dataset."""

    dataset: Dataset
    size: int
    collate: Callable[[list[dict[str, Any]]], PairBatch]
    accelerator: Accelerator

    def num_completions(self) -> int:
        """Two for each pair of this process's share."""
        return 2 * len(self._share())

    def batches(self, blocks: ChooseBlocks, missing: FindMissing, deal: Deal = NO_DEAL) -> Iterator[PairBatch]:
        """See `CompletionsToScore.batches`. A batch is scored whole where the log-probs of any of its completions are
        missing. A process's share is one piece of the dataset; with a `deal`, the dataset's last row makes up for what
        a shorter share lacks."""
        share, last = self._share(), len(self.dataset) - 1
        if deal.num_processes > 1:
            share = range(share.start, share.start - (-len(self.dataset) // deal.num_processes))
        for start in share[:: self.size]:
            stop = min(start + self.size, share.stop)
            batch = self.collate([self.dataset[min(index, last)] for index in range(start, stop)])
            batch.check_identified()
            if missing(batch.content_ids()):
                yield batch

    def pairs(self) -> tuple[()]:
        """See `CompletionsToScore.pairs`: none, since batches are of pairs."""
        return ()

    def user_logps(self) -> Iterator[UserLogp]:
        """None at all. ValueError where the dataset has the columns: the collator decides which tokens a log-prob sums
        over."""
        if columns := _reference_columns(self.dataset):
            raise ValueError(
                f"the dataset brings reference log-probs along, in the columns {columns}, but how its rows are cut is "
                "up to a data collator of your own. Drop the columns, or leave `data_collator` out."
            )
        return iter(())

    def _share(self) -> range:
        num_rows = -(-len(self.dataset) // self.accelerator.num_processes)
        first = min(self.accelerator.process_index * num_rows, len(self.dataset))
        return range(first, min(first + num_rows, len(self.dataset)))


def _reference_columns(dataset: Dataset) -> list[str]:
    return [column for column in REFERENCE_COLUMNS if column in dataset.column_names]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How a run makes its batches. `collator` is the run's data collator, `pair_batch` makes a batch of what a collator
    returns, and `collate` makes a batch of rows of a dataset."""

    collator: Any
    pair_batch: Callable[[Mapping[str, Any]], PairBatch]
    collate: Callable[[list[dict[str, Any]]], PairBatch]
    accelerator: Accelerator


class BatchSizes(Protocol):
    """The options of a run (`DPOConfig`) that say how many pairs a batch has."""

    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    precompute_ref_batch_size: int | None


def to_score(dataset: Dataset, num_pairs: int, batching: Batching) -> CompletionsToScore:
    """The completions of `dataset`, in batches of about `num_pairs` pairs, under the data collator of the run."""
    if (layout := layout_of(batching.collator)) is not None:
        most_tokens = CPU_TOKENS if batching.accelerator.device.type == "cpu" else None
        return Completions(dataset, layout, batching.pair_batch, num_pairs, most_tokens)
    return PairsInOrder(dataset, num_pairs, batching.collate, batching.accelerator)


def all_to_score(datasets: Mapping[str, Any], sizes: BatchSizes, batching: Batching) -> dict[str, CompletionsToScore]:
    """The completions of each map-style dataset, by the dataset's name. A stream is left out: it is not read ahead of
    its turn. `datasets` has the training data as "train"."""
    return {
        name: to_score(dataset, _num_pairs(name, sizes), batching)
        for name, dataset in datasets.items()
        if isinstance(dataset, Dataset)
    }


def _num_pairs(name: str, sizes: BatchSizes) -> int:
    own = sizes.per_device_train_batch_size if name == "train" else sizes.per_device_eval_batch_size
    return sizes.precompute_ref_batch_size or own


def datasets_by_name(datasets: Any, name: str = "eval") -> dict[str, Any]:
    """One dataset, a dict of datasets or None, as a dict of datasets by name. One dataset has the name `name`."""
    if datasets is None:
        return {}
    return {str(key): part for key, part in datasets.items()} if isinstance(datasets, Mapping) else {name: datasets}
