"""A dataset of preferences -> the same dataset with token ids, without the rows that nothing can be learned from.

A map-style dataset is tokenized in one pass, some hundred rows at a time. What it writes depends only on rows and
tokenizer, so its cache (that of `datasets`) survives a change of `max_length`. Then the token ids are judged, and
nothing is written. Rows that are dropped are always reported: how many, why, and which. Where a batch cannot be
tokenized its rows are taken one by one, so that the first malformed one is named.

A stream goes through the same functions lazily, row by row. It is read up to its first usable row before training
begins, so that a stream without one is an error and not an empty training.

Given up: batches of a stream, which would read ahead of what is asked for.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self, final

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from holdfast.data.add_ids import AddIds, AddIdsAndVerdict, AddIdsToTable
from holdfast.data.columns import MASK_COLUMNS, TOKENIZED_COLUMNS, columns_of_pairs
from holdfast.data.control_text import check_control_text
from holdfast.data.dates import prints_date
from holdfast.data.files.places import Places, places_of
from holdfast.data.first_rows import read_first_rows
from holdfast.data.left_out import LeftOut, note_left_out
from holdfast.data.mixing.mixture import keep_mixture
from holdfast.data.mixing.source_column import left_out_by_source
from holdfast.data.notes import refused_everywhere
from holdfast.data.progress import bars
from holdfast.data.row_error import naming_places
from holdfast.data.row_report import report_rows
from holdfast.data.shapes.convert import with_columns
from holdfast.data.shapes.mapping import ColumnMapping
from holdfast.data.stream_report import REASON, StreamReport
from holdfast.data.token_columns import (
    NOTES,
    REPORT_COLUMNS,
    features_with_ids,
)
from holdfast.data.tokenize import TruncationMode, check_truncation
from holdfast.data.usability import nothing_usable, some_unusable
from holdfast.data.used_rows import remember_used_rows
from holdfast.data.verdicts import Judge, reasons_by_row

logger = logging.getLogger(__name__)

_BATCH_ROWS, _JUDGED_ROWS = 500, 10_000
_NOTED_ROWS = 8
"""So many rows of a stream show what is in all of them, where it is in each of these."""

Observer = Callable[[Dataset, Mapping[str, Sequence[int]]], None]
"""Gets all rows of a map-style dataset, with their token ids and `REPORT_COLUMNS`, and the numbers of those that cannot
be used, by reason."""


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    vocab_size: int | None = None,
    template_date: str | None = None,
    columns: ColumnMapping | None = None,
    special_tokens_in_text: str = "text",
    assistant_only: bool = True,
    name: str = "train",
    main_process_first: AbstractContextManager[Any] | None = None,
    disable_tqdm: bool = False,
    observe: Observer | None = None,
) -> Dataset | IterableDataset:
    """The usable rows of `dataset`, with int columns `prompt_ids`, `chosen_ids` and `rejected_ids` beside the others.

    Where not all tokens of the completions are scored, `chosen_mask` and `rejected_mask` have a 1 for each that is and
    a 0 for each that is only seen, or None where all are; a stream always has these columns. `assistant_only` False
    scores all tokens (see `holdfast.data.turns`), and `special_tokens_in_text="token"` makes special tokens of
    text that spells them out (see `holdfast.data.control_text`).

    The ids are not truncated (layouts do that); `max_length` and `truncation_mode` only decide which rows are usable
    (see `holdfast.data.usability.unusable_reason`). The others are left out. One warning counts them by reason; for a
    stream, a warning comes with the 1st, 10th, 100th, ... row of each reason. Rows that already have the three columns
    are checked and stay as they are, masks of their completions (`MASK_COLUMNS`) too. `vocab_size` is the number of the
    model's embeddings; None leaves ids unchecked. `template_date` is the date that chat templates print. With None it
    is today's, and a later run has other ids. `columns` says which columns are what (`holdfast.data.shapes.mapping`).
    `num_proc` and `observe` are for map-style datasets, `main_process_first` is a context in which the other processes
    wait for the cache, and `disable_tqdm` hides the progress bars.

    Raises `ValueError` before training for no usable row, missing columns, or a malformed row; a stream when read.
    """
    check_truncation(max_length, truncation_mode)
    check_control_text(special_tokens_in_text)
    _check_kind(dataset, name)
    places = places_of(dataset)
    with bars(are_shown=not disable_tqdm), naming_places(places):
        dataset = _with_columns(_unformatted(dataset), columns, name, num_proc)
    first = read_first_rows(dataset, processing_class, columns=columns, name=name, places=places, warn=_warn)
    is_dated = first.has_messages and prints_date(processing_class)
    add_ids = AddIds(
        processing_class=processing_class,
        name=name,
        special_tokens_in_text=special_tokens_in_text,
        template_date=template_date if is_dated else None,  # where no date is printed, it is no part of the cache key
        row_rules=first.rules,
        rules_of_sources=first.rules_of_sources,
        assistant_only=assistant_only,
    )
    judge = Judge(max_length=max_length, truncation_mode=truncation_mode, vocab_size=vocab_size, name=name)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, add_ids, judge, places)
    with main_process_first or nullcontext(), bars(are_shown=not disable_tqdm), naming_places(places):
        dataset = _with_ids(dataset, add_ids, num_proc)
        if observe is not None:
            observe(dataset, _unusable(dataset, judge))
        return _usable(_reported(dataset, add_ids), judge)


class PreparationOptions(Protocol):
    """The options of a run (`DPOConfig`) that say how its datasets are prepared."""

    columns: Any
    max_length: int | None
    truncation_mode: Any
    special_tokens_in_text: str
    dataset_num_proc: int | None
    assistant_only: bool
    disable_tqdm: bool | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How all datasets of a run are prepared; see `prepare_dataset` for what each value means."""

    processing_class: PreTrainedTokenizerBase
    columns: ColumnMapping | None = None
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    num_proc: int | None = None
    vocab_size: int | None = None
    template_date: str | None = None
    special_tokens_in_text: str = "text"
    assistant_only: bool = True
    disable_tqdm: bool = False

    @classmethod
    def of_options(
        cls,
        options: PreparationOptions,
        processing_class: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        template_date: str | None,
    ) -> Self:
        """The preparation that a run's options ask for."""
        return cls(
            processing_class=processing_class,
            columns=options.columns,
            max_length=options.max_length,
            truncation_mode=options.truncation_mode,
            num_proc=options.dataset_num_proc,
            vocab_size=vocab_size,
            template_date=template_date,
            special_tokens_in_text=options.special_tokens_in_text,
            assistant_only=options.assistant_only,
            disable_tqdm=bool(options.disable_tqdm),
        )

    def of(
        self, dataset: Dataset | IterableDataset, name: str, observe: Observer | None = None
    ) -> Dataset | IterableDataset:
        """What `prepare_dataset` returns for a dataset of this name."""
        return prepare_dataset(
            dataset,
            self.processing_class,
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
            num_proc=self.num_proc,
            vocab_size=self.vocab_size,
            template_date=self.template_date,
            columns=self.columns,
            special_tokens_in_text=self.special_tokens_in_text,
            assistant_only=self.assistant_only,
            name=name,
            disable_tqdm=self.disable_tqdm,
            observe=observe,
        )

    def of_eval(
        self, dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None
    ) -> Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None:
        """The same for an evaluation dataset, or for each of a dict of them under its key. None stays None. Raises
        `ValueError` for an empty dict."""
        if dataset is None:
            return None
        if not isinstance(dataset, Mapping | DatasetDict | IterableDatasetDict):
            return self.of(dataset, "eval")
        if not dataset:
            raise ValueError(
                "eval_dataset is a dict of evaluation datasets; found an empty one. Give it at least one dataset, or "
                "pass `eval_dataset=None`."
            )
        return {key: self.of(part, f"eval {key!r}") for key, part in dataset.items()}


