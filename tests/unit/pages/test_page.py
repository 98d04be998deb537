"""The skeleton and the elements of a page: text cannot become HTML, and nothing is loaded."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from holdfast.pages.charts.lines import Level, Mark, Range, Series, line_chart
from holdfast.pages.markup import Html, element, html, joined, lines_of
from holdfast.pages.page import page
from holdfast.pages.tables import facts, table

HARM = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp; \x1b]0;t\x07 \u202e"


class Tags(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a < b & 'c'", "a &lt; b &amp; &#x27;c&#x27;"), (Html("<b>"), "<b>"), (None, ""), (1.5, "1.5"),
        ("\x1b\u202e", "\\x1b\\u202e"),
    ],
)  # fmt: skip
def test_what_is_not_marked_as_html_is_escaped(content, expected):
    assert html(content) == expected


def test_elements():
    assert element("p", "a<", Html("<i>b</i>"), kind="x y") == '<p class="x y">a&lt;<i>b</i></p>'
    assert element("line", x1=1, stroke_width=2, id=None, hidden=True) == '<line x1="1" stroke-width="2" hidden/>'
    assert element("input", type="checkbox", checked=False) == '<input type="checkbox">'
    assert element("a", "x", href="javascript:'\"") == '<a href="javascript:&#x27;&quot;">x</a>'
    assert joined(["a", Html("<b>"), "<"], ", ") == "a, <b>, &lt;"
    assert lines_of("a\n<b") == "a<br>&lt;b"


def test_text_that_was_joined_by_hand_is_escaped():
    assert element("p", f"<b>{html('x')}</b>") == "<p>&lt;b&gt;x&lt;/b&gt;</p>"


def test_no_text_of_a_page_can_do_harm():
    chart = line_chart(
        [Series(name=HARM, x=[1, 2], y=[1, 2])], title=HARM, x_label=HARM, y_label=HARM, note=HARM,
        ranges=[Range(high=1, text=HARM)], levels=[Level(y=1, text=HARM)], marks=[Mark(x=1, text=HARM, kind=HARM)],
    )  # fmt: skip
    text = page(HARM, element("h1", HARM), table([HARM], [[HARM]], caption=HARM), facts({HARM: HARM}), chart)
    found = Tags(text)
    assert not {"script", "img", "iframe", "object", "link"} & found.tags
    assert not {name for name in found.attributes if name.startswith("on")} | {"src", "href"} & found.attributes
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u202e" in text


def test_a_page_loads_nothing():
    text = page("t", element("p", "x"))
    assert "default-src 'none'" in text
    assert re.findall(r"https?://|url\(|@import", text) == []
    assert 'http-equiv="refresh" content="7"' in page("t", refresh_seconds=7)
    assert "refresh" not in text


def test_tables():
    root = ElementTree.fromstring(table(["a", "b"], [[1, "<"], [Html("<i>x</i>"), None]], kind="k", caption="c"))
    assert [[cell.text for cell in row] for row in root.iter("tr")] == [["a", "b"], ["1", "<"], [None, None]]
    assert root.get("class") == "scroll"
    assert root.findtext("table/caption") == "c"
    assert "<th" not in table([], [[1]])
    assert [cell.text for cell in ElementTree.fromstring(facts({"x": 1})).iter("td")] == ["x", "1"]
