"""Notes: what is to be said of a row that is used, though something about it may not be meant.

Whoever reads, renders or tokenizes a row adds a `Note` with its kind and an example. The rows of a kind are counted,
and said once in a dataset with the first row as an example: `TOPICS` has the sentences. A new kind is a line there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

from holdfast.data.note import Note
from holdfast.data.reading.sentences import MAY_NOT_BE_MEANT, READ_AS, may_not_be_meant, read_as
from holdfast.data.rendering.sentences import LEFT_OUT, LEFT_OUT_BY_DESIGN, as_python, left_out, left_out_by_design
from holdfast.data.rendering.tool_text import AS_PYTHON
from holdfast.data.turns.sentences import KINDS, sentence


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
    Topic(kinds=tuple(LEFT_OUT), message=left_out, is_refused=True),
    Topic(kinds=(AS_PYTHON,), message=as_python, is_refused=True),
    Topic(kinds=tuple(LEFT_OUT_BY_DESIGN), message=left_out_by_design),
    *(Topic(kinds=(kind,), message=partial(sentence, kind)) for kind in KINDS),
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


def refused_everywhere(notes_of_rows: Sequence[Sequence[Mapping[str, Any]]], name: str) -> str | None:
    """The message where all of these rows have a note of one kind that may not be in all; else None. The rows are those
    of a stream named `name` that are read before training begins."""
    found = rows_by_kind(enumerate(notes_of_rows))
    for topic in TOPICS:
        if topic.is_refused and any(len(found[kind][0]) == len(notes_of_rows) for kind in topic.kinds if kind in found):
            where = "in each row that was read before training"
            occurrences = {
                kind: Occurrence(where=where, detail=found[kind][1], row=f"row {found[kind][0][0]}")
                for kind in topic.kinds
                if kind in found and len(found[kind][0]) == len(notes_of_rows)
            }
            return topic.message(name, occurrences)
    return None
