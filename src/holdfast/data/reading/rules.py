"""What the first rows of a dataset decide for all of them: `rules_of`.

Text alone does not say whether it repeats the prompt, or whether it is messages in JSON: one answer may begin with the
question, and one may be about JSON. So a rule holds where all of the first rows follow it. Rows that do not follow it,
and rows that follow it where it does not hold, are counted and said.

Here, too, is refused what would train on empty prompts while a column with the prompts is left over. At most the first
100 rows are read, and no further than until a row has settled every question, which is the first of ordinary data.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

from holdfast.data.columns import REFERENCE_COLUMNS, TEMPLATE_KWARGS, TEXT_COLUMNS, TOKENIZED_COLUMNS, TOOLS
from holdfast.data.reading.prompts import ENOUGH_TEXT, repeated_text
from holdfast.data.reading.written import looks_written
from holdfast.data.shapes.guess import PROMPT_NAMES, guess

NUM_ROWS = 100

_OWN = {*TEXT_COLUMNS, *TOKENIZED_COLUMNS, *REFERENCE_COLUMNS, TOOLS, TEMPLATE_KWARGS, "source", "original_source"}
_ALMOST_NOTHING = 3

Row = Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RowRules:
    """How text in the rows of a dataset is read: in which columns it is messages in JSON, and whether both completions
    repeat the prompt. `words` are those that the chat template spells out, which may be names of roles."""

    written: tuple[str, ...] = ()
    repeats_prompt: bool = False
    words: frozenset[str] = frozenset()


NO_RULES = RowRules()


def rules_of(rows: Iterable[Row], name: str) -> RowRules:
    """The rules of a dataset of this name, from its first rows. Raises `ValueError` where their prompts are empty and
    another column seems to hold them."""
    head = _Head(islice(rows, NUM_ROWS))
    first = head.first
    if first is None or {"chosen", "rejected"} - first.keys():
        return NO_RULES
    written = tuple(column for column in TEXT_COLUMNS if _is_written(first.get(column)) and head.all(_Written(column)))
    if written:
        return RowRules(written=written)
    if not isinstance(first["chosen"], str) or not isinstance(first["rejected"], str):
        if "prompt" not in first:
            _check_beginning(first, name)
        return NO_RULES
    if "prompt" not in first:
        _check_leftover(head, name)
        return NO_RULES
    if _is_blank(first["prompt"]) and head.all(lambda row: _is_blank(row.get("prompt"))):
        _check_no_prompt_column(head, name)
    return RowRules(repeats_prompt=head.all(_follows_repetition) and _repeated_length(head) >= ENOUGH_TEXT)


def unread_columns(first: Row) -> list[str]:
    """Columns of a row that are not read, though by their names they belong to the conversation, and hold something."""
    prompt = first.get("prompt")
    side = first.get("chosen") if prompt is None else prompt
    begin = side[0] if isinstance(side, list) and side else None
    has_system = isinstance(begin, Mapping) and "system" in (begin.get("role"), begin.get("from"))
    names = [] if has_system else ["system", "system_prompt", "system_message"]
    return [name for name in (*names, "history") if not _is_blank(first.get(name)) and first[name] != []]


def contradicting_scores(rows: Iterable[Row]) -> tuple[str, str, int, int] | None:
    """The columns with the scores of both completions where the chosen one has the lower score in most of the first
    rows, with the number of these rows and of all that were read. None where there are no such columns."""
    head = list(islice(rows, NUM_ROWS)) if _score_columns(next(iter(rows), {})) else []
    names = _score_columns(head[0]) if head else None
    if names is None:
        return None
    pairs = [(row.get(names[0]), row.get(names[1])) for row in head]
    pairs = [pair for pair in pairs if all(isinstance(score, int | float) for score in pair)]
    below = sum(chosen < rejected for chosen, rejected in pairs)
    return (*names, below, len(pairs)) if below > len(pairs) / 2 else None


def _score_columns(first: Row) -> tuple[str, str] | None:
    words = ("score", "rating", "avg_rating", "reward")
    names = [(f"{word}_chosen", f"{word}_rejected") for word in words]
    names += [(f"chosen_{word}", f"rejected_{word}") for word in words]
    return next((pair for pair in names if pair[0] in first and pair[1] in first), None)


class _Head:
    """The first rows, of which no more are read than are asked for."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rest = rows
        self._read: list[Row] = []
        self.first = next(iter(self), None)

    def __iter__(self) -> Iterator[Row]:
        yield from self._read
        for row in self._rest:
            self._read.append(row)
            yield row

    def all(self, holds: Any) -> bool:
        return all(holds(row) for row in self)


