"""What the first rows of a dataset say of all: how rows are read, and whether they hold messages. What would be wrong
with every row is found here, before a progress bar is shown. Of a mixture, each source has first rows of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from holdfast.data.columns import REFERENCE_COLUMNS
from holdfast.data.dates import has_messages
from holdfast.data.files.places import Places
from holdfast.data.formats import check_columns, is_any_message
from holdfast.data.mixing.mixture import mixture_of
from holdfast.data.reading.rules import NO_RULES, RowRules, contradicting_scores, rules_of, unread_columns
from holdfast.data.shapes.mapping import ColumnMapping
from holdfast.data.tokenize import check_tokenizer


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FirstRows:
    """The rules by which rows are read, of a mixture also by source, and whether some rows hold messages."""

    rules: RowRules
    rules_of_sources: Mapping[str, RowRules] | None
    has_messages: bool


def read_first_rows(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    columns: ColumnMapping | None,
    name: str,
    places: Places | None,
    warn: Callable[[str], None],
) -> FirstRows:
    """What the first rows of the dataset `name` say, whose columns were taken as `columns` says. Raises ValueError for
    what would be wrong with every row; `warn` gets what is not read of them."""
    rows: Any = dataset
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(
            f"the {name} dataset has no rows; at least one pair is needed. Check the file or the split it comes from."
        )
    try:
        kind = check_columns(first)
    except ValueError as error:
        place = places.of(0, first) if places is not None else None
        raise ValueError(f"{name} dataset{f' ({place})' if place else ''}: {error}") from error
    if isinstance(dataset, IterableDataset) and REFERENCE_COLUMNS[0] in first:
        raise ValueError(
            f"the {name} dataset is a stream and brings reference log-probs along, in the columns "
            f"{list(REFERENCE_COLUMNS)}, which can only be used where they are compared before training. Drop these "
            "columns, or load it whole."
        )
    if kind == "tokenized":
        return FirstRows(rules=NO_RULES, rules_of_sources=None, has_messages=False)
    row_rules = rules_of(rows, name)
    if unread := unread_columns(first):
        warn(
            f"The {name} dataset has the column(s) {unread}, which are not read: what they hold is no part of the "
            f"prompt. Write `columns: {{{unread[0].partition('_')[0]}: {unread[0]}}}` to have them read, or drop them."
        )
    if (scores := contradicting_scores(rows)) is not None:
        chosen, rejected, count, total = scores
        warn(
            f"The scores in {chosen!r} are below those in {rejected!r} in {count} of the first {total} rows of the "
            f"{name} dataset. If the completions are swapped, write `columns: {{chosen: rejected, rejected: chosen}}`."
        )
    has_any = is_any_message(first, row_rules)
    check_tokenizer(processing_class, is_conversational=has_any)
    mixture = mixture_of(dataset)
    if mixture is None:
        return FirstRows(rules=row_rules, rules_of_sources=None, has_messages=has_any)
    has_any = has_any or has_messages(dataset, columns)  # the first row may be text, and others messages
    of_sources = None
    if columns is None:
        sources: Mapping[str, Any] = mixture.sources
        of_sources = {source: rules_of(each, f"{name} (source {source!r})") for source, each in sources.items()}
    return FirstRows(rules=row_rules, rules_of_sources=of_sources, has_messages=has_any)
