"""An inspection as lines of text: the numbers of a dataset, and its rows with a mark before each line.

A line is made of spans with a style, so that a terminal can colour them; without colour the marks say the same. A mark
stands in front of every line of a row and never in its text, so no text can pretend to be something else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from rich.cells import cell_len

from holdfast.inspect.data import DataInspection, DatasetInspection
from holdfast.inspect.lengths import QUANTILES, Bin, Lengths
from holdfast.inspect.numbers import NEARLY_EQUAL, Found, Numbers
from holdfast.inspect.rows import Piece, RowView, SideView, Use
from holdfast.visible import visible

MARKS = {Use.PROMPT: "|", Use.SCORED: "+", Use.UNSCORED: ".", Use.CUT: "x"}
"""The mark of a line by what becomes of its tokens."""
MEANINGS = {
    Use.PROMPT: "prompt, seen",
    Use.SCORED: "scored",
    Use.UNSCORED: "seen, not scored",
    Use.CUT: "cut off, not seen",
}
SPECIAL = "special"
HEADING, WARNING, FAINT = "heading", "warning", "faint"
_WIDTH_OF_BARS = 40
_MOST_EXCERPT = 70
_INDENT = "    "
_NARROWEST = 20


class Span(NamedTuple):
    """A part of a line in a style: a `Use`, one of the names above, or "" for none."""

    text: str
    style: str = ""


Line = tuple[Span, ...]
_GOES_ON = Span("\\", FAINT)
"""The end of a line that breaks where the text does not: other tokens follow it, or the terminal ends."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Showing:
    """How rows are shown: with signs for white space, with a bar between tokens, with at most so many tokens of a part
    (None: all), and in lines of at most so many columns (None: of any length)."""

    shows_spaces: bool = False
    shows_boundaries: bool = False
    most_tokens: int | None = 400
    width: int | None = None


def report_lines(inspection: DataInspection, showing: Showing | None = None) -> Iterator[Line]:
    """The lines of the whole report."""
    yield _line(f"model {inspection.model} (not loaded), {inspection.num_embeddings:,} embeddings")
    yield _line(f"tokenizer {inspection.tokenizer}")
    yield _line(f"max_length {inspection.max_length}, truncation_mode {inspection.truncation_mode}")
    if inspection.template_date is not None:
        yield _line(f"the chat template prints the date {inspection.template_date}")
    for dataset in inspection.datasets:
        yield ()
        yield from dataset_lines(dataset, inspection.max_length)
        yield from rows_lines(dataset.shown, showing or Showing())


def as_text(lines: Iterable[Line]) -> str:
    """The lines without styles."""
    return "".join("".join(span.text for span in line).rstrip() + "\n" for line in lines)


def dataset_lines(dataset: DatasetInspection, max_length: int | None) -> Iterator[Line]:
    """The numbers of a dataset, and those of its sources."""
    part = ", the first ones only" if dataset.is_part else ""
    yield (Span(f"{visible(dataset.name)}: {dataset.numbers.num_rows:,} rows{part}", HEADING),)
    yield from _numbers_lines(dataset.numbers, dataset.excerpts, max_length)
    if dataset.leak is not None:
        yield from _found_lines("prompt is in the training data too", dataset.leak, dataset.excerpts)
    for note in dataset.notes:
        yield from _found_lines(f"note: {visible(note.kind)}: {visible(note.detail)}", note.found, dataset.excerpts)
    for message in dataset.said:
        yield (Span("  said: ", WARNING), Span(visible(message)))
    if dataset.refusal is not None:
        yield (Span("  training would end here: ", WARNING), Span(visible(dataset.refusal)))
    for name, numbers in dataset.by_source.items():
        yield ()
        yield (Span(f"{visible(dataset.name)}, source {visible(name)}: {numbers.num_rows:,} rows", HEADING),)
        yield from _numbers_lines(numbers, dataset.excerpts, max_length)


def _numbers_lines(numbers: Numbers, excerpts: Mapping[int, str], max_length: int | None) -> Iterator[Line]:
    yield _line(f"  used: {numbers.num_used:,} pairs")
    for reason, found in numbers.left_out.items():
        yield from _found_lines(f"left out, {reason}", found, excerpts)
    tokens = numbers.tokens
    yield _line(
        f"  tokens of an epoch: {tokens.seen:,} seen, {tokens.scored:,} of them scored; {tokens.unscored:,} "
        "tokens of completions are not"
    )
    cut = f"cut by max_length {max_length} ({tokens.beyond:,} tokens)" if max_length else "cut (no max_length)"
    yield from _found_lines(cut, numbers.truncated, excerpts)
    yield from _length_lines(numbers.lengths)
    yield from _bias_lines(numbers)
    yield from _repeat_lines(numbers, excerpts)


