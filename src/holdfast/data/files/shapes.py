"""What has been seen at one place of many rows -> the type of a column that holds all of it as it is.

A place where text, numbers, lists and objects are mixed, or objects of different keys, becomes a column of `Json`: its
values are stored as JSON text and come back as they were. Objects of the same keys become a struct, and whole and
broken numbers a column of floats. In tools and in arguments of calls, objects with a null here and a value there become
`Json` as well, since a None in a struct may have been added.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

import pyarrow as pa
from datasets import Features, Json, List, Value

_LONG_NUMBER = re.compile(r"\d{19}")

_WITH_NULLS = ("tools", "arguments")
"""Columns and fields in which a null may be meant."""

MAX_DEPTH = 40
"""How deep lists and objects may be nested in a column. Arrow ends at 64 levels."""

_SIMPLE = {
    frozenset(): Value("null"),
    frozenset({str}): Value("string"),
    frozenset({bool}): Value("bool"),
    frozenset({int}): Value("int64"),
    frozenset({float}): Value("float64"),
    frozenset({int, float}): Value("float64"),
}


@final
class Shape:
    """The types seen at one place, and the shapes of what is inside of them."""

    __slots__ = ("fields", "has_null", "items", "keys_differ", "types")

    def __init__(self) -> None:
        self.types: set[type] = set()
        self.fields: dict[str, Shape] = {}
        self.items: Shape | None = None
        self.keys_differ = False
        self.has_null = False

    def add(self, value: Any, depth: int = 0) -> None:
        """Take a value into account. ValueError for one that no column can hold."""
        if value is None:
            self.has_null = True
            return
        kind = type(value)
        if kind is int and not _fits(value):
            kind = float
            _check_number(value)
        if kind not in self.types:
            if kind is dict and not self.fields:
                self.fields = {key: Shape() for key in value}
            self.types.add(kind)
        if kind is dict:
            self._add_object(value, depth)
        elif kind is list and value:
            _check_depth(depth)
            self.items = self.items or Shape()
            for item in value:
                self.items.add(item, depth + 1)

    def _add_object(self, value: Mapping[str, Any], depth: int) -> None:
        _check_depth(depth)
        if value.keys() != self.fields.keys():
            self.keys_differ = True
            for key in value.keys() - self.fields.keys():
                self.fields[key] = Shape()
        for key, item in value.items():
            self.fields[key].add(item, depth + 1)

    def feature(self, name: str = "", *, keeps_nulls: bool = False) -> Any:
        """The type of a column or field of that name which holds what was seen. With `keeps_nulls` this is inside of
        tools or of arguments."""
        keeps_nulls = keeps_nulls or name in _WITH_NULLS
        simple = _SIMPLE.get(frozenset(self.types))
        if simple is not None:
            return simple
        if self.types == {list}:
            return List(self.items.feature(keeps_nulls=keeps_nulls) if self.items else Value("null"))
        has_nulls = keeps_nulls and any(shape.has_null and shape.types for shape in self.fields.values())
        if self.types == {dict} and self.fields and not self.keys_differ and not has_nulls:
            return {key: shape.feature(key, keeps_nulls=keeps_nulls) for key, shape in self.fields.items()}
        return Json()


def table_of(rows: list[dict[str, Any]], features: Features) -> pa.Table:
    """The rows as a table whose columns have these types; a key that a row does not have is None."""
    arrays = []
    for name, feature in features.items():
        column = [row.get(name) for row in rows]
        encode = _encoder(feature)
        stored = column if encode is None else _encoded_items(encode, column)
        arrays.append(pa.array(stored, type=_stored_type(feature)))
    return pa.table(arrays, names=list(features)).cast(features.arrow_schema)


def _encoder(feature: Any) -> Callable[[Any], Any] | None:
    """What makes of a value what is stored, JSON text for `Json`, at every depth. None where they are the same."""
    if isinstance(feature, Json):
        return _json_text
    if feature == Value("float64"):  # whole numbers of any size may be among them
        return float
    if isinstance(feature, List):
        encode = _encoder(feature.feature)
        return None if encode is None else partial(_encoded_items, encode)
    if isinstance(feature, dict):
        encoders = {key: encode for key, item in feature.items() if (encode := _encoder(item))}
        return partial(_encoded_fields, encoders) if encoders else None
    return None


def _encoded_items(encode: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    return [None if item is None else encode(item) for item in items]


def _encoded_fields(encoders: Mapping[str, Callable[[Any], Any]], fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {key: None if fields[key] is None else encode(fields[key]) for key, encode in encoders.items()}


def _json_text(value: Any) -> str:
    """The value as JSON text, with whole numbers beyond 64 bits as floats, as in a column of numbers."""
    text = json.dumps(value)
    return json.dumps(json.loads(text, parse_int=_int_or_float)) if _LONG_NUMBER.search(text) else text


def _int_or_float(digits: str) -> int | float:
    number = int(digits)
    return number if _fits(number) else float(number)


def _fits(number: int) -> bool:
    return -(2**63) <= number < 2**63


def _stored_type(feature: Any) -> pa.DataType:
    """The Arrow type of a feature, with text in place of `Json`."""
    if isinstance(feature, Json):
        return pa.string()
    if isinstance(feature, List):
        return pa.list_(_stored_type(feature.feature))
    if isinstance(feature, dict):
        return pa.struct({key: _stored_type(item) for key, item in feature.items()})
    return feature()


def _check_number(value: int) -> None:
    try:
        float(value)
    except OverflowError as error:
        raise ValueError(f"a number must fit a column of floats; found one of {len(str(value))} digits") from error


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"lists and objects may be nested {MAX_DEPTH} deep; found more")
