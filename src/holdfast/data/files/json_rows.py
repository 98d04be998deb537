"""A JSON file -> its rows, each with its line: one object a line, one array of objects, or a single object.

Python's parser reads them, since it can say what it found and where. What it lets pass and cannot be right is refused
here: a key given twice, half of a surrogate pair (no text can hold it), and numbers beyond what a column can hold.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.data.files.faults import no_rows, not_text, show

Row = dict[str, Any]

_SPACES = " \t\r\n"
_SPACE = re.compile(rf"[{_SPACES}]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _DuplicateKeyError(Exception):
    """A key that an object has twice."""


def json_rows(path: Path, *, encoding: str = "utf-8-sig", field: str | None = None) -> Iterator[tuple[int, Row]]:
    """The line and the row of each object of the file, one after the other.

    With `field`, the file is one object, and the rows are the array in that field of it. Raises `ValueError` with
    file and line (and column, where known) for whatever is not as it should be.
    """
    lines = _lines(path, encoding)
    numbered = ((number, line) for number, line in lines if line.strip(_SPACES))
    number, line = next(numbered, (0, ""))
    if number == 0:
        raise no_rows(path, "an empty file")
    if field is not None:
        yield from _rows_of_field(path, encoding, field)
    elif line.lstrip(_SPACES).startswith("["):
        yield from _rows_of_array("\n".join([*[""] * (number - 1), line, *(text for _, text in lines)]), path)
    elif (whole := _whole_object(path, line, encoding)) is not None:
        yield number, _checked(whole, path, f"line {number}")
    else:
        yield number, _checked(_parsed(line, path, number), path, f"line {number}")
        for number, line in numbered:
            yield number, _checked(_parsed(line, path, number), path, f"line {number}")


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """The numbered lines without their ends. Only "\\n" ends one, since JSON text may hold the other ends of line."""
    has_bytes_of_ascii = "\n{".encode(encoding.removesuffix("-sig")) == b"\n{"
    if not has_bytes_of_ascii:
        yield from _lines_of_wide_text(path, encoding)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode(encoding if number == 1 else encoding.removesuffix("-sig"))
            except UnicodeDecodeError as error:
                raise not_text(path, number, encoding, error) from error
            yield number, text.rstrip("\r\n")


def _lines_of_wide_text(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    number = 0
    with path.open(encoding=encoding, newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\r\n")
        except UnicodeError as error:
            raise not_text(path, number + 1, encoding, error) from error


def _rows_of_array(text: str, path: Path) -> Iterator[tuple[int, Row]]:
    """The objects of the array that is the whole text."""
    position = _SPACE.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    is_empty = text.startswith("]", position)
    index = 0
    while not is_empty:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decoded(text, position, path)
        yield line, _checked(value, path, f"line {line}, element {index} of the array")
        index += 1
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise _malformed(path, 1, json.JSONDecodeError("Expecting ',' delimiter", text, position))
        position = _SPACE.match(text, position + 1).end()  # type: ignore[union-attr]
    end = _SPACE.match(text, position + 1).end()  # type: ignore[union-attr]
    if end != len(text):
        raise _malformed(path, 1, json.JSONDecodeError("Extra data", text, end))
    if is_empty:
        raise no_rows(path, "an empty array")


def _rows_of_field(path: Path, encoding: str, field: str) -> Iterator[tuple[int, Row]]:
    whole = _parsed("\n".join(text for _, text in _lines(path, encoding)), path, 1)
    rows = whole.get(field) if isinstance(whole, dict) else None
    if not isinstance(rows, list) or not rows:
        found = f"the keys {list(whole)[:10]}" if isinstance(whole, dict) else type(whole).__name__
        raise ValueError(
            f"field={field!r} was asked for; {show(path)} must be an object with a list of rows under that key; found "
            f"{found if rows is None else repr(rows)[:60]}. Correct `field`, or leave it out."
        )
    for index, row in enumerate(rows):
        yield 1, _checked(row, path, f"element {index} of {field!r}")


def _whole_object(path: Path, first_line: str, encoding: str) -> Any:
    """The object that the whole file is, on several lines; None where its first line is an object, or there is none."""
    try:
        json.loads(first_line)
    except RecursionError:
        return None
    except ValueError:
        try:
            text = "\n".join(line for _, line in _lines(path, encoding))
            is_object = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            return None
        return _parsed(text, path, 1) if is_object else None
    return None


def _parsed(text: str, path: Path, line: int) -> Any:
    """The value that is the whole text, which begins at that line of the file."""
    value, position = _decoded(text, _SPACE.match(text).end(), path, line)  # type: ignore[union-attr]
    end = _SPACE.match(text, position).end()  # type: ignore[union-attr]
    if end != len(text):
        raise _malformed(path, line, json.JSONDecodeError("Extra data", text, end))
    return value


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _decoded(text: str, position: int, path: Path, first_line: int = 1) -> tuple[Any, int]:
    """The value at that position of the text, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _malformed(path, first_line, error) from error
    except (_DuplicateKeyError, RecursionError, ValueError) as error:
        line = first_line + text.count("\n", 0, position)
        raise ValueError(
            f"{show(path)}, line {line}: {_unacceptable(error)}. Correct the line or remove it."
        ) from error
    if _SURROGATE.search(text, position, end):
        _check_surrogates(value, path, first_line + text.count("\n", 0, position))
    return value, end


def _unacceptable(error: Exception) -> str:
    """What is wrong with a value that is JSON."""
    if isinstance(error, _DuplicateKeyError):
        return f"an object must have each key once; found {error.args[0]!r} twice"
    if isinstance(error, RecursionError):
        return "values must not be nested thousands of times; found lists or objects as deep as that"
    return f"a number must have at most 4300 digits; found more ({error})"


def _check_surrogates(value: Any, path: Path, line: int) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        start = max(0, error.start - 20)
        raise ValueError(
            f"{show(path)}, line {line}: text must not hold half of a surrogate pair, which is no character; found "
            f"...{error.object[start : error.end + 20]!a}. Correct the line or remove it."
        ) from error


def _checked(value: Any, path: Path, where: str) -> Row:
    if isinstance(value, dict) and value:
        return value
    found = "an empty object" if value == {} else f"{type(value).__name__} {str(value)[:60]}"
    raise ValueError(
        f'{show(path)}, {where}: a row must be a JSON object such as {{"prompt": ..., "chosen": ..., "rejected": ...}}'
        f"; found {found}. Correct or remove it."
    )


def _malformed(path: Path, first_line: int, error: json.JSONDecodeError) -> ValueError:
    text = error.doc.split("\n")[error.lineno - 1]
    start = max(0, error.colno - 31)
    return ValueError(
        f"{show(path)}, line {first_line + error.lineno - 1}, column {error.colno}: malformed JSON, "
        f"{error.msg[0].lower() + error.msg[1:]}; found ...{text[start : error.colno + 30]!r}. Correct "
        "the line or remove it."
    )
