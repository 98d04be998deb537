"""Messages that are written as text, as JSON or as Python prints it: a list of them, one, or `{"messages": [...]}`.

Files of CSV have them, and columns that hold messages here and text there. Whether a column is meant so is for its
first rows to say (`holdfast.data.reading.rules`), since an answer may be about such text.
"""

import ast
import json
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from holdfast.data.columns import TEXT_COLUMNS
from holdfast.data.note import Note
from holdfast.data.reading.sentences import LOOKS_WRITTEN, WRITTEN

_BEGINS = re.compile(r"""\s*(?:\[\s*)?\{\s*(['"])(?:role|content|from|value|name|weight|train|messages)\1\s*:""")
_LONGEST = 2_000_000
_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


def looks_written(text: str) -> bool:
    """Whether a text begins as messages are written."""
    return _BEGINS.match(text) is not None


def with_messages_read(
    row: Mapping[str, Any], columns: Collection[str], notes: list[Note]
) -> tuple[dict[str, Any], set[str]]:
    """The values of the columns of a pair, with messages in place of text in which they are written, and the columns
    where this was so: `columns`, which are meant so in all rows, and any column of a row that holds messages elsewhere.
    """
    values = {column: row[column] for column in TEXT_COLUMNS if column in row}
    found = {column: text for column, text in values.items() if isinstance(text, str) and looks_written(text)}
    if not found:
        return values, set()
    is_mixed = any(isinstance(value, list) for value in values.values())
    read = {column for column in found if is_mixed or column in columns}
    for column, text in found.items():
        notes.append(Note(WRITTEN if column in read else LOOKS_WRITTEN, f"{column!r} holds {reprlib.repr(text)}"))
        if column in read:
            values[column] = messages_in(text, f"the column {column!r}")
    return values, read


def may_hold_messages(row: Mapping[str, Any]) -> bool:
    """Whether a column of the pair in a row holds messages, or text that begins as messages are written."""
    values = [row.get(column) for column in TEXT_COLUMNS]
    return any(looks_written(value) if isinstance(value, str) else bool(value) for value in values)


def messages_in(text: str, where: str) -> list[Any]:
    """The messages that are written in a text. ValueError where it only begins so."""
    value = _value_of(text)
    if isinstance(value, Mapping) and set(value) == {"messages"}:
        value = value["messages"]
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            f"{where} must hold messages, which are written as JSON text in the first rows; found "
            f"{reprlib.repr(text)}, which is no list of messages in JSON. Correct the row, or how the file was written "
            "(`json.dumps`)."
        )
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(keys <= value.keys() for keys in _KEYS)


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > _LONGEST:
        return None
    try:  # as Python prints lists: {'role': 'user', ...}. Only literals are read, nothing is run
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
