"""Several datasets -> one, a mixture, whose text column `source` names the dataset that each row comes from.

What a weight means is in `shares`. The rows of map-style datasets are drawn here, so that shares are exact; streams,
which have no length, are drawn from by `datasets.interleave_datasets`, so that shares are right on average. Both follow
from the seed alone: every process and a resumed run have the same mixture. The order in which sources are named does
not matter, and which rows are taken of one does not depend on the others' rows.

A row stays what it is, whatever the other sources look like. Given up: copying nothing. A map-style source whose
columns have other types than the mixture's is written into the cache of `datasets` again, and a stream's rows go
through JSON.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary
from zlib import crc32

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets

from holdfast.data.columns import ORIGINAL_SOURCE, SOURCE, SOURCE_ROW
from holdfast.data.files.places import Places, places_of, remember
from holdfast.data.mixing.common_features import check_kinds, row_as_written, with_common_features
from holdfast.data.mixing.shares import Stopping, check_stopping, check_weights, counted, rows_of_sources
from holdfast.data.row_error import RowError

logger = logging.getLogger(__name__)

AnyRows = Dataset | IterableDataset

_ROW = "holdfast_row"
_ROW_AS_TEXT = Features({_ROW: Value("string"), SOURCE: Value("string"), SOURCE_ROW: Value("int64")})


def mix(
    sources: Mapping[str, AnyRows],
    *,
    weights: Mapping[str, float] | None = None,
    seed: int = 42,
    stopping: Stopping | None = None,
) -> AnyRows:
    """The mixture of the datasets `sources`, by name, with the name in a text column `source`; a stream if one of them
    is a stream.

    Without `weights` every row is there once. A weight is the source's share of the pairs, in proportion to the other
    weights and whatever the numbers of rows: with 3 and 1 three of four pairs come from the first. A source with the
    weight 0 is left out. With `stopping="first_exhausted"` (the default) a mixture ends before a row would come twice,
    so that of some sources only a part is taken, drawn by `seed`. With "all_exhausted" it ends when every row has come,
    and rows of other sources come again. Rows are shuffled by `seed`. What is taken of each source is said.

    Columns may be unlike: messages here and text there, `tools` or a prompt in some only, objects of other keys. A
    column that a source lacks is None. A source's own column `source` becomes `original_source`. Rows of a stream have
    their number in the source as `source_row`.

    Raises TypeError for what is no dataset, and ValueError for a source without a name or a row, weights that cannot
    be, and sources of which some are tokenized or bring reference log-probs along, and others do not.
    """
    _check_sources(sources)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r} was asked for; it is a whole number of at least 0, by which rows are drawn.")
    check_weights(sources, weights)
    check_stopping(stopping, weights)
    until: Stopping = stopping or "first_exhausted"
    sources = {name: sources[name] for name in sorted(sources) if weights is None or weights[name]}
    weights = None if weights is None else {name: float(weights[name]) for name in sources}
    check_kinds({name: dataset.column_names for name, dataset in sources.items() if dataset.column_names})
    if any(isinstance(dataset, IterableDataset) for dataset in sources.values()):
        mixture, places = _mixed_streams(sources, weights, seed, until)
    else:
        mixture, places = _mixed_rows(sources, weights, seed, until)
    remember(mixture, places)
    _MIXTURES[mixture] = Mixture(
        sources=sources,
        digest=_digest({"weights": weights, "sources": [*sources], "seed": seed, "stopping": until}),
    )
    return mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The sources that a mixture was made of, by name. `digest` is that of their names and weights, and of how it was
    drawn."""

    sources: Mapping[str, AnyRows]
    digest: str


_MIXTURES: WeakKeyDictionary[AnyRows, Mixture] = WeakKeyDictionary()


def mixture_of(dataset: Any) -> Mixture | None:
    """What the dataset is a mixture of; None for one that is none, or that was changed since."""
    return _MIXTURES.get(dataset) if isinstance(dataset, Dataset | IterableDataset) else None


def keep_mixture(dataset: AnyRows, of: AnyRows) -> None:
    """Notes that `dataset` is the mixture that `of` is, if it is one, with columns added."""
    if (mixture := mixture_of(of)) is not None:
        _MIXTURES[dataset] = mixture


def first_rows(dataset: AnyRows) -> Iterator[Mapping[str, Any]]:
    """The first row of a dataset; of a mixture, that of each of its sources."""
    mixture = mixture_of(dataset)
    for each in [dataset] if mixture is None else mixture.sources.values():
        yield from [next(iter(each), None) or {}] if mixture is None else first_rows(each)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_sources(sources: Any) -> None:
    if not isinstance(sources, Mapping) or not sources:
        raise TypeError(
            f"a mixture is made of a dict of datasets by name; found {type(sources).__name__} "
            f"{'without any' if isinstance(sources, Mapping) else ''}. Write mix({{'help': dataset, ...}})."
        )
    for name, dataset in sources.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a source of a mixture needs a name, which is text; found {name!r}. Name it.")
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"the source {name!r} must be a `datasets.Dataset` or `IterableDataset`; found "
                f'{type(dataset).__name__}. Choose a split (`dataset["train"]`), or make one with '
                "`Dataset.from_list(rows)`."
            )
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            raise ValueError(
                f"the rows of the source {name!r} are made by a transform when they are read, so nobody knows its "
                "columns. Make them with `dataset.map(...)` instead, and mix that."
            )
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"the source {name!r} has no rows. Check the file or the split it comes from.")
        if {SOURCE, ORIGINAL_SOURCE} <= set(dataset.column_names or ()):
            raise ValueError(
                f"the source {name!r} has the columns {SOURCE!r} and {ORIGINAL_SOURCE!r}, and the first would get the "
                "name of the second. Rename or drop one of them."
            )


