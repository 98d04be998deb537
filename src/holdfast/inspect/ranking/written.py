"""How numbers are written in a report: few digits, a share with its standard error, sentences in lines."""

import math
import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len, chop_cells, set_cell_size

from holdfast.inspect.lines import FAINT, HEADING, Line, Span
from holdfast.inspect.ranking.shares import Share
from holdfast.visible import visible

NOTHING = "-"
"""Stands for what cannot be said."""
SHARE = re.compile(r"([\d.]+ ± [\d.]+ %)")
"""A share with its error, within a text."""
_COLUMN_GAP = 2
_WIDEST_NAME = 28
_NARROWEST = 20
_WORD = re.compile(r"\S+ ± \S+ %\S*|\S+ %\S*|\S+")


def number(value: float | None) -> str:
    """A number with three or four digits that count; `NOTHING` of None."""
    if value is None:
        return NOTHING
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    size = abs(value)
    for least, decimals in ((10_000, 0), (100, 1), (1, 2), (0.1, 3), (0.001, 4)):
        if size >= least:
            return f"{value:,.{decimals}f}" if size < 1e7 else f"{value:.2e}"
    return f"{value:.1e}"


def percent(value: float | None) -> str:
    """A share in per cent; `NOTHING` of None."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def with_error(share: Share) -> str:
    """A share and its standard error, in per cent."""
    if share.share is None or share.standard_error is None:
        return NOTHING
    return f"{100 * share.share:.1f} ± {100 * share.standard_error:.1f} %"


def counted(share: Share) -> str:
    """`120 of 300 (40.0 ± 2.8 %)`."""
    return f"{share.count:,} of {share.num_pairs:,} ({with_error(share)})"


def sentence(text: str, width: int | None, indent: str = "  ", style: str = "") -> Iterator[Line]:
    """The sentence in lines of at most so many columns, each behind the indent; one line without a width."""
    text = visible(text)
    room = math.inf if width is None else max(_NARROWEST, width - len(indent) - 1)
    for piece in _wrapped(text, room):
        yield (Span(f"{indent}{piece}", style),)


def _wrapped(text: str, room: float) -> Iterator[str]:
    """The text in lines of at most so many columns. A share stays with its error and its sign; a word that is wider
    than a line is broken."""
    line = ""
    for word in _WORD.findall(text):
        longer = f"{line} {word}" if line else word
        if cell_len(longer) <= room:
            line = longer
            continue
        if line:
            yield line
        *whole, line = chop_cells(word, int(room)) or [""]
        yield from whole
    yield line


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, indent: str, expendable: Sequence[int] = ()
) -> Iterator[Line]:
    """A table whose first column is to the left. Where the width is too small for all columns, those of `expendable`
    are left out in their order, and a line says which. Without any to leave out, the table goes on below itself."""
    cells = [[visible(cell) for cell in row] for row in [head, *rows]]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*cells, strict=True)]
    if width is not None:
        widths[0] = min(widths[0], width // 3, max(_WIDEST_NAME, width // 4))
    room = math.inf if width is None else width - len(indent) - 1
    columns = _without(expendable, widths, room)
    for part in _parts(columns, widths, room):
        for place, row in enumerate(cells):
            name = _cut(row[0], widths[0])
            others = [" " * (widths[column] - cell_len(row[column])) + row[column] for column in part]
            text = indent + (" " * _COLUMN_GAP).join([name, *others])
            yield (Span(text.rstrip(), FAINT if place == 0 else ""),)
    if missing := [name for column, name in enumerate(head) if column not in columns]:
        yield from sentence(f"(no room for: {', '.join(missing)})", width, indent, FAINT)


def _without(expendable: Sequence[int], widths: Sequence[int], room: float) -> list[int]:
    """The columns that are left where as many of the expendable ones are left out as need be."""
    columns = list(range(len(widths)))
    for column in expendable:
        if _total(columns, widths) <= room:
            break
        columns.remove(column)
    return columns


def _parts(columns: Sequence[int], widths: Sequence[int], room: float) -> list[list[int]]:
    """The columns after the first, in as many parts as they need beside the first."""
    parts: list[list[int]] = [[]]
    for column in columns[1:]:
        if parts[-1] and _total([0, *parts[-1], column], widths) > room:
            parts.append([])
        parts[-1].append(column)
    return parts


def _total(columns: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[column] + _COLUMN_GAP for column in columns) - _COLUMN_GAP


def _cut(text: str, size: int) -> str:
    """The text in so many columns, with dots where it is too long."""
    if cell_len(text) <= size:
        return set_cell_size(text, size)
    return set_cell_size(f"{set_cell_size(text, size - 3).rstrip()}...", size)


def heading(text: str, width: int | None, indent: str = "") -> Iterator[Line]:
    """A heading in lines of at most so many columns."""
    yield from sentence(text, width, indent, HEADING)
