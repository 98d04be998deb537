"""Lines of a report on the console: in colour on a terminal, and so that no text of theirs can steer it."""

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.text import Text

from holdfast.cli.errors import RANK
from holdfast.cli.text import printable
from holdfast.inspect.lines import Line


def console_of_reports() -> Console:
    """The console on which the first process of a run prints, and no other."""
    return Console(quiet=RANK != 0)


def width_of(console: Console) -> int | None:
    """The columns of a terminal; None where the output is a file or a pipe."""
    return console.width if console.is_terminal else None


def print_lines(console: Console, lines: Iterable[Line], styles: Mapping[str, str]) -> None:
    """Prints the lines. `styles` are rich's names of the styles of spans; a span of another style has none."""
    for line in lines:
        text = Text()
        for span in line:
            shown = printable(span.text).encode(console.encoding, "backslashreplace").decode(console.encoding)
            text.append(shown, styles.get(span.style, ""))
        console.print(text, soft_wrap=True, highlight=False)
