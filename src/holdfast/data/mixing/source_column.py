"""The column `source` of an evaluation set: how it travels with the pairs of a batch, and when it is not used.

It is no model input, and no layout knows it. A collator of its own wraps the run's data collator: beside what that
returns, a batch gets the names of the sources it holds, in host memory, and for each pair the place of its source's
name among these, as a small tensor. So nothing waits for the device, processes need not agree on numbers for names, and
a user's own data collator works as well. Given up: a collator that returns other pairs than those of its rows.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from datasets import Dataset, IterableDataset, Value

from holdfast.batch import HOST_SOURCES, PAIR_SOURCES, HostSources
from holdfast.data.columns import SOURCE

NO_SOURCE = "(none)"
"""The name that rows without a source have."""

NOT_TEXT = "\0"
"""The name that stands for all sources of a column that is not text."""

MAX_SOURCES = 50
"""Metrics are given by source where a dataset has at most so many."""

_TEXT = {"string", "large_string", "null"}
_READ_ROWS = 10_000


@final
@dataclass(frozen=True, slots=True)
class WithSources:
    """A data collator: what `collator` makes of the rows, and the sources of the pairs, if the rows have the column. A
    column `source` of something else than text is the one source `NOT_TEXT`. `keeps_column` leaves the column to
    `collator`.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    keeps_column: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        found = [row.get(SOURCE) for row in rows] if any(SOURCE in row for row in rows) else []
        bare = rows if self.keeps_column else [_without_source(row) for row in rows]
        batch = self.collator([*bare])  # type: ignore[arg-type]
        if not found:
            return batch
        is_text = all(value is None or isinstance(value, str) for value in found)
        sources = [(value or NO_SOURCE) if is_text else NOT_TEXT for value in found]
        names = tuple(dict.fromkeys(sources))
        places = tuple(names.index(source) for source in sources)
        return {**batch, HOST_SOURCES: HostSources(names=names, places=places), PAIR_SOURCES: torch.tensor(places)}


def _without_source(row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column != SOURCE}


def may_have_sources(dataset: Any) -> bool:
    """Whether rows of the dataset may have a source. The columns of a stream are not known before it is read."""
    if isinstance(dataset, Dataset):
        return SOURCE in dataset.column_names
    return isinstance(dataset, torch.utils.data.IterableDataset | IterableDataset)


def pairs_by_source(dataset: Any) -> dict[str, int] | None:
    """The number of rows of each source of a dataset, by name; None for a stream, a dataset whose rows have no source,
    and one whose column `source` is not text."""
    if not isinstance(dataset, Dataset) or SOURCE not in dataset.column_names or _not_text(dataset) is not None:
        return None
    counts: Counter[str] = Counter()
    rows: Any = dataset.select_columns([SOURCE]).with_format("arrow")
    for table in rows.iter(_READ_ROWS):
        for entry in table[SOURCE].combine_chunks().value_counts():
            counts[entry["values"].as_py() or NO_SOURCE] += entry["counts"].as_py()
    return dict(sorted(counts.items())) if are_sources(counts) else None


def are_sources(names: Collection[str]) -> bool:
    """Whether any row has a source."""
    return not set(names) <= {NO_SOURCE}


def sources_with_metrics(dataset: Any) -> dict[str, int]:
    """The sources of a dataset that an evaluation gives metrics of, with their numbers of rows; none for a stream,
    which is not read."""
    sources = pairs_by_source(dataset) or {}
    return sources if len(sources) <= MAX_SOURCES else {}


def left_out_by_source(dataset: Dataset, usable: Dataset) -> str:
    """How many rows of each source were left out, in a sentence; empty for a dataset without sources."""
    before, after = sources_with_metrics(dataset), pairs_by_source(usable) or {}
    parts = [
        f"{f'all {count}' if name not in after else f'{count - after[name]} of {count}'} of {name!r}"
        for name, count in before.items()
        if count != after.get(name)
    ]
    return f" By source: {', '.join(parts)}." if parts else ""


def why_not_by_source(dataset: Any) -> str | None:
    """Why the column `source` of a dataset is not used, in a clause that begins with a verb; None where it is. Of a
    stream nobody knows before it is read."""
    if not isinstance(dataset, Dataset):
        return None
    not_text = _not_text(dataset)
    return not_text if not_text is not None else _too_many(len(pairs_by_source(dataset) or ()))


def why_not_these(sources: Collection[str]) -> str | None:
    """The same of the sources that an evaluation has met."""
    return "is not text" if NOT_TEXT in sources else _too_many(len(sources))


def _not_text(dataset: Dataset) -> str | None:
    feature = dataset.features[SOURCE]
    if isinstance(feature, Value) and feature.dtype in _TEXT:
        return None
    return f"is {feature.dtype if isinstance(feature, Value) else type(feature).__name__} and not text"


def _too_many(count: int) -> str | None:
    if count <= MAX_SOURCES:
        return None
    return f"has more than {MAX_SOURCES} different texts"
