"""An inspection of pairs as lines of text, for a terminal of any width or a file."""

from collections.abc import Iterator, Sequence

from holdfast.inspect.lines import FAINT, WARNING, Line, Span
from holdfast.inspect.ranking.inspection import DatasetRanking, RankingInspection
from holdfast.inspect.ranking.pair_facts import facts_of_pair
from holdfast.inspect.ranking.picks import Pick
from holdfast.inspect.ranking.report import about, remarks, sections_of
from holdfast.inspect.ranking.sections import Histogram, Section
from holdfast.inspect.ranking.shares import Bin
from holdfast.inspect.ranking.written import heading, sentence, table

_INDENT = "    "
_WIDTH_OF_A_FILE = 120
"""Excerpts in a file are as long as on a terminal of so many columns."""
_WIDEST_BAR = 60
_LINES_OF_TEXT = 2
_NAME_OF_TEXT = len(f"{_INDENT}  rejected | ")


def report_lines(inspection: RankingInspection, width: int | None = None) -> Iterator[Line]:
    """The lines of the whole report, of at most so many columns; None: lines end where sentences do."""
    for name, text in about(inspection).items():
        yield from sentence(f"{name}: {text}", width, "")
    for text in remarks(inspection):
        yield from sentence(text, width, "", WARNING)
    for dataset in inspection.datasets:
        yield ()
        yield from _dataset_lines(dataset, inspection, width)


def _dataset_lines(dataset: DatasetRanking, inspection: RankingInspection, width: int | None) -> Iterator[Line]:
    yield from heading(f"{dataset.name}: {len(dataset.reference):,} pairs", width)
    for section in sections_of(dataset, inspection):
        yield ()
        yield from heading(section.title, width, "  ")
        yield from _section_lines(section, width)
    for pick in dataset.picks:
        yield ()
        yield from _pick_lines(pick, dataset, inspection, width)


def _section_lines(section: Section, width: int | None) -> Iterator[Line]:
    for text in section.sentences:
        yield from sentence(text, width)
    for each in section.tables:
        if each.caption:
            yield from sentence(each.caption, width, _INDENT, FAINT)
        yield from table(each.head, each.rows, width, _INDENT, each.expendable)
    for each in section.histograms:
        yield from _histogram_lines(each, width)


def _histogram_lines(histogram: Histogram, width: int | None) -> Iterator[Line]:
    yield from sentence(histogram.title, width, _INDENT, FAINT)
    names = [_name(each) for each in histogram.bins]
    counts = [f"{each.count:,}" for each in histogram.bins]
    widths = max(map(len, names)), max(map(len, counts))
    room = (width or _WIDTH_OF_A_FILE) - len(_INDENT) - sum(widths) - 5
    widest, most = max(10, min(_WIDEST_BAR, room)), max(each.count for each in histogram.bins)
    for each, name, count in zip(histogram.bins, names, counts, strict=True):
        bar = "#" * -(-widest * each.count // most)
        yield (Span(f"{_INDENT}{name:>{widths[0]}}  {count:>{widths[1]}}  {bar}".rstrip()),)


def _name(each: Bin) -> str:
    if each.low is None and each.high is None:
        return "all"
    if each.low is None:
        return f"below {each.high:,g}"
    return f"{each.low:,g} and more" if each.high is None else f"{each.low:,g} to {each.high:,g}"


def _pick_lines(
    pick: Pick, dataset: DatasetRanking, inspection: RankingInspection, width: int | None
) -> Iterator[Line]:
    yield from heading(f"Pairs {pick.title}: {len(pick.places):,} of {pick.num_pairs:,}", width, "  ")
    yield from sentence(f"{pick.reason[:1].upper()}{pick.reason[1:]}", width, "  ", FAINT)
    for place in pick.places:
        yield from sentence(", ".join(facts_of_pair(dataset, place, inspection.objective)), width, _INDENT)
        room = ((width or _WIDTH_OF_A_FILE) - _NAME_OF_TEXT - 1) * _LINES_OF_TEXT
        excerpts = dataset.texts[place].excerpts(max(40, room))
        for name, text in zip(("prompt", "chosen", "rejected"), excerpts, strict=True):
            yield from _excerpt_lines(name, text, width)


def _excerpt_lines(name: str, text: str, width: int | None) -> Iterator[Line]:
    """The text behind its name, indented, so that no text can look like a line of the report."""
    pieces: Sequence[Line] = [*sentence(text, None if width is None else width - _NAME_OF_TEXT, "")]
    for place, piece in enumerate(pieces):
        before = f"{_INDENT}  {name if place == 0 else '':<8} | "
        yield (Span(before, FAINT), *piece)
