"""A CSV file -> its rows, each with its line. Every value stays text: an answer "42" or "NA" is what it was.

The first line names the columns. A row with too few or too many fields is refused, since it would train on an empty
answer, or on a part of one; so is quoting that two readers would read in two ways. Blank lines are passed over.
"""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.data.files.faults import no_rows, not_text, show


def csv_rows(path: Path, *, encoding: str = "utf-8-sig", separator: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    """The line and the row of each record of the file, one after the other; a record may go over several lines.

    Raises `ValueError` with file and line for whatever is not as it should be.
    """
    records = _records(path, encoding, separator)
    line, header = next(records, (0, []))
    if not header:
        raise no_rows(path, "no line of column names")
    _check_header(header, path, line)
    num_rows = 0
    for line, fields in records:
        if len(fields) != len(header):
            raise ValueError(
                f"{show(path)}, line {line}: a row must have {len(header)} fields, as many as there are column names; "
                f"found {len(fields)}, {_start(fields)}. Correct the line or remove it; a field with {separator!r} in "
                "it stands in double quotes."
            )
        num_rows += 1
        yield line, dict(zip(header, fields, strict=True))
    if num_rows == 0:
        raise no_rows(path, "none")


def csv_header(path: Path, *, encoding: str, separator: str) -> list[str]:
    """The names of the columns. Raises `ValueError` as `csv_rows` does."""
    return list(next(csv_rows(path, encoding=encoding, separator=separator))[1])


def _records(path: Path, encoding: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The first line and the fields of each record that is not blank."""
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                with _fields_of_any_length():
                    fields = next(reader, None)
            except UnicodeError as error:
                raise not_text(path, _line_that_is_not_text(path, encoding, line), encoding, error) from error
            except csv.Error as error:
                raise _malformed(path, line, reader.line_num, error) from error
            if fields is None:
                return
            if fields and (len(fields) > 1 or fields[0].strip()):
                if any("\0" in field for field in fields):
                    raise ValueError(
                        f"{show(path)}, line {line}: text must not hold NUL characters; found {_start(fields)}. Check "
                        "that the file is text, and its encoding."
                    )
                yield line, fields


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Within it, Python's reader takes fields longer than 131072 characters, which long prompts are."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _check_header(header: list[str], path: Path, line: int) -> None:
    for number, name in enumerate(header, start=1):
        if not name.strip():
            raise ValueError(
                f"{show(path)}, line {line}: each column must have a name; found {header}, where column {number} has "
                "none. Name it or remove it; pandas writes such a column unless it is told `index=False`."
            )
        if header.index(name) != number - 1:
            raise ValueError(
                f"{show(path)}, line {line}: each column must have a name of its own; found {name!r} twice in "
                f"{header}. Rename or remove one of them."
            )


def _malformed(path: Path, first_line: int, last_line: int, error: csv.Error) -> ValueError:
    if "unexpected end of data" in str(error):
        return ValueError(
            f"{show(path)}, line {first_line}: a quoted field must end with a double quote; found none up to the end "
            f"of the file (line {last_line}). Close the quote; a double quote inside a quoted field is written twice."
        )
    return ValueError(
        f"{show(path)}, line {last_line}: malformed CSV, {error}. Correct the line; a double quote inside a quoted "
        "field is written twice."
    )


def _line_that_is_not_text(path: Path, encoding: str, at_least: int) -> int:
    """The number of the first line that cannot be decoded by itself; `at_least` where each can."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeError:
                return number
    return at_least


def _start(fields: list[str]) -> str:
    text = ascii(fields)
    return text if len(text) <= 80 else text[:77] + "..."
