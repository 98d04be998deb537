"""Frozen records to JSON and back, by their fields' types: nothing else is accepted, and an error names the field.

Types that records may have: numbers, text, bool, None, other records, tuples and mappings of these, `Any`. A field's
key is its name, or `metadata["key"]`. A float that is NaN or infinite is null, as JSON has no such number, and is read
as NaN where a float must be.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

R = TypeVar("R")


def to_json(value: Any) -> Any:
    """The value as dicts, lists, text and finite numbers; None in the place of floats that are not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        return {_key(each): to_json(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(kind: type[R], value: Any, where: str = "") -> R:
    """The record of this kind that `to_json` made `value` of. ValueError where it is another; the message begins with
    the place in it. Unknown keys are ignored."""
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, not an object")
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for each in fields(kind):  # pyright: ignore[reportArgumentType]
        place = f"{where}.{_key(each)}" if where else _key(each)
        if _key(each) in value:
            found[each.name] = _converted(hints[each.name], value[_key(each)], place)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{place} is missing")
    return kind(**found)


def _converted(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        rest = [part for part in arguments if part is not type(None)]
        return None if value is None and len(rest) < len(arguments) else _converted(rest[0], value, where)
    if is_dataclass(hint):
        return from_json(hint, value, where)  # pyright: ignore[reportArgumentType]
    if origin is tuple and isinstance(value, list):
        return tuple(_converted(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _converted(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and value is None:
        return math.nan
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} is {_shown(value)}, not {getattr(hint, '__name__', hint)}")


def _key(each: Any) -> str:
    return each.metadata.get("key", each.name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
