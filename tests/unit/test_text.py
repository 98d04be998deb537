"""Text on a terminal: what steers it or hides something is shown as an escape, all other text stays."""

import sys
import unicodedata

import pytest

from holdfast.cli.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a tiny policy, bf16", "a tiny policy, bf16"),
        (r"C:\models\x1b", r"C:\models\x1b"),
        ("Zürich 東京 😀 e\u0301", "Zürich 東京 😀 e\u0301"),
        ("", ""),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b[2J\x9b31m", r"\x1b[2J\x9b31m"),
        ("a\nb\r\tc\x00\x7f", r"a\nb\r\tc\x00\x7f"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("a\u2028b\u200bc\ufeff\u061c", r"a\u2028b\u200bc\ufeff\u061c"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_line_breaks_stay_where_they_are_meant() -> None:
    assert printable("one\ntwo\r\x1b", keeps_lines=True) == "one\ntwo\\r\\x1b"


def test_no_control_or_format_character_is_left() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {unicodedata.category(character) for character in printable(every)}
    assert left & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} == set()