def _is_written(value: Any) -> bool:
    return isinstance(value, str) and looks_written(value)


@dataclass(frozen=True, slots=True)
class _Written:
    """Whether the text of a column in a row, if it has any, is written as messages are."""

    column: str

    def __call__(self, row: Row) -> bool:
        value = row.get(self.column)
        return not isinstance(value, str) or not value.strip() or looks_written(value)


def _texts(row: Row) -> tuple[str, str, str] | None:
    prompt, chosen, rejected = (row.get(column) for column in TEXT_COLUMNS)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    return None


def _follows_repetition(row: Row) -> bool:
    texts = _texts(row)
    return texts is None or _is_blank(texts[0]) or repeated_text(*texts) is not None


def _repeated_length(head: _Head) -> int:
    return sum(repeated_text(*texts) or 0 for row in head if (texts := _texts(row)) is not None)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _left_over(head: _Head) -> list[str]:
    """Columns of text that are not read, those with names of prompts first."""
    first = head.first or {}
    columns = [column for column, value in first.items() if column not in _OWN and isinstance(value, str)]
    rows = list(head)
    columns = [column for column in columns if _share(not _is_blank(row.get(column)) for row in rows) > 0.5]
    named = [column for column in PROMPT_NAMES if column in columns]
    others = [column for column in columns if column not in named and _is_prose(column, rows)]
    return [*named, *others]


def _is_prose(column: str, rows: list[Row]) -> bool:
    """Whether a column holds sentences that differ from row to row, as prompts do and labels do not."""
    texts = [str(row.get(column)) for row in rows]
    is_varied = len(set(texts)) > len(texts) / 2
    return is_varied and _share(len(text.split()) >= 3 for text in texts) > 0.5


def _share(found: Iterable[bool]) -> float:
    values = list(found)
    return sum(values) / len(values) if values else 0.0


def _check_no_prompt_column(head: _Head, name: str) -> None:
    if left_over := _left_over(head):
        raise ValueError(
            f"the prompts of the {name} dataset are empty (column 'prompt', the first {len(list(head))} row(s)), and "
            f"the column {left_over[0]!r} holds text: {_example(head, left_over[0])}. {_remedy(left_over[0], head)}"
        )


def _check_leftover(head: _Head, name: str) -> None:
    """ValueError where text without a column 'prompt' begins with nothing in common in most rows, or with less than
    what a column of another name holds, which is then the prompt."""
    first = head.first or {}
    if not any(column not in _OWN and isinstance(value, str) for column, value in first.items()):
        return
    rows = [row for row in head if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)]
    for column in _left_over(head):
        is_named = column in PROMPT_NAMES

        def is_missing(row: Row, column: str = column, is_named: bool = is_named) -> bool:
            common = _common_length(row["chosen"], row["rejected"])
            text = str(row.get(column) or "").strip()
            return bool(text) and common < len(text) and (is_named or common <= _ALMOST_NOTHING)

        if _share(map(is_missing, rows)) > 0.5:
            raise ValueError(
                f"the {name} dataset has no column 'prompt', so the prompt is what 'chosen' and 'rejected' begin with, "
                f"which is nothing or next to it in most of its first {len(rows)} row(s); and the column {column!r} "
                f"holds text: {_example(head, column)}. {_remedy(column, head)}"
            )


def _check_beginning(first: Row, name: str) -> None:
    """ValueError where messages without a column 'prompt' begin differently, and another column seems to hold the
    prompt."""
    sides = [side if isinstance(side, list) else [side] for side in (first["chosen"], first["rejected"])]
    if any(not side for side in sides) or sides[0][0] == sides[1][0]:
        return
    left_over = [column for column in PROMPT_NAMES if column in first and column not in _OWN and first[column]]
    if left_over:
        raise ValueError(
            f"the {name} dataset has no column 'prompt', and 'chosen' and 'rejected' begin with different messages; "
            f"the column {left_over[0]!r} seems to hold the prompt. {_advice(left_over[0], first)}"
        )


def _common_length(chosen: str, rejected: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))


def _example(head: _Head, column: str) -> str:
    text = next((str(row[column]) for row in head if not _is_blank(row.get(column))), "")
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _remedy(column: str, head: _Head) -> str:
    return f"{_advice(column, head.first or {})} Drop that column if it is something else."


def _advice(column: str, first: Row) -> str:
    guessed = guess([name for name in first if name != "prompt"])
    return guessed or f"Write `columns: {{prompt: {column}}}`."
