"""Datasets of unlike columns -> datasets that can be put together, in which each row still is what it was.

A column that holds messages here and text there, or objects of other keys, becomes a column of `Json`, as in a file
that mixes them. A column that is missing is None. One thing is not the same with None as without the column: the
prompt. So where only some datasets have the column `prompt`, the others' prompts are taken out of both completions.

Given up: widening objects by the keys of others, since a template may ask whether a key is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import pyarrow as pa
from datasets import Dataset, Features, Json, LargeList, List, Value

from holdfast.data.columns import PROMPT_IDS, REFERENCE_COLUMNS, TEXT_COLUMNS, TOKENIZED_COLUMNS, TOOLS
from holdfast.data.files.shapes import table_of
from holdfast.data.formats import check_columns, read_preference
from holdfast.data.rendering.nulls import message_as_written, tools_as_written, type_of_messages
from holdfast.data.row_error import RowError, naming_places

_NULL = Value("null")
_READ = (*TEXT_COLUMNS, TOOLS)


def common_features(each: Sequence[Features]) -> Features:
    """The columns of all of these, each of a type that holds what all have in it."""
    columns: dict[str, Any] = {}
    for features in each:
        for name, feature in features.items():
            columns[name] = common_feature(columns[name], feature) if name in columns else feature
    return Features(columns)


def common_feature(one: Any, other: Any) -> Any:
    """A type that holds what is in columns of both, with nothing added: `Json` where no narrower one does."""
    if one == other or other == _NULL:
        return one
    if one == _NULL:
        return other
    if isinstance(one, Value) and isinstance(other, Value):
        return _common_value(one.dtype, other.dtype)
    if isinstance(one, List | LargeList) and isinstance(other, List | LargeList):
        return List(common_feature(one.feature, other.feature))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        are_null = [(one[key] == _NULL) != (other[key] == _NULL) for key in one]
        if not any(are_null):  # a None that all rows of a column have was written; beside values it may have been added
            return {key: common_feature(feature, other[key]) for key, feature in one.items()}
    return Json()


def _common_value(one: str, other: str) -> Any:
    kinds = {_kind(one), _kind(other)}
    if kinds == {"text"}:
        return Value("string")
    if kinds == {"int"} and "uint64" not in (one, other):
        return Value("int64")
    if kinds <= {"int", "float"}:
        return Value("float64")
    return Json()


def _kind(dtype: str) -> str:
    if dtype in ("string", "large_string"):
        return "text"
    return next((kind for kind in ("int", "float") if dtype.removeprefix("u").startswith(kind)), dtype)


def check_kinds(each: Mapping[str, Sequence[str]]) -> None:
    """ValueError where a dataset with these columns is not one of preferences, though others are, and where some have
    columns that cannot be None in the rows of the others: token ids or reference log-probs."""
    problems = {name: problem for name, columns in each.items() if (problem := _problem(columns))}
    if len(problems) < len(each):
        for name, problem in problems.items():
            raise ValueError(f"the source {name!r}: {problem}")
    for column, what, remedy in (
        (PROMPT_IDS, "is tokenized", "Tokenize all of them, or none"),
        (REFERENCE_COLUMNS[0], "brings reference log-probs along", "Drop them, or give them for all"),
    ):
        having = [name for name, columns in each.items() if column in columns]
        lacking = [name for name in each if name not in having]
        if having and lacking:
            raise ValueError(
                f"the source {having[0]!r} {what} (column {column!r}), and the source {lacking[0]!r} does not, so they "
                f"cannot be mixed. {remedy}."
            )


def _problem(columns: Sequence[str]) -> str | None:
    try:
        check_columns(columns)
    except ValueError as error:
        return str(error)
    return None


def with_common_features(datasets: Mapping[str, Dataset], places: Mapping[str, Any]) -> dict[str, Dataset]:
    """The datasets with one type for each column. Columns that a dataset lacks are left to `concatenate_datasets`.
    `RowError` for a row whose prompt had to be taken out of its completions, and has none."""
    has_prompt = {name for name, dataset in datasets.items() if "prompt" in dataset.column_names}
    are_tokenized = any(TOKENIZED_COLUMNS[0] in dataset.column_names for dataset in datasets.values())
    splits = set() if are_tokenized or not has_prompt else datasets.keys() - has_prompt
    common = common_features([_after(dataset.features, name in splits) for name, dataset in datasets.items()])
    alike = {}
    for name, dataset in datasets.items():
        before, after = dataset.features, _after(dataset.features, name in splits)
        features = Features({column: common[column] for column in after})
        if features == before:
            alike[name] = dataset
            continue
        with naming_places(places.get(name)):
            alike[name] = (
                dataset.with_format("arrow")
                .map(
                    _WithFeatures(name=name, before=before, features=features, splits_prompt=name in splits),
                    with_indices=True,
                    batched=True,
                    batch_size=500,
                    features=features,
                    desc=f"Mixing {name}",
                )
                .with_format(None)
            )
    return alike


def row_as_written(row: Mapping[str, Any], features: Mapping[str, Any] | None) -> dict[str, Any]:
    """The row of a dataset with these types, without the None that Arrow has added to its messages and tools: once they
    are JSON, every None is taken for written."""
    written = dict(row)
    tools = written.get(TOOLS)
    if isinstance(tools, list):
        tools = written[TOOLS] = tools_as_written(tools, None if features is None else features.get(TOOLS))
    for column in TEXT_COLUMNS:
        if _are_messages(written.get(column)):
            kind = type_of_messages(features, column)
            written[column] = [message_as_written(message, kind, tools) for message in written[column]]
    return written


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _after(features: Features, splits_prompt: bool) -> Features:
    return Features({"prompt": features["chosen"], **features}) if splits_prompt else features


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _WithFeatures:
    """The columns of a table of rows, with these types."""

    name: str
    before: Features
    features: Features
    splits_prompt: bool

    def __call__(self, table: pa.Table, indices: Sequence[int]) -> pa.Table:
        changed = [column for column in self.features if self.before.get(column) != self.features[column]]
        if self.splits_prompt:
            changed = list(dict.fromkeys([*changed, "chosen", "rejected"]))
        read = [column for column in dict.fromkeys([*changed, *_READ]) if column in table.column_names]
        decoded = self.before.decode_batch({column: table[column].to_pylist() for column in read})
        rows = [dict(zip(read, values, strict=True)) for values in zip(*decoded.values(), strict=True)]
        rows = [row_as_written(row, self.before) for row in rows]
        if self.splits_prompt:
            rows = [self._split(row, index) for row, index in zip(rows, indices, strict=True)]
        made = table_of(rows, Features({column: self.features[column] for column in changed}))
        columns = [made[name] if name in changed else table[name] for name in self.features]
        return pa.table(columns, schema=self.features.arrow_schema)

    def _split(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            length = len(read_preference({side: row[side] for side in ("chosen", "rejected")}).prompt)
        except ValueError as error:
            raise RowError(f"source {self.name!r}", index, str(error)) from error
        rest = {side: row[side][length:] for side in ("chosen", "rejected")}
        return {**row, "prompt": row["chosen"][:length], **rest}
