"""Notes: what is to be said of a row that is used, though something about it may not be meant.

Whoever reads, renders or tokenizes a row adds a `Note` with its kind and an example. The rows of a kind are counted,
and said once in a dataset with the first row as an example: `TOPICS` has the sentences. A new kind is a line there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from holdfast.data.reading.sentences import MAY_NOT_BE_MEANT, READ_AS, may_not_be_meant, read_as


class Note(NamedTuple):
    """Something about a row: its kind, one of those in `TOPICS`, and what was found, in a few words."""

    kind: str
    detail: str


class Occurrence(NamedTuple):
    """Where notes of a kind were found: `in 3 of 9 rows (33.3 %)`, what the first of them says, and its `row 4`."""

    where: str
    detail: str
    row: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """Kinds of notes that are said together. `message` makes the warning from the dataset's name and what was found of
    each kind. With `is_refused` it is an error where one kind is found in every row of a dataset."""

    kinds: tuple[str, ...]
    message: Callable[[str, Mapping[str, Occurrence]], str]
    is_refused: bool = False


TOPICS: tuple[Topic, ...] = (
    *(Topic(kinds=(kind,), message=read_as(kind)) for kind in READ_AS),
    *(Topic(kinds=(kind,), message=may_not_be_meant(kind)) for kind in MAY_NOT_BE_MEANT),
)


def as_values(notes: Sequence[Note]) -> list[dict[str, str]]:
    """The notes of a row as a dataset holds them."""
    return [note._asdict() for note in notes]


def rows_by_kind(notes_of_rows: Iterable[tuple[int, Sequence[Mapping[str, Any]]]]) -> dict[str, tuple[list[int], str]]:
    """By kind, the rows that have such a note and what the first of them says, from (row, its notes as values)."""
    found: dict[str, tuple[list[int], str]] = {}
    for row, notes in notes_of_rows:
        for note in notes:
            rows, _ = found.setdefault(note["kind"], ([], note["detail"]))
            if not rows or rows[-1] != row:
                rows.append(row)
    return found
