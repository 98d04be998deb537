"""The command `holdfast report`: what became of runs, as a page, a picture, JSON, and a few lines on the terminal.

It also writes the report at the end of `holdfast train`, whatever end that was.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from holdfast.cli.errors import RANK, messages
from holdfast.cli.options import Debug
from holdfast.cli.paths import path_option
from holdfast.cli.text import printable

if TYPE_CHECKING:
    from holdfast.report.files import Files
    from holdfast.report.run import Run
    from holdfast.trainer import DPOTrainer

logger = logging.getLogger(__name__)

_MARKS = {"good": "+", "note": "-", "warn": "!"}
_STYLES = {"good": "green", "plain": "bold", "warn": "bold yellow", "note": ""}


def _file_option(name: str, what: str) -> typer.models.OptionInfo:
    return typer.Option(
        name, parser=path_option, metavar="FILE", help=f"Write {what} there, and only what is named so."
    )


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(parser=path_option, metavar="OUT...", help="Output folders of runs, finished or not."),
    ],
    html: Annotated[Path | None, _file_option("--html", "the page")] = None,
    png: Annotated[Path | None, _file_option("--png", "the main curves as a picture")] = None,
    json: Annotated[Path | None, _file_option("--json", "all of it as JSON")] = None,
    debug: Debug = False,
) -> None:
    """Show what became of runs: the reference, whether it helped, curves, costs, samples. No model is loaded.

    Without --html, --png or --json all three are written: into OUT for one run, into the current folder for several.
    """
    with messages(debug):
        from holdfast.report.files import Files, write_report
        from holdfast.report.run import read_runs

        runs = read_runs(folders)
        files = Files(html=html, png=png, json=json)
        if not files.paths():
            files = Files.all_in(folders[0] if len(folders) == 1 else Path())
        _check_folders(files)
        write_report(runs, files)
        console = Console(quiet=RANK != 0)
        for run in runs:
            _print(run, console)
        _print_files(files, console)


@contextmanager
def reported(trainer: "DPOTrainer", folder: Path) -> Iterator[Callable[[], None]]:
    """A context for a whole run: its page is written while it trains, and page, picture and JSON when the context is
    left, also by an error or an interruption once training has begun. It gives a function that writes them earlier."""
    from holdfast.report.files import write_own_report
    from holdfast.report.live import LiveReport

    live = LiveReport()

    def write() -> None:
        try:
            if live.has_begun:
                write_own_report(folder)
        except Exception as error:  # whatever is wrong with a report, the run's model is not lost over it
            logger.warning("The report of the run in %s cannot be written: %s: %s", folder, type(error).__name__, error)

    trainer.add_callback(live)
    try:
        yield write if trainer.args.run_record else lambda: None  # the logs are not on the disk yet
    finally:
        write()


def _check_folders(files: "Files") -> None:
    """ValueError where a file could not be written."""
    for path in files.paths():
        if path.is_dir() or not path.parent.is_dir():
            found = "which is a folder" if path.is_dir() else f"and there is no folder {str(path.parent)!r}"
            raise ValueError(f"the report was to be written to {str(path)!r}, {found}. Name a file in a folder.")


def _print(run: "Run", console: Console) -> None:
    from holdfast.report.answers import answers
    from holdfast.report.findings import findings
    from holdfast.report.page import status_of

    _line(console, f"{run.name}: {status_of(run)}", "bold")
    for answer in answers(run):
        console.print()
        _line(console, answer.question, "dim")
        _line(console, answer.short, _STYLES[answer.mood], before="  ")
        for sentence in answer.more:
            _line(console, sentence, before="  ")
        if answer.command:
            _whole_line(console, f"  {answer.command}", "cyan")
    found = findings(run)
    if found:
        console.print()
        _line(console, "What stands out", "dim")
    for finding in found:
        _line(console, finding.text, _STYLES[finding.kind], before=f"  {_MARKS[finding.kind]} ")
    console.print()


def _print_files(files: "Files", console: Console) -> None:
    for path in files.paths():
        _whole_line(console, f"written: {path}")


def _line(console: Console, text: str, style: str = "", before: str = "") -> None:
    """A line. On a terminal it is broken between words, and goes on below its first word; elsewhere it stays whole."""
    if not console.is_terminal:
        _whole_line(console, before + text)
        return
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(before, style), Text(_shown(console, text), style))
    console.print(grid, highlight=False)


def _whole_line(console: Console, text: str, style: str = "") -> None:
    """A line that is never broken, so that it can be copied."""
    console.print(Text(_shown(console, text), style), soft_wrap=True, highlight=False)


def _shown(console: Console, text: str) -> str:
    return printable(text.replace("`", "")).encode(console.encoding, "backslashreplace").decode(console.encoding)
