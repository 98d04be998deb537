"""A row as it is shown: the text of its tokens, what becomes of each, and that no text of a row can do harm."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

import tiny
from holdfast.inspect.data import DataInspection, DatasetInspection
from holdfast.inspect.facts import collect
from holdfast.inspect.lines import MARKS, SPECIAL, Showing, as_text, report_lines, row_lines
from holdfast.inspect.numbers import numbers_of
from holdfast.inspect.page import page
from holdfast.inspect.pairs import Cutting, Pair, Sequence, read_pairs
from holdfast.inspect.plots import length_figure, png
from holdfast.inspect.rows import Piece, RowView, Use, Writer
from holdfast.visible import visible

TOKENIZER = tiny.tokenizer()
WRITER = Writer(TOKENIZER)
ODD = "caf\u00e9 \U0001f469\u200d\U0001f680 \u6f22\u5b57 \u0627\u0644 \t tab\r\n"
ODD += "<b onclick='x'>&amp;</b> \x1b]0;t\x07 \u202e \x00 $x$"


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def view(prompt: str, chosen: str, rejected: str, cutting: Cutting, mask: list[bool] | None = None) -> RowView:
    sides = [np.array(ids(text)) for text in (chosen, rejected)]
    marks = None if mask is None else np.array(mask)
    pair = Pair(
        index=7,
        chosen=Sequence.of(np.array(ids(prompt), dtype=int), sides[0], marks, cutting),
        rejected=Sequence.of(np.array(ids(prompt), dtype=int), sides[1], None, cutting),
    )
    shown = WRITER.sides(pair)
    return RowView(index=7, place="pairs.jsonl, line 8", source="a", reason=None, chosen=shown[0], rejected=shown[1])


WHOLE = Cutting(max_length=None, truncation_mode="keep_start")


# The text of tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [ODD, tiny.PROSE[:300], "", " ", "\n\n", "a<|im_end|>b", "\U0001f469" * 5])
def test_pieces_are_the_text_and_have_every_id_once(text):
    pieces = WRITER.pieces(ids(text), [Use.SCORED] * len(ids(text)))
    assert "".join(piece.text for piece in pieces) == text
    assert [each for piece in pieces for each in piece.ids] == ids(text)


def test_bytes_of_a_character_are_one_piece():
    pieces = WRITER.pieces(ids("\u6f22"), [Use.PROMPT] * 3)
    assert pieces == [Piece(text="\u6f22", ids=tuple(ids("\u6f22")), use=Use.PROMPT, is_special=False)]


def test_a_character_that_is_cut_in_two_stays_two_pieces():
    pieces = WRITER.pieces(ids("\u6f22"), [Use.SCORED, Use.SCORED, Use.CUT])
    assert [(piece.use, len(piece.ids)) for piece in pieces] == [(Use.SCORED, 2), (Use.CUT, 1)]


def test_a_special_token_is_told_from_text_that_spells_it_out():
    end = TOKENIZER.convert_tokens_to_ids(tiny.END)
    as_text = TOKENIZER(tiny.END, split_special_tokens=True)["input_ids"]
    pieces = WRITER.pieces([end, *as_text], [Use.SCORED] * (1 + len(as_text)))
    assert [piece.is_special for piece in pieces] == [True] + [False] * len(as_text)
    assert pieces[0].text == "".join(piece.text for piece in pieces[1:]) == tiny.END


def test_what_becomes_of_each_token():
    """keep_start cuts the end of the longer completion; the mask leaves out its second token."""
    cutting = Cutting(max_length=len(ids("prompt:")) + 3, truncation_mode="keep_start")
    shown = view(
        "prompt:", "one two three four", "x", cutting, [True, False, *[True] * (len(ids("one two three four")) - 2)]
    )
    uses = [piece.use for piece in shown.chosen.completion for _ in piece.ids]
    assert uses[:4] == [Use.SCORED, Use.UNSCORED, Use.SCORED, Use.CUT]
    assert set(uses[4:]) <= {Use.CUT}
    assert {piece.use for piece in shown.chosen.prompt} == {Use.PROMPT}
    assert (shown.chosen.num_scored, shown.chosen.num_seen) == (2, cutting.max_length)


def test_prompts_that_are_cut_unlike_are_shown_for_each_side():
    cutting = Cutting(max_length=len(ids("a prompt of words")) + 1, truncation_mode="keep_end")
    text = as_text(row_lines(view("a prompt of words", "several words more", "x", cutting), Showing()))
    assert "prompt of chosen" in text
    assert "prompt of rejected" in text


# Lines ---------------------------------------------------------------------------------------------------------------


def test_a_row_without_colour_can_be_read():
    end = len(ids("b c d")) - 1
    shown = view("a\n", "b c d<|im_end|>", "e", WHOLE, [True] * end + [False] + [True])
    assert as_text(row_lines(shown, Showing())).splitlines()[:8] == [
        "row 7, pairs.jsonl, line 8, source a",
        f"  prompt, {len(ids('a' + chr(10)))} tokens",
        "    | a",
        f"  chosen, {end + 1} tokens scored; {len(ids('a' + chr(10))) + end + 2} seen with the prompt",
        "    + b c\\",
        "    .  d\\",
        "    + \u27e6<|im_end|>\u27e7",
        "  rejected, 1 tokens scored; 3 seen with the prompt",
    ]


def test_white_space_and_boundaries_on_demand():
    shown = view("z", "a b\n\tc", "d", WHOLE)
    text = as_text(row_lines(shown, Showing(shows_spaces=True)))
    assert "    + a\u00b7b\u21b5\n    + \u2192c\n" in text
    with_bars = as_text(row_lines(shown, Showing(shows_boundaries=True)))
    assert with_bars.count("\u2502") >= 4


@pytest.mark.parametrize("width", [40, 80])
def test_every_line_of_a_narrow_terminal_has_its_mark(width):
    shown = view(tiny.PROSE[:500], "\u6f22" * 90, "z" * 90, WHOLE)
    lines = as_text(row_lines(shown, Showing(width=width))).splitlines()
    rows = [line for line in lines if line.startswith("    ")]
    assert len(rows) > 10
    assert all(line[4] in MARKS.values() for line in rows)
    assert all(len(line) + line.count("\u6f22") <= width for line in rows)


def test_a_long_part_is_shown_around_where_it_is_cut():
    cutting = Cutting(max_length=200, truncation_mode="keep_start")
    shown = view("p", tiny.PROSE[:1500], tiny.PROSE[:10], cutting)
    text = as_text(row_lines(shown, Showing(most_tokens=60)))
    assert re.search(r"tokens that are not shown here \(scored\)", text)
    assert re.search(r"tokens that are not shown here \(cut off, not seen\)", text)
    assert re.search(r"\+ .*\\\n    x ", text)
    shown_tokens = sum(len(line) for line in text.splitlines() if line.startswith("    +"))
    assert shown_tokens < 400


def test_special_tokens_have_a_style_of_their_own():
    lines = row_lines(view("", "a<|im_end|>", "b", WHOLE), Showing())
    assert [span.text for line in lines for span in line if span.style == SPECIAL] == ["\u27e6<|im_end|>\u27e7"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"), ("\x1b[2J", "\\x1b[2J"), ("\u202e", "\\u202e"), ("\u200b", "\\u200b"), ("\x00", "\\x00"),
        ("\ud800", "\\ud800"), ("a\nb", "a\\nb"), ("\u00a0", "\\xa0"), ("\u2028", "\\u2028"), ("\u6f22", "\u6f22"),
        ("\U000e0041", "\\U000e0041"), ("\x9b", "\\x9b"),
    ],
)  # fmt: skip
def test_what_does_not_print_is_an_escape(text, shown):
    assert visible(text) == shown


# The whole report ----------------------------------------------------------------------------------------------------


def inspection(text: str) -> DataInspection:
    """A report in which `text` stands wherever text of a run can stand."""
    from datasets import Dataset

    columns = {"prompt_ids": [ids(text)], "chosen_ids": [ids(f"{text}1")], "rejected_ids": [ids(f"{text}2")]}
    data = Dataset.from_dict(columns)
    facts, _ = collect(data, {}, WHOLE, description="", is_quiet=True)
    numbers = numbers_of(facts)
    chosen, rejected = WRITER.sides(next(read_pairs(data, WHOLE))[0])
    row = RowView(index=0, place=text, source=text, reason=text, chosen=chosen, rejected=rejected)
    dataset = DatasetInspection(
        name=text, is_part=False, numbers=numbers, by_source={text: numbers}, leak=None, notes=(), said=(text,),
        refusal=text, facts=facts, excerpts={0: text}, shown=(row,),
    )  # fmt: skip
    return DataInspection(
        model=text, tokenizer=text, num_embeddings=3, max_length=9, truncation_mode="keep_start", template_date=text,
        datasets=(dataset,),
    )  # fmt: skip


ATTACKS = [
    ODD,
    "<script>alert(1)</script>",
    '"><img src=x onerror=y>',
    "</style><script>",
    "\x1b[2J\x9b\u202e",
    "--><svg/onload=z>",
]


class Tags(HTMLParser):
    """Every element and attribute, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_a_page_is_inert_and_loads_nothing():
    html = page(inspection(" ".join(ATTACKS)))
    tags = Tags()
    tags.feed(html)
    assert tags.elements <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "table", "tr", "th", "td", "input", "label",
        "div", "span", "main", "p", "strong", "img", "details", "summary", "br", "i",
    }  # fmt: skip
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert tags.sources
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html.replace("\t", "")) is None
    assert "default-src 'none'" in html


def test_a_page_has_the_text_of_every_token_and_its_ids():
    text = "one <b> & two"
    html = page(inspection(text))
    tags = Tags()
    tags.feed(html)
    assert tags.text.count(f"{text}1") >= 1
    assert all(re.search(f'title="id [0-9, ]*{number}\\b', html) for number in ids(text))


@pytest.mark.parametrize("text", ATTACKS)
def test_lines_cannot_steer_a_terminal(text):
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", as_text(report_lines(inspection(text)))) is None


def test_the_picture_is_one_and_reads_no_formula():
    made = inspection("$\\frac{$ a_1^")
    assert png(length_figure(made.datasets, 9)).startswith(b"\x89PNG")