def _length_lines(lengths: Mapping[str, Lengths]) -> Iterator[Line]:
    yield _line("  lengths in tokens, of all rows, before truncation:")
    headings = ["mean", "least", *(f"{share:.0%}" for share in QUANTILES), "most"]
    yield (Span("    " + " " * 10 + "".join(f"{heading:>9}" for heading in headings), FAINT),)
    for name, each in lengths.items():
        values = [f"{each.mean:,.1f}", *(f"{value:,}" for value in (each.least, *each.quantiles.values(), each.most))]
        yield _line(f"    {name:<10}" + "".join(f"{value:>9}" for value in values))
    yield _line("  rows (the longer of both sequences) by length:")
    yield from _histogram_lines(lengths["row"].histogram)


def _histogram_lines(bins: Sequence[Bin]) -> Iterator[Line]:
    most = max(each.count for each in bins)
    for each in bins:
        name = f"{each.first:,}" if each.first == each.last else f"{each.first:,} to {each.last:,}"
        bar = "#" * -(-_WIDTH_OF_BARS * each.count // most)
        yield _line(f"    {name:>20}  {each.count:>9,}  {bar}")


def _bias_lines(numbers: Numbers) -> Iterator[Line]:
    bias = numbers.length_bias
    if bias is None:
        return
    yield _line(
        f"  length: chosen has {bias.mean_chosen:,.1f} scored tokens, rejected {bias.mean_rejected:,.1f} "
        f"({bias.mean_difference:+,.1f}); chosen is longer in {percent(bias.longer)}, equal in {percent(bias.equal)}, "
        f"shorter in {percent(bias.shorter)}"
    )
    yield _line(f'  a rule "longer is better" would be right in {percent(bias.rule_accuracy)} (50 % is chance)')


def _repeat_lines(numbers: Numbers, excerpts: Mapping[int, str]) -> Iterator[Line]:
    repeats = numbers.repeats
    yield _line(
        f"  prompts: {repeats.num_prompts:,} different ones; {repeats.shared_prompts:,} have several pairs (at most "
        f"{repeats.most_pairs:,})"
    )
    yield from _found_lines("identical to an earlier pair", repeats.identical, excerpts)
    yield from _found_lines("nearly identical to an earlier pair (an estimate)", repeats.nearly_identical, excerpts)
    yield from _found_lines("contradicted by a pair with sides swapped", repeats.contradictions, excerpts)
    near = f"chosen and rejected nearly the same ({NEARLY_EQUAL:.0%} of tokens common)"
    yield from _found_lines(near, numbers.nearly_equal, excerpts)


def _found_lines(what: str, found: Found, excerpts: Mapping[int, str]) -> Iterator[Line]:
    yield _line(f"  {what}: {found.count:,} of {found.num_rows:,} rows ({percent(found.share)})")
    for row in found.examples:
        excerpt = visible(excerpts.get(row, ""))
        text = excerpt if len(excerpt) <= _MOST_EXCERPT else f"{excerpt[:_MOST_EXCERPT]}..."
        yield (Span(f"      row {row}: {text}", FAINT),)


# Rows ----------------------------------------------------------------------------------------------------------------


def rows_lines(rows: Sequence[RowView], showing: Showing) -> Iterator[Line]:
    """The rows, after a line that explains their marks."""
    if not rows:
        return
    yield ()
    key = [Span("marks: ", FAINT)]
    for use, mark in MARKS.items():
        key += [Span(f"{mark} {MEANINGS[use]}", use), Span("   ")]
    yield (*key, Span("special token", SPECIAL))
    for row in rows:
        yield ()
        yield from row_lines(row, showing)


def row_lines(row: RowView, showing: Showing) -> Iterator[Line]:
    """A row: its prompt, once if both sides have the same, and its completions."""
    words = [f"row {row.index}", *([row.place] if row.place else [])]
    words += [] if row.source is None else [f"source {row.source}"]
    words += [] if row.reason is None else [f"left out: {row.reason}"]
    yield (Span(visible(", ".join(words)), HEADING),)
    is_same = row.chosen.prompt == row.rejected.prompt
    if is_same:
        yield from _part_lines("prompt", row.chosen.prompt, showing)
    for name, side in (("chosen", row.chosen), ("rejected", row.rejected)):
        if not is_same:
            yield from _part_lines(f"prompt of {name}", side.prompt, showing)
        yield from _part_lines(_side_title(name, side), side.completion, showing)


def _side_title(name: str, side: SideView) -> str:
    beyond = f"; {side.num_beyond:,} beyond max_length" if side.num_beyond else ""
    return f"{name}, {side.num_scored:,} tokens scored; {side.num_seen:,} seen with the prompt{beyond}"


def _part_lines(title: str, pieces: Sequence[Piece], showing: Showing) -> Iterator[Line]:
    num_tokens = sum(len(piece.ids) for piece in pieces)
    yield (Span(f"  {title}" if "," in title else f"  {title}, {num_tokens:,} tokens", FAINT),)
    shown = 0
    for part in _windows(pieces, showing.most_tokens):
        if part.start > shown:
            yield _gap(pieces[shown : part.start])
        yield from _pieces_lines(pieces[part], showing)
        shown = part.stop
    if shown < len(pieces):
        yield _gap(pieces[shown:])


def _gap(pieces: Sequence[Piece]) -> Line:
    uses = ", ".join(dict.fromkeys(MEANINGS[piece.use] for piece in pieces))
    num_tokens = sum(len(piece.ids) for piece in pieces)
    return (Span(f"{_INDENT}... {num_tokens:,} tokens that are not shown here ({uses}) ...", FAINT),)


def _windows(pieces: Sequence[Piece], most: int | None) -> list[slice]:
    """The stretches of pieces to show: all of them, or the beginning, the end, and where the first and the last change
    of use is, about `most` pieces in all."""
    if most is None or len(pieces) <= most:
        return [slice(0, len(pieces))]
    changes = [number for number in range(1, len(pieces)) if pieces[number].use is not pieces[number - 1].use]
    middles = sorted({*changes[:1], *changes[-1:]})
    size = max(1, most // (2 + len(middles)))
    starts = [0, *(max(0, middle - size // 2) for middle in middles), len(pieces) - size]
    windows: list[slice] = []
    for start in sorted(starts):
        if windows and start <= windows[-1].stop:
            windows[-1] = slice(windows[-1].start, max(windows[-1].stop, start + size))
        else:
            windows.append(slice(start, start + size))
    return [slice(each.start, min(each.stop, len(pieces))) for each in windows]


def _pieces_lines(pieces: Sequence[Piece], showing: Showing) -> Iterator[Line]:
    """The text of pieces, each line after its mark. A line also ends where tokens of another use begin."""
    spans: list[Span] = []
    use = pieces[0].use if pieces else Use.PROMPT
    for piece in pieces:
        if piece.use is not use and spans:
            yield from _marked(use, [*spans, _GOES_ON], showing.width)
            spans = []
        use = piece.use
        style = SPECIAL if piece.is_special else str(use)
        *whole, rest = _written(piece, showing).split("\n")
        for line in whole:
            yield from _marked(use, _joined(spans, line, style), showing.width)
            spans = []
        spans = _joined(spans, rest, style)
    if spans:
        yield from _marked(use, spans, showing.width)


def _written(piece: Piece, showing: Showing) -> str:
    text = visible(piece.text, keeps_lines=not piece.is_special, shows_spaces=showing.shows_spaces)
    text = f"\u27e6{text}\u27e7" if piece.is_special else text
    return f"{text}\u2502" if showing.shows_boundaries and not text.endswith("\n") else text


def _joined(spans: Sequence[Span], text: str, style: str) -> list[Span]:
    """The spans and the text, in the last of them where it has the same style."""
    if not text:
        return list(spans)
    if spans and spans[-1].style == style:
        return [*spans[:-1], Span(spans[-1].text + text, style)]
    return [*spans, Span(text, style)]


def _marked(use: Use, spans: Sequence[Span], width: int | None) -> Iterator[Line]:
    """The spans after the mark of their use, in as many lines as they need."""
    mark = Span(f"{_INDENT}{MARKS[use]} ", str(use))
    if width is None:
        yield (mark, *spans)
        return
    room = max(_NARROWEST, width - len(mark.text) - 1)
    line: list[Span] = []
    used = 0
    for span in spans:
        for character in span.text:
            if used + cell_len(character) > room and span is not _GOES_ON:
                yield (mark, *line, _GOES_ON)
                line, used = [], 0
            line, used = _joined(line, character, span.style), used + cell_len(character)
    yield (mark, *line)


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def _line(text: str) -> Line:
    return (Span(visible(text)),)
