"""A dataset of another shape -> the same dataset with the columns that holdfast reads: `with_columns`.

Rows keep their order and their numbers, so that an error about a row names the row of the file. A row without a pair
(its scores tie) has the same answer on both sides, which leaves it out later; such rows are counted and said. Where
only names change, columns are renamed and nothing is written. Otherwise one pass writes the new columns, which is kept
in the cache of `datasets`.

Columns from which something was taken are gone afterwards; all others stay.
"""

import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, final

from datasets import Dataset, Features, IterableDataset, Json, List, Value

from holdfast.data.columns import TOKENIZED_COLUMNS, TOOLS
from holdfast.data.files.places import keep_places
from holdfast.data.rendering.nulls import field_type, item_type, message_as_written
from holdfast.data.row_error import RowError
from holdfast.data.shapes.mapping import ColumnMapping, Plan, plan
from holdfast.data.shapes.paths import EVERY, Steps
from holdfast.data.shapes.row import RowConverter
from holdfast.data.usability import share

logger = logging.getLogger(__name__)

CONVERSION_RULES = 1
"""Part of the cache key: raise it when the same row is converted to another, so that no older cache is used."""

_NO_PAIR = "holdfast_no_pair"
_SIDES = ("prompt", "chosen", "rejected")


def with_columns(
    dataset: Dataset | IterableDataset, columns: ColumnMapping, *, name: str = "train", num_proc: int | None = None
) -> Dataset | IterableDataset:
    """The dataset with holdfast's columns, taken as `columns` says (see `holdfast.data.shapes.mapping`). A dataset that
    has token ids already stays as it is.

    Raises `ValueError` for a mapping that cannot be, for a column that there is not (with the nearest), and for a row
    that does not hold what is mapped, by its number; a stream raises for a row when it reads it.
    """
    first = next(iter(dataset), None)
    if first is None or set(TOKENIZED_COLUMNS) <= set(first):
        return dataset
    try:
        found = plan(columns, list(first))
    except ValueError as error:
        raise ValueError(f"{name} dataset: {error}") from error
    if isinstance(dataset, IterableDataset):
        converted = dataset.map(
            ConvertRow(plan=found, name=name, says_ties=True, types={}),
            with_indices=True,
            remove_columns=_taken(found, first),
        ).remove_columns([_NO_PAIR])
    elif (names := found.renames) is not None and dataset.format["type"] is None:
        left = [column for column in dataset.column_names if column in _replaced(found) and column not in names]
        converted = dataset.remove_columns(left).rename_columns(names)
    else:
        converted = _mapped(dataset, found, name, num_proc)
    keep_places(converted, dataset)
    return converted


@final
class ConvertRow:
    """The function that converts a row. What it is made of is the cache key of `datasets`, beside the rows. For a
    stream it warns of the first row that has no pair (`says_ties`). `types` are those of the messages in columns of the
    pair, from which what Arrow has added is taken out, since what is stored as JSON counts as written."""

    def __init__(
        self, *, plan: Plan, name: str, says_ties: bool, types: Mapping[str, Any], rules: int = CONVERSION_RULES
    ) -> None:
        self._key = {"plan": plan, "name": name, "says_ties": says_ties, "types": types, "rules": rules}
        self._types = types
        self._convert = RowConverter(plan=plan)
        self._name = name
        self._says_ties = says_ties

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ConvertRow, **self._key), ()

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            converted = self._convert(row)
        except ValueError as error:
            raise RowError(self._name, index, str(error)) from error
        if self._says_ties and converted.no_pair is not None:
            self._says_ties = False
            _warn_of_ties(self._name, "at least one row", converted.no_pair, index)
        columns = {
            name: _as_written(value, self._types[name], row.get(TOOLS)) if name in self._types else value
            for name, value in converted.columns.items()
        }
        return {**columns, _NO_PAIR: converted.no_pair}


