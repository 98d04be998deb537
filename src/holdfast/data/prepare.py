"""A dataset of preferences -> the same dataset with token ids, without the rows that nothing can be learned from.

A map-style dataset is read twice. The first pass tokenizes; it depends only on the rows and the tokenizer, so its cache
(that of `datasets`) survives a change of `max_length`. The second pass reads token ids, judges each row and writes one
short column. Rows that it drops are always reported: how many, why, and which.

A stream goes through the same row functions lazily. It is read up to its first usable row before training begins, so
that a stream without one is an error and not an empty training.

Given up: batched tokenization, which would make a malformed row harder to name; use `num_proc`.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self, final

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from transformers import PreTrainedTokenizerBase

from holdfast.data.columns import CHOSEN_IDS, PROMPT_IDS, REFERENCE_COLUMNS, REJECTED_IDS, TOKENIZED_COLUMNS
from holdfast.data.dates import prints_date
from holdfast.data.formats import check_columns, read_preference
from holdfast.data.tokenize import TokenizedPair, TruncationMode, check_tokenizer, check_truncation, tokenize
from holdfast.data.usability import nothing_usable, prompt_is_cut, remedy, share, some_unusable, unusable_reason

logger = logging.getLogger(__name__)

TOKENIZATION_RULES = 2
"""Part of the cache key: raise it when the same row gives other token ids, so that no older cache is used."""

_CUT, _REASON = "holdfast_cut", "holdfast_unusable"
_IDS_TYPE = List(Value("int32"))


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    vocab_size: int | None = None,
    template_date: str | None = None,
    name: str = "train",
    main_process_first: AbstractContextManager[Any] | None = None,
) -> Dataset | IterableDataset:
    """The usable rows of `dataset`, with int columns `prompt_ids`, `chosen_ids` and `rejected_ids` beside the others.

    The ids are not truncated (layouts do that); `max_length` and `truncation_mode` only decide which rows are usable
    (see `holdfast.data.usability.unusable_reason`). The others are left out. One warning counts them by reason; for a
    stream, a warning comes with the 1st, 10th, 100th, ... row of each reason. Rows that already have the three columns
    are checked and stay as they are. `vocab_size` is the number of the model's embeddings; None leaves ids unchecked.
    `template_date` is the date that chat templates print. With None it is today's, and a later run has other ids.
    `num_proc` is for map-style datasets and `main_process_first` a context in which the other processes wait for the
    cache.

    Raises `ValueError`, before any row is trained on, for an empty dataset, one without a usable row, missing columns,
    and a malformed row (by its number, counted from 0). A stream raises for a malformed row when it reads it.
    """
    check_truncation(max_length, truncation_mode)
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"the {name} dataset must be a `datasets.Dataset` or `IterableDataset`; found {type(dataset).__name__}. "
            'Choose a split (`dataset["train"]`), or make one with `Dataset.from_list(rows)`.'
        )
    dataset = _unformatted(dataset)
    is_conversational = _check_first_row(dataset, processing_class, name)
    is_dated = is_conversational and prints_date(processing_class)
    add_ids = _AddIds(
        processing_class=processing_class,
        name=name,
        template_date=template_date if is_dated else None,  # where no date is printed, it is no part of the cache key
    )
    judge = _Judge(max_length=max_length, truncation_mode=truncation_mode, vocab_size=vocab_size, name=name)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, add_ids, judge)
    with main_process_first or nullcontext():
        dataset = _with_ids(dataset, add_ids, num_proc)
        return _usable(dataset, judge, num_proc)


class PreparationOptions(Protocol):
    """The options of a run (`DPOConfig`) that say how its datasets are prepared."""

    max_length: int | None
    truncation_mode: Any
    dataset_num_proc: int | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How all datasets of a run are prepared; see `prepare_dataset` for what each value means."""

    processing_class: PreTrainedTokenizerBase
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    num_proc: int | None = None
    vocab_size: int | None = None
    template_date: str | None = None

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
            max_length=options.max_length,
            truncation_mode=options.truncation_mode,
            num_proc=options.dataset_num_proc,
            vocab_size=vocab_size,
            template_date=template_date,
        )

    def of(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        """What `prepare_dataset` returns for a dataset of this name."""
        return prepare_dataset(
            dataset,
            self.processing_class,
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
            num_proc=self.num_proc,
            vocab_size=self.vocab_size,
            template_date=self.template_date,
            name=name,
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


def _check_first_row(dataset: Dataset | IterableDataset, processing_class: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the completions of the first row are messages. Raises what would be wrong with every row, before a
    progress bar is shown."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(
            f"the {name} dataset has no rows; at least one pair is needed. Check the file or the split it comes from."
        )
    try:
        kind = check_columns(first)
    except ValueError as error:
        raise ValueError(f"{name} dataset: {error}") from error
    if isinstance(dataset, IterableDataset) and REFERENCE_COLUMNS[0] in first:
        raise ValueError(
            f"the {name} dataset is a stream and brings reference log-probs along, in the columns "
            f"{list(REFERENCE_COLUMNS)}, which can only be used where they are compared before training. Drop these "
            "columns, or load it whole."
        )
    is_conversational = kind != "tokenized" and isinstance(first["chosen"], list)
    if kind != "tokenized":
        check_tokenizer(processing_class, is_conversational=is_conversational)
    return is_conversational


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _AddIds:
    """The first row function: adds token ids. Its values are the cache key of `datasets`, beside the rows."""

    processing_class: PreTrainedTokenizerBase
    name: str
    template_date: str | None
    rules: int = TOKENIZATION_RULES

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The token ids of a row, which a tokenized row has already, and the prompt ids that were cut. An implicit
        prompt becomes a column, which callbacks that generate look for."""
        try:
            kind = check_columns(row)
            if kind == "tokenized":
                return {**{column: row[column] for column in TOKENIZED_COLUMNS}, _CUT: []}
            preference = read_preference(row)
            pair = tokenize(preference, self.processing_class, self.template_date)
        except ValueError as error:
            raise ValueError(f"{self.name} dataset, row {index}: {error}") from error
        ids = {column: getattr(pair, column) for column in TOKENIZED_COLUMNS}
        split: dict[str, Any] = {}
        if kind == "implicit":
            length = len(preference.prompt)
            split = {"prompt": row["chosen"][:length], **{side: row[side][length:] for side in ("chosen", "rejected")}}
        return {**split, **ids, _CUT: pair.cut_ids}

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return str(self.processing_class.decode(ids))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """The second row function: judges a tokenized row."""

    max_length: int | None
    truncation_mode: TruncationMode
    vocab_size: int | None
    name: str

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, str | None]:
        """Why the row cannot be used, or None. Raises `ValueError` for columns that do not hold token ids."""
        pair = TokenizedPair(
            prompt_ids=self._checked_ids(row[PROMPT_IDS], PROMPT_IDS, index),
            chosen_ids=self._checked_ids(row[CHOSEN_IDS], CHOSEN_IDS, index),
            rejected_ids=self._checked_ids(row[REJECTED_IDS], REJECTED_IDS, index),
            cut_ids=[],
        )
        return {_REASON: unusable_reason(pair, self.max_length, self.truncation_mode)}

    def _checked_ids(self, value: Any, column: str, index: int) -> Any:
        ids = np.asarray([] if value is None else value)
        if value is None or ids.ndim != 1 or (ids.size > 0 and ids.dtype.kind not in "iu"):
            found = "None" if value is None else f"{type(value).__name__} {str(value)[:60]}"
            raise ValueError(
                f"{self.name} dataset, row {index}: the column {column!r} must hold a list of token ids; found "
                f"{found}. Correct the row or drop it."
            )
        if ids.size > 0 and (ids.min() < 0 or (self.vocab_size is not None and ids.max() >= self.vocab_size)):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            limit = "at least 0" if self.vocab_size is None else f"in 0..{self.vocab_size - 1}, the model's vocabulary"
            raise ValueError(
                f"{self.name} dataset, row {index}: the token ids in the column {column!r} must be {limit}; found "
                f"{wrong}. Tokenize with the tokenizer of the model, or call "
                "`model.resize_token_embeddings(len(tokenizer))`."
            )
        return ids


def _with_ids(dataset: Dataset, add_ids: _AddIds, num_proc: int | None) -> Dataset:
    """The dataset with token ids. Warns once, with numbers, where a prompt is not a prefix of the full texts."""
    if set(TOKENIZED_COLUMNS) <= set(dataset.column_names) and dataset.format["type"] is None:
        return dataset
    features = None  # unknown under a user's own transform
    if dataset.format["type"] is None:
        columns = dataset.features  # stated, since `datasets` would infer no type from a first batch of empty prompts
        prompt = {"prompt": columns["chosen"]} if "prompt" not in columns and "chosen" in columns else {}
        features = Features({**columns, **prompt, **dict.fromkeys((*TOKENIZED_COLUMNS, _CUT), _IDS_TYPE)})
    dataset = dataset.map(
        add_ids,
        with_indices=True,
        features=features,
        num_proc=num_proc,
        desc=f"Tokenizing {add_ids.name} dataset",
    ).with_format(None)
    cut_rows = [index for index, cut in enumerate(dataset[_CUT][:]) if cut]
    if cut_rows:
        first = cut_rows[0]
        where = f"in {share(len(cut_rows), len(dataset))} of the {add_ids.name} dataset"
        _warn(prompt_is_cut(where, add_ids.decode(dataset[first][_CUT]), f"row {first}"))
    return dataset.remove_columns(_CUT)


def _usable(dataset: Dataset, judge: _Judge, num_proc: int | None) -> Dataset:
    """The usable rows. Warns of the others by reason, and raises `ValueError` if there are no usable ones."""
    verdicts = dataset.select_columns(list(TOKENIZED_COLUMNS)).map(
        judge,
        with_indices=True,
        remove_columns=list(TOKENIZED_COLUMNS),
        features=Features({_REASON: Value("string")}),
        num_proc=num_proc,
        desc=f"Checking {judge.name} dataset",
    )
    reasons = verdicts[_REASON][:]
    unusable: dict[str, list[int]] = {}
    for index, reason in enumerate(reasons):
        if reason is not None:
            unusable.setdefault(reason, []).append(index)
    if not unusable:
        return dataset
    counts = {reason: len(rows) for reason, rows in unusable.items()}
    if sum(counts.values()) == len(dataset):
        raise ValueError(nothing_usable(counts, judge.max_length, judge.truncation_mode, judge.name))
    _warn(some_unusable(unusable, len(dataset), judge.max_length, judge.name))
    return dataset.select([index for index, reason in enumerate(reasons) if reason is None])


def _prepare_stream(dataset: IterableDataset, add_ids: _AddIds, judge: _Judge) -> IterableDataset:
    """The stream of usable rows. Raises `ValueError` if it has none, which is known once the first one is found."""
    row_function = _AddIdsAndVerdict(add_ids=add_ids, judge=judge)
    counts: Counter[str] = Counter()
    for index, row in enumerate(dataset):
        reason = row_function(row, index)[_REASON]
        if reason is None:
            break
        counts[reason] += 1
    else:
        raise ValueError(nothing_usable(counts, judge.max_length, judge.truncation_mode, judge.name))
    report = _StreamReport(add_ids, judge)
    return (
        dataset.map(row_function, with_indices=True).filter(report, with_indices=True).remove_columns([_CUT, _REASON])
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _AddIdsAndVerdict:
    """The row function of a stream: both of the others."""

    add_ids: _AddIds
    judge: _Judge

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        ids = self.add_ids(row, index)
        return {**ids, **self.judge(ids, index)}


@final
class _StreamReport:
    """True for a usable row of a stream; counts and reports the others. Each data loader worker has its own counts."""

    def __init__(self, add_ids: _AddIds, judge: _Judge) -> None:
        self._add_ids = add_ids
        self._judge = judge
        self._counts: Counter[str] = Counter()
        self._has_warned_of_cut = False

    def __call__(self, row: Mapping[str, Any], index: int) -> bool:
        name = self._judge.name
        if len(row[_CUT]) > 0 and not self._has_warned_of_cut:
            self._has_warned_of_cut = True
            where = f"in at least one row of the {name} dataset"
            _warn(prompt_is_cut(where, self._add_ids.decode(row[_CUT]), f"row {index}"))
        reason = row[_REASON]
        if reason is None:
            return True
        self._counts[reason] += 1
        count = self._counts[reason]
        is_power_of_ten = set(str(count)[1:]) <= {"0"} and str(count)[0] == "1"
        if is_power_of_ten:
            _warn(
                f"{count} row(s) of the {name} dataset could not be used so far and were left out "
                f"({reason}; the latest: row {index}). Said at the 1st, 10th, 100th, ... such row of this process. "
                f"{remedy({reason: count}, self._judge.max_length)}"
            )
        return False


def _warn(message: str) -> None:
    """Logged by the first process only: every process sees the same rows of a map-style dataset."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)
