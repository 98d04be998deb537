"""`inspect_data`: what a run would train on, counted and shown, before a model is loaded.

Tokenizer and data are made ready by the functions that the trainer calls, in their order, so rows, numbers and messages
are those of the run. Of the model only the config is read. What would end the run is part of the report: a dataset
without a usable row still has its rows and the reasons. Given up: what needs weights, such as the layout of batches.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import numpy as np
from datasets import Dataset, IterableDataset
from torch import nn

from holdfast.checkpoint.template_date import recorded_date
from holdfast.config import DPOConfig
from holdfast.data.columns import SOURCE, SOURCE_ROW
from holdfast.data.completions import datasets_by_name
from holdfast.data.dates import date_of_run
from holdfast.data.files.places import Places, keep_places, places_of
from holdfast.data.mixing.mixture import keep_mixture
from holdfast.data.notes import rows_by_kind
from holdfast.data.pair_values import check_pair_values
from holdfast.data.prepare import Preparation
from holdfast.data.token_columns import NOTES, rows_with
from holdfast.data.tokenize import check_vocabulary
from holdfast.data.usability import UNUSABLE_REASONS
from holdfast.inspect.facts import USABLE, RowFacts, collect
from holdfast.inspect.model_shape import model_without_weights
from holdfast.inspect.numbers import Found, Numbers, by_source, leaked, numbers_of
from holdfast.inspect.pairs import Cutting, pair_at
from holdfast.inspect.rows import RowView, Writer
from holdfast.inspect.said import warnings_collected
from holdfast.policy.positions import check_positions
from holdfast.policy.tokenizer import load_tokenizer, padding_id
from holdfast.scoring.causal_lm import unwrap, vocabulary_size

ROWS_OF_A_STREAM = 10_000
"""So many rows of a stream are looked at, unless a limit is given."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be shown. `only` is the name of a dataset of the run: "train", "eval" for all evaluation data, or the
    name of one of several evaluation sets; None shows all. `limit` looks at the first rows only. Of each dataset
    `num_rows` used rows are shown, drawn with `seed`, and the rows with the numbers `rows`, which a dataset may lack.
    """

    only: str | None = None
    limit: int | None = None
    num_rows: int = 3
    rows: tuple[int, ...] = ()
    seed: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What is noted on rows: the kind of the note, its rows, and what the first of them says."""

    kind: str
    found: Found
    detail: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInspection:
    """A dataset of a run. `is_part` is so where only its first rows were looked at. `leak` are rows of an evaluation
    set whose prompt is trained on; None where that was not looked for. `said` are the run's warnings of it, and
    `refusal` is the error that would end the run. `facts` are the numbers of single rows. `excerpts` are a few words of
    each row that is an example of something, by number, and `shown` are the rows to look at."""

    name: str
    is_part: bool
    numbers: Numbers
    by_source: dict[str, Numbers]
    leak: Found | None
    notes: tuple[Note, ...]
    said: tuple[str, ...]
    refusal: str | None
    facts: RowFacts
    excerpts: dict[int, str]
    shown: tuple[RowView, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DataInspection:
    """The data of a run. `template_date` is the date that the chat template prints, None where it prints none."""

    model: str
    tokenizer: str
    num_embeddings: int
    max_length: int | None
    truncation_mode: str
    template_date: str | None
    datasets: tuple[DatasetInspection, ...]


def inspect_data(
    model: str | nn.Module,
    args: DPOConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    request: Request | None = None,
) -> DataInspection:
    """What `DPOTrainer` with these arguments would train and evaluate on. A path or hub id as `model` is not loaded.

    Evaluation data are compared with the training data where both are asked for. Raises `ValueError` or `TypeError`, as
    the trainer would, for what leaves nothing to show: a malformed row, missing columns, a weight or margin that is
    none, a tokenizer that does not fit; and for a dataset that `request` names and the run lacks.
    """
    request = request or Request()
    shape = model_without_weights(model, args) if isinstance(model, str) else model
    _, tokenizer = load_tokenizer(processing_class, shape, args)
    num_ids = vocabulary_size(unwrap(shape))
    check_vocabulary(tokenizer, num_ids)
    padding_id(tokenizer, args.pad_token)
    date = date_of_run(tokenizer, args.template_date, recorded_date(args), (train_dataset, eval_dataset))
    preparation = Preparation.of_options(args, tokenizer, vocab_size=num_ids, template_date=date)
    inspector = _Inspector(preparation=preparation, shape=shape, request=request)
    inspections: dict[str, DatasetInspection] = {}
    asked = _asked(train_dataset, eval_dataset, request.only)
    check_pair_values(args, asked)
    for name, dataset in asked.items():
        inspections[name] = inspector.of(name, dataset, inspections.get("train"))
    return DataInspection(
        model=model if isinstance(model, str) else type(model).__name__,
        tokenizer=type(tokenizer).__name__,
        num_embeddings=num_ids,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        template_date=date,
        datasets=tuple(inspections.values()),
    )


def _asked(train_dataset: Any, eval_dataset: Any, only: str | None) -> dict[str, Any]:
    """The datasets to look at, by the names that messages give them. ValueError where there is none of that name."""
    of_eval = datasets_by_name(eval_dataset)
    several = isinstance(eval_dataset, Mapping)
    found = {"train": train_dataset} if train_dataset is not None and only in (None, "train") else {}
    for key, dataset in of_eval.items():
        if only in (None, "eval", key):
            found[f"eval {key!r}" if several else key] = dataset
    if not found:
        names = [*(["train"] if train_dataset is not None else []), *(["eval"] if several else []), *of_eval]
        raise ValueError(f"the dataset {only!r} was asked for; this run has {', '.join(names)}. Name one of them.")
    return found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Inspector:
    """Looks at one dataset after the other, as the request asks."""

    preparation: Preparation
    shape: nn.Module
    request: Request

    def of(
        self, name: str, dataset: Dataset | IterableDataset, training: DatasetInspection | None
    ) -> DatasetInspection:
        """The inspection of a dataset. Evaluation data are compared with the `training` data."""
        rows, is_part = _first_rows(dataset, self.request.limit)
        seen: list[tuple[Dataset, Mapping[str, Sequence[int]]]] = []
        refusal = None
        with warnings_collected() as said:
            try:
                prepared = self.preparation.of(rows, name, observe=lambda *found: seen.append(found))
                check_positions([self.shape], {name: prepared}, self.preparation.max_length)
            except ValueError as error:
                if not seen:
                    raise
                refusal = str(error)
        tokenized, unusable = seen[0]
        preparation = self.preparation
        cutting = Cutting(max_length=preparation.max_length, truncation_mode=preparation.truncation_mode)
        description = f"Counting {name} dataset"
        facts, sources = collect(
            tokenized, unusable, cutting, description=description, is_quiet=preparation.disable_tqdm
        )
        numbers = numbers_of(facts)
        leak = None if training is None else leaked(facts, training.facts)
        notes = _notes(tokenized)
        view = _View(tokenized=tokenized, cutting=cutting, facts=facts, sources=sources, places=places_of(rows),
                     writer=Writer(preparation.processing_class))  # fmt: skip
        return DatasetInspection(
            name=name,
            is_part=is_part,
            numbers=numbers,
            by_source=by_source(facts, sources),
            leak=leak,
            notes=notes,
            said=tuple(said),
            refusal=refusal,
            facts=facts,
            excerpts=view.excerpts(_examples(numbers, notes, leak)),
            shown=tuple(view.row(index) for index in self._shown(facts)),
        )

    def _shown(self, facts: RowFacts) -> list[int]:
        """The numbers of the rows to show: those asked for, then some of the used ones, then one of each reason."""
        used = facts.usable().index.tolist()
        drawn = random.Random(self.request.seed).sample(used, min(self.request.num_rows, len(used)))
        asked = [row for row in self.request.rows if row < len(facts)]
        left_out = [
            int(facts.index[facts.reason == code][0])
            for code in range(len(UNUSABLE_REASONS))
            if self.request.num_rows and (facts.reason == code).any()
        ]
        return list(dict.fromkeys([*asked, *sorted(drawn), *left_out]))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """The rows of a tokenized dataset, to be looked at."""

    tokenized: Dataset
    cutting: Cutting
    facts: RowFacts
    sources: tuple[str, ...]
    places: Places | None
    writer: Writer

    def row(self, index: int) -> RowView:
        chosen, rejected = self.writer.sides(pair_at(self.tokenized, index, self.cutting))
        reason = int(self.facts.reason[index])
        return RowView(
            index=index,
            place=self.places.of(index, self._source_of(index)) if self.places is not None else None,
            source=self.sources[int(self.facts.source[index])] if self.sources else None,
            reason=None if reason == USABLE else UNUSABLE_REASONS[reason],
            chosen=chosen,
            rejected=rejected,
        )

    def _source_of(self, index: int) -> dict[str, Any]:
        """The columns of a row that say where it comes from."""
        names = [name for name in (SOURCE, SOURCE_ROW) if name in self.tokenized.column_names]
        rows: Any = self.tokenized.select_columns(names)[index : index + 1] if names else {}
        return {name: values[0] for name, values in rows.items()}

    def excerpts(self, rows: Sequence[int]) -> dict[int, str]:
        """The beginnings of these rows, by number."""
        return {row: self.writer.excerpt(pair_at(self.tokenized, row, self.cutting)) for row in rows}


def _examples(numbers: Numbers, notes: Sequence[Note], leak: Found | None) -> list[int]:
    """All rows that are named as an example of something."""
    repeats = numbers.repeats
    found = [
        *numbers.left_out.values(), numbers.truncated, repeats.identical, repeats.nearly_identical,
        repeats.contradictions, repeats.sharing, numbers.nearly_equal, *(note.found for note in notes),
        *([] if leak is None else [leak]),
    ]  # fmt: skip
    return sorted({row for each in found for row in each.examples})


def _first_rows(dataset: Any, limit: int | None) -> tuple[Any, bool]:
    """The first rows of a dataset, and whether there are more. Anything that is no dataset, and a stream without rows,
    is returned as it is: preparing it is an error with a message."""
    if isinstance(dataset, IterableDataset):
        limit = limit or ROWS_OF_A_STREAM
        found = list(islice(dataset, limit + 1))
        if not found:
            return dataset, False
        rows, is_part = Dataset.from_list(found[:limit], features=dataset.features), len(found) > limit
    elif isinstance(dataset, Dataset) and limit is not None and limit < len(dataset):
        rows, is_part = dataset.select(range(limit)), True
    else:
        return dataset, False
    keep_places(rows, of=dataset)
    keep_mixture(rows, dataset)
    return rows, is_part


def _notes(tokenized: Dataset) -> tuple[Note, ...]:
    """The notes on the rows of a tokenized dataset, by kind."""
    if NOTES not in tokenized.column_names:
        return ()
    report: Any = tokenized.select_columns([NOTES]).with_format("arrow")[:]
    by_kind = rows_by_kind((row, report[NOTES][row].as_py()) for row in rows_with(report[NOTES]))
    return tuple(
        Note(kind=kind, found=Found.of(np.array(rows), len(tokenized)), detail=detail)
        for kind, (rows, detail) in by_kind.items()
    )
