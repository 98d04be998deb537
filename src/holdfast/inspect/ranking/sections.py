"""The parts of a report on a dataset's pairs: sentences, tables and histograms, for a terminal and a page alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from holdfast.inspect.ranking.shares import Bin, Spread
from holdfast.inspect.ranking.written import number

SPREAD_HEAD = ("mean", "least", "1 %", "5 %", "25 %", "50 %", "75 %", "95 %", "99 %", "most")
"""The headings of a line of `spread_cells`."""
_EXPENDABLE = (3, 9, 2, 10, 5, 7)
_SHOWN = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text: its headings, its rows, and a line on top. Where there is no room for all columns, those of
    `expendable` are left out first, in this order, and then the last ones."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    expendable: tuple[int, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """The bins of a histogram, and what is counted in them."""

    title: str
    bins: tuple[Bin, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the report: what it says, in sentences, and its numbers."""

    title: str
    sentences: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    histograms: tuple[Histogram, ...] = ()


def spread_table(spreads: Sequence[tuple[str, Spread | None]], of: str, caption: str = "") -> Table:
    """A line of mean and quantiles for each spread that there is."""
    rows = tuple((name, *spread_cells(spread)) for name, spread in spreads if spread is not None)
    return Table(head=(of, *SPREAD_HEAD), rows=rows, caption=caption, expendable=_EXPENDABLE)


def spread_cells(spread: Spread) -> tuple[str, ...]:
    """The values of `SPREAD_HEAD`."""
    values = (spread.mean, spread.least, *(spread.quantiles[share] for share in _SHOWN), spread.most)
    return tuple(map(number, values))