# Map-style datasets -------------------------------------------------------------------------------------------------


def _mixed_rows(
    sources: Mapping[str, Any], weights: Mapping[str, float] | None, seed: int, stopping: Stopping
) -> tuple[Dataset, Places]:
    places = {name: places_of(dataset) for name, dataset in sources.items()}
    lengths = {name: len(dataset) for name, dataset in sources.items()}
    counts = rows_of_sources(lengths, weights, stopping)
    number, rows = _drawn(lengths, counts, seed)
    alike = with_common_features({name: _plain(dataset) for name, dataset in sources.items()}, places)
    parts = [dataset.add_column(SOURCE, [name] * len(dataset)) for name, dataset in alike.items()]
    starts = np.cumsum([0, *lengths.values()])[:-1]
    mixture = concatenate_datasets(parts).select((starts[number] + rows).tolist())
    _say(counted(lengths, counts, weights))
    return mixture, _MixedPlaces(names=tuple(sources), places=tuple(places.values()), number=number, rows=rows)


def _plain(dataset: Dataset) -> Dataset:
    dataset = dataset.with_format(None)
    return dataset.rename_column(SOURCE, ORIGINAL_SOURCE) if SOURCE in dataset.column_names else dataset


def _drawn(lengths: Mapping[str, int], counts: Mapping[str, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of the mixture, the number of its source and its number in it."""
    each = []
    for name, length in lengths.items():
        draw = np.random.default_rng([seed, crc32(name.encode())])
        passes = [draw.permutation(length) for _ in range(-(-counts[name] // length))]
        each.append(np.concatenate(passes)[: counts[name]])
    number = np.repeat(np.arange(len(each)), [len(rows) for rows in each])
    order = np.random.default_rng([seed]).permutation(len(number))
    return number[order], np.concatenate(each)[order]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _MixedPlaces:
    """Where the rows of a mixture come from: `number` is that of a row's source, `rows` its number in there."""

    names: tuple[str, ...]
    places: tuple[Places | None, ...]
    number: np.ndarray
    rows: np.ndarray

    def of(self, row: int, values: Mapping[str, Any] | None = None) -> str | None:
        """`source 'help', pairs.jsonl, line 7`; the row's number in the source, where that was loaded from no file."""
        if not 0 <= row < len(self.number):
            return None
        source = int(self.number[row])
        return _place(self.names[source], int(self.rows[row]), self.places[source])


def _place(name: str, row: int, places: Places | None) -> str:
    place = places.of(row) if places is not None else None
    return f"source {name!r}, {place or f'row {row}'}"


# Streams ------------------------------------------------------------------------------------------------------------


def _mixed_streams(
    sources: Mapping[str, Any], weights: Mapping[str, float] | None, seed: int, stopping: Stopping
) -> tuple[IterableDataset, Places]:
    places = {name: places_of(dataset) for name, dataset in sources.items()}
    streams = [_as_text(dataset, name) for name, dataset in sources.items()]
    if weights is None:
        mixture = interleave_datasets(streams, stopping_strategy="all_exhausted_without_replacement")
        _say(f"the mixture is a stream of {', '.join(map(repr, sources))}: every row of each, in turns")
    else:
        total = sum(weights.values())
        shares = {name: weight / total for name, weight in weights.items()}
        mixture = interleave_datasets(
            streams, probabilities=[*shares.values()], seed=seed, stopping_strategy=stopping
        )  # fmt: skip
        of_each = ", ".join(f"{name!r} {100 * share:.3g} %" for name, share in shares.items())
        _say(f"the mixture is a stream, of whose rows on average come from {of_each}")
    return mixture.map(_row_of_text, remove_columns=[_ROW]), _StreamPlaces(places=places)


def _as_text(dataset: Any, name: str) -> IterableDataset:
    """A stream of the rows as text, so that those of all sources have the same columns."""
    stream = dataset if isinstance(dataset, IterableDataset) else dataset.with_format(None).to_iterable_dataset()
    as_text = _TextOfRow(name=name, features=stream.features)
    return stream.map(as_text, with_indices=True).select_columns([*_ROW_AS_TEXT]).cast(_ROW_AS_TEXT)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _TextOfRow:
    """A row of a source with these types as JSON text, with its source."""

    name: str
    features: Features | None

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        columns = {ORIGINAL_SOURCE if column == SOURCE else column: value for column, value in row.items()}
        columns = row_as_written(columns, self.features)
        try:
            text = json.dumps(columns)
        except (TypeError, ValueError) as error:
            column = next(column for column, value in columns.items() if not _is_json(value))
            raise RowError(
                repr(self.name),
                index,
                f"the column {column!r} holds {type(columns[column]).__name__} that is neither text, number, list nor "
                "object, which a mixture of streams cannot carry. Drop the column with `remove_columns`.",
            ) from error
        return {_ROW: text, SOURCE: self.name, SOURCE_ROW: index}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _row_of_text(row: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(row[_ROW])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _StreamPlaces:
    """Where the rows of a mixture of streams come from, which their columns `source` and `source_row` say."""

    places: Mapping[str, Places | None]

    def of(self, row: int, values: Mapping[str, Any] | None = None) -> str | None:
        """As `_MixedPlaces.of`."""
        if values is None or values.get(SOURCE) not in self.places:
            return None
        return _place(values[SOURCE], values[SOURCE_ROW], self.places[values[SOURCE]])


def _say(message: str) -> None:
    """Logged by the first process only: every process makes the same mixture."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)
