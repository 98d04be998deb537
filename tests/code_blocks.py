"""The code blocks of the pages: README, CONTRIBUTING and everything below docs/.

A block is a fence of three backticks with a language, and maybe a `title="..."`, as `CONTRIBUTING.md` explains under
"Code blocks". `test_code_blocks.py` runs every one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

LANGUAGES = ("bash", "console", "json", "python", "text", "yaml")

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)(?P=fence)`* *$", re.M | re.S
)
_TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A code block. `page` is relative to the repository; `line` is where its fence begins, from 1."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        """Where to find it."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """The pages that may have code blocks, relative to the repository."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "SECURITY.md", *docs]


def blocks_of(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    return list(blocks_in(page, (ROOT / page).read_text(encoding="utf-8")))


def blocks_in(page: str, text: str) -> Iterator[Block]:
    """The code blocks in a page's text."""
    for found in _FENCE.finditer(text):
        language, _, attributes = found["info"].strip().partition(" ")
        title = _TITLE.search(attributes)
        indent = found["indent"]
        lines = [line.removeprefix(indent) for line in found["text"].splitlines(keepends=True)]
        yield Block(
            page=page,
            line=text.count("\n", 0, found.start()) + 1,
            language=language,
            title=title[1] if title else "",
            text="".join(lines),
        )