def _mapped(dataset: Dataset, found: Plan, name: str, num_proc: int | None) -> Dataset:
    """The dataset with columns written anew. Warns of rows that have no pair."""
    is_plain = dataset.format["type"] is None
    taken = _taken(found, dataset.features)
    converted = dataset.map(
        ConvertRow(plan=found, name=name, says_ties=False, types=_types(dataset.features, found) if is_plain else {}),
        with_indices=True,
        remove_columns=taken,
        features=_features(dataset.features, found, taken) if is_plain else None,
        num_proc=num_proc,
        desc=f"Reading the columns of the {name} dataset",
    ).with_format(None)
    ties = [(row, reason) for row, reason in enumerate(converted[_NO_PAIR]) if reason is not None]
    if ties:
        row, reason = ties[0]
        _warn_of_ties(name, share(len(ties), len(converted)), reason, row)
    return converted.remove_columns([_NO_PAIR])


def _as_written(messages: Any, feature: Any, tools: Any) -> Any:
    """Messages of a column whose messages have this type, without what Arrow has added to them."""
    if not isinstance(messages, list):
        return messages
    known = [tool for tool in tools if isinstance(tool, Mapping)] if isinstance(tools, list) else None
    return [
        message_as_written(message, feature, known) if isinstance(message, Mapping) else message for message in messages
    ]


def _types(features: Features, found: Plan) -> dict[str, Any]:
    """The types of the messages that become those of each column of the pair; None where it is not known."""
    of_all = found.where.get("responses") or found.where.get("prompt_and_chosen") or ()
    types = {}
    for side in _SIDES:
        steps = found.where.get(side, of_all)
        types[side] = item_type(_type_at(features, steps[0])) if steps else None
        if side not in found.where and "responses" in found.where and "responses" not in found.is_several:
            types[side] = item_type(types[side])  # a list of answers, each a list of messages
    return types


def _features(features: Features, found: Plan, taken: list[str]) -> Features:
    """The types of the columns. Those of a pair are stated, since `datasets` would infer them from the first rows."""
    left = {column: feature for column, feature in features.items() if column not in taken}
    is_text = not found.as_messages and not found.dialogues
    new: dict[str, Any] = {}
    for column in RowConverter(plan=found).columns:
        steps = found.where.get(column, found.where.get("responses", ()))
        types = [features[str(each[0])] for each in steps if len(each) == 1]
        if column in _SIDES:
            has_text = is_text and len(types) == len(steps) and all(kind == Value("string") for kind in types)
            new[column] = Value("string") if has_text else Json()
        else:
            new[column] = _type_at(features, steps[0]) or Json()
    return Features({**left, **new, _NO_PAIR: Value("string")})


def _type_at(features: Mapping[str, Any], steps: Steps) -> Any:
    """The type of what is at a place; None where it is not known. Of a `*`, that of the list of what it finds."""
    found: Any = features.get(str(steps[0]))
    for number, step in enumerate(steps[1:], 1):
        if step == EVERY:
            return List(inner) if (inner := _type_at({"": item_type(found)}, ("", *steps[number + 1 :]))) else None
        found = item_type(found) if isinstance(step, int) else field_type(found, step)
    return found


def _taken(found: Plan, columns: Mapping[str, Any]) -> list[str]:
    """The columns from which something is taken, and those that the new ones replace."""
    sources = {str(steps[0]) for several in found.where.values() for steps in several}
    return [column for column in columns if column in sources or column in _replaced(found)]


def _replaced(found: Plan) -> set[str]:
    """Columns of the pair that are left out where they come from nowhere, and new ones."""
    return {*_SIDES, *RowConverter(plan=found).columns}


def _warn_of_ties(name: str, where: str, reason: str, row: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"There is no pair in {where} of the {name} dataset: {reason} in row {row}. Nothing can be learned from "
            "such a row; it has the same answer on both sides, and is left out."
        )
