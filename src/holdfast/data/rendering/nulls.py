"""None in messages and tools: which were written, and which Arrow has added to make the keys of a column alike.

Arrow gives all objects at one place of a column the same keys, and None to those that lacked one. Templates print such
keys, or ask whether they exist. What is written is kept where that can be told:

- Nothing was added to what is stored as JSON (`Json` columns, and text that is JSON).
- Keys of a message, of a call and of a tool are dropped where they are None: there None means nothing.
- In a schema, None can be meant only under `default` and `const`. It is kept where the schema beside it allows null,
  and where the column has no other value at this place: somebody has written it then.
- An argument of a call that is None is kept where the tool's schema in the row knows the parameter and allows null or
  requires it, or where the column has no other value for it; without such a schema, in the last case alone.

An element of a list is never added. Dates are written as text (ISO 8601), since there are none in JSON.

Given up: a null that was written where other rows have a value, and that no schema allows, unless it is stored as JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from datasets import Json, LargeList, List, Value

Keep = Callable[[str, Mapping[str, Any], bool], bool]
"""Whether a None under this key of an object was written. The last argument says that no object of the column has
another value there."""

_NULL = Value("null")


def tools_as_written(tools: Sequence[Mapping[str, Any]], feature: Any = None) -> list[dict[str, Any]]:
    """The tools of a row, from a column of this type (None where it is not known)."""
    return _written(list(tools), feature, _of_schema)


def message_as_written(
    message: Mapping[str, Any], feature: Any = None, tools: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """A message of a row with these tools, whose place in the column has this type."""
    written: dict[str, Any] = {}
    for key, value in message.items():
        inner = field_type(feature, key)
        if key == "tool_calls" and isinstance(value, list):
            written[key] = [_call(call, item_type(inner), tools) for call in value]
        elif key == "function_call" and value is not None:
            written[key] = _call(value, inner, tools)
        elif value is not None:
            written[key] = _written(value, inner, _never)
    return written


def type_of_messages(features: Mapping[str, Any] | None, column: str) -> Any:
    """The type of the messages in a column."""
    return item_type(None if features is None else features.get(column))


def _call(call: Any, feature: Any, tools: Sequence[Mapping[str, Any]] | None) -> Any:
    if not isinstance(call, Mapping):
        return call
    written: dict[str, Any] = {}
    for key, value in call.items():
        inner = field_type(feature, key)
        if key == "function" and value is not None:
            written[key] = _call(value, inner, tools)
        elif key == "arguments" and isinstance(value, Mapping):
            written[key] = _arguments(value, inner, _parameters(call.get("name"), tools))
        elif value is not None:
            written[key] = _written(value, inner, _never)
    return written


def _arguments(arguments: Mapping[str, Any], feature: Any, schema: Mapping[str, Any] | None) -> Any:
    if schema is None:
        return _written(arguments, feature, _nowhere_else)
    known = _properties(schema)

    def keep(key: str, owner: Mapping[str, Any], is_null_everywhere: bool) -> bool:
        if owner is not arguments:
            return is_null_everywhere
        return key in known and (is_null_everywhere or key in _required(schema) or _allows_null(known[key]))

    return _written(arguments, feature, keep)


def _written(value: Any, feature: Any, keep: Keep) -> Any:
    if isinstance(feature, Json):
        return value
    if isinstance(value, Mapping):
        fields = {key: (item, field_type(feature, key)) for key, item in value.items()}
        return {
            key: _written(item, inner, keep)
            for key, (item, inner) in fields.items()
            if item is not None or keep(key, value, inner == _NULL)
        }
    if isinstance(value, list):
        return [_written(item, item_type(feature), keep) for item in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value


def _never(key: str, owner: Mapping[str, Any], is_null_everywhere: bool) -> bool:
    return False


def _nowhere_else(key: str, owner: Mapping[str, Any], is_null_everywhere: bool) -> bool:
    return is_null_everywhere


def _of_schema(key: str, owner: Mapping[str, Any], is_null_everywhere: bool) -> bool:
    return key in ("default", "const") and (is_null_everywhere or _allows_null(owner))


def _allows_null(schema: Any) -> bool:
    """Whether null is a value by this JSON schema, which says so in one of the usual ways."""
    if not isinstance(schema, Mapping):
        return False
    kinds = schema.get("type")
    if schema.get("nullable") is True or kinds == "null" or (isinstance(kinds, list) and "null" in kinds):
        return True
    if isinstance(schema.get("enum"), list) and None in schema["enum"]:
        return True
    return any(_allows_null(part) for key in ("anyOf", "oneOf") for part in schema.get(key) or ())


def _parameters(name: Any, tools: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any] | None:
    for tool in tools or ():
        function = tool["function"] if isinstance(tool.get("function"), Mapping) else tool
        if function.get("name") == name and isinstance(function.get("parameters"), Mapping):
            return function["parameters"]
    return None


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _required(schema: Mapping[str, Any]) -> Sequence[str]:
    required = schema.get("required")
    return required if isinstance(required, list) else ()


def field_type(feature: Any, key: str) -> Any:
    """The type of a field of objects of this type."""
    if isinstance(feature, Json):
        return feature
    return feature.get(key) if isinstance(feature, Mapping) else None


def item_type(feature: Any) -> Any:
    """The type of the items of lists of this type."""
    if isinstance(feature, Json):
        return feature
    if isinstance(feature, List | LargeList):
        return feature.feature
    return feature[0] if isinstance(feature, list) and feature else None