def _unformatted(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The dataset with rows as plain Python values. A user's own transform stays, since it makes the columns."""
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        return dataset.with_format(None)
    return dataset


def _check_kind(dataset: Any, name: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"the {name} dataset must be a `datasets.Dataset` or `IterableDataset`; found {type(dataset).__name__}. "
            'Choose a split (`dataset["train"]`), or make one with `Dataset.from_list(rows)`.'
        )


def _with_columns(
    dataset: Dataset | IterableDataset, columns: ColumnMapping | None, name: str, num_proc: int | None
) -> Dataset | IterableDataset:
    if columns is None:
        return dataset
    converted = with_columns(dataset, columns, name=name, num_proc=num_proc)
    keep_mixture(converted, dataset)
    return converted


def _with_ids(dataset: Dataset, add_ids: AddIds, num_proc: int | None) -> Dataset:
    """The dataset with token ids, and with `REPORT_COLUMNS` unless it had ids already."""
    is_plain = dataset.format["type"] is None
    if is_plain and set(TOKENIZED_COLUMNS) <= set(dataset.column_names):
        return dataset
    description = f"Tokenizing {add_ids.name} dataset"
    if is_plain:
        dataset = dataset.with_format("arrow").map(
            AddIdsToTable(add_ids=add_ids, features=dataset.features),
            with_indices=True,
            batched=True,
            batch_size=_BATCH_ROWS,
            features=features_with_ids(dataset.features),
            num_proc=num_proc,
            desc=description,
        )
    else:  # under a user's own transform the columns are known row by row
        dataset = dataset.map(add_ids, with_indices=True, num_proc=num_proc, desc=description)
    return dataset.with_format(None)


def _reported(dataset: Dataset, add_ids: AddIds) -> Dataset:
    """The dataset without `REPORT_COLUMNS`. Warns once, with numbers, where a prompt is not a prefix of the full texts,
    where rows spell out special tokens, and of the notes on rows."""
    if not set(REPORT_COLUMNS) <= set(dataset.column_names):
        return dataset
    report_rows(dataset.with_format("arrow"), add_ids, _warn)
    unused = [] if _has_masks(dataset) else list(MASK_COLUMNS)
    return dataset.remove_columns([*REPORT_COLUMNS, *unused])


def _has_masks(dataset: Dataset) -> bool:
    """Whether some tokens of a completion are not scored in some row."""
    return any(dataset.data.column(name).null_count < len(dataset.data) for name in MASK_COLUMNS)


def _usable(dataset: Dataset, judge: Judge) -> Dataset:
    """The usable rows. Warns of the others by reason, and raises `ValueError` if there are no usable ones."""
    unusable = _unusable(dataset, judge)
    if not unusable:
        note_left_out(dataset, LeftOut(num_rows=len(dataset), by_reason={}))
        return dataset
    counts = {reason: len(rows) for reason, rows in unusable.items()}
    if sum(counts.values()) == len(dataset):
        raise ValueError(nothing_usable(counts, judge.max_length, judge.truncation_mode, judge.name))
    left_out = {row for rows in unusable.values() for row in rows}
    rows = [row for row in range(len(dataset)) if row not in left_out]
    usable = dataset.select(rows)
    note_left_out(usable, LeftOut(num_rows=len(dataset), by_reason=counts))
    remember_used_rows(usable, rows)
    _warn(some_unusable(unusable, len(dataset), judge.max_length, judge.name) + left_out_by_source(dataset, usable))
    return usable


def _unusable(dataset: Dataset, judge: Judge) -> dict[str, list[int]]:
    """The rows that cannot be used, by reason."""
    ids = dataset.select_columns(columns_of_pairs(dataset.column_names)).with_format("arrow")
    verdicts = []
    for first in range(0, len(ids), _JUDGED_ROWS):
        rows: Any = ids[first : first + _JUDGED_ROWS]
        verdicts.append(judge.verdicts(rows, first))
    return reasons_by_row(verdicts)


def _prepare_stream(dataset: IterableDataset, add_ids: AddIds, judge: Judge, places: Places | None) -> IterableDataset:
    """The stream of usable rows. Raises `ValueError` if it has none, which is known once the first one is found, and if
    all of its first rows have a note that may not be in all rows. The next row is read only where that is open."""
    row_function = AddIdsAndVerdict(add_ids=add_ids, judge=judge, places=places, features=dataset.features)
    counts: Counter[str] = Counter()
    notes: list[list[dict[str, str]]] = []
    is_usable = False
    for index, row in enumerate(dataset):
        read = row_function(row, index)
        notes.append(read[NOTES])
        is_usable |= read[REASON] is None
        counts.update([read[REASON]] if read[REASON] else [])
        if is_usable and (len(notes) >= _NOTED_ROWS or refused_everywhere(notes, judge.name) is None):
            break
    if not is_usable:
        raise ValueError(nothing_usable(counts, judge.max_length, judge.truncation_mode, judge.name))
    if refusal := refused_everywhere(notes, judge.name):
        raise ValueError(refusal)
    report = StreamReport(judge, add_ids.decode, _warn)
    prepared = dataset.map(row_function, with_indices=True).filter(report, with_indices=True)
    prepared = prepared.remove_columns([*REPORT_COLUMNS, REASON])
    keep_mixture(prepared, dataset)
    return prepared


def _warn(message: str) -> None:
    """Logged by the first process only: every process sees the same rows of a map-style dataset."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)
