"""The command `holdfast data`: what a run would train on, before a model is loaded.

It makes the arguments of the run's trainer, hands them to `inspect.inspect_data`, and prints or writes what comes back.
All text of the data goes through `cli.text`, so that no row can steer the terminal.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from holdfast.cli.errors import RANK, messages
from holdfast.cli.options import Debug, RunFilePath
from holdfast.cli.output_files import check_files
from holdfast.cli.paths import path_option
from holdfast.cli.runfile import RunFile, read_run_file
from holdfast.cli.yaml_document import RunFileError

if TYPE_CHECKING:
    from holdfast.inspect.data import DataInspection, Request
    from holdfast.inspect.lines import Showing

_STYLES = {
    "prompt": "cyan", "scored": "green", "unscored": "yellow", "cut": "red strike", "special": "bold magenta",
    "heading": "bold", "warning": "bold yellow", "faint": "dim",
}  # fmt: skip
_MOST = 2**31 - 1


def _file_option(name: str, what: str) -> typer.models.OptionInfo:
    return typer.Option(name, parser=path_option, metavar="FILE", help=f"Write {what}.")


def data(
    run_file: RunFilePath,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: training.max_length=512")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="Only `train`, `eval`, or one evaluation set.")
    ] = None,
    num_rows: Annotated[int, typer.Option("--rows", min=0, max=1000, help="Show so many rows of each dataset.")] = 3,
    rows: Annotated[
        list[int] | None, typer.Option("--row", min=0, max=_MOST, help="Show the row of that number; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws the rows that are shown.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST, help="Look at so many rows only, the first ones; of a stream 10,000 by default."
        ),
    ] = None,
    most_tokens: Annotated[
        int, typer.Option("--tokens", min=0, max=_MOST, help="Show so many tokens of a text; 0 shows all.")
    ] = 400,
    whitespace: Annotated[bool, typer.Option("--whitespace", help="Show signs for white space.")] = False,
    boundaries: Annotated[bool, typer.Option("--boundaries", help="Show where tokens end.")] = False,
    html: Annotated[Path | None, _file_option("--html", "all of it as one HTML file")] = None,
    json: Annotated[Path | None, _file_option("--json", "all numbers as JSON")] = None,
    png: Annotated[Path | None, _file_option("--png", "the histograms of lengths")] = None,
    debug: Debug = False,
) -> None:
    """Show what a run would train on: rows, token by token, and numbers. No model is loaded."""
    with messages(debug):
        files = {"html": html, "json": json, "png": png}
        check_files(files)
        run = read_run_file(run_file, overrides or [])
        from holdfast.inspect.data import Request
        from holdfast.inspect.lines import Showing

        request = Request(only=dataset, limit=limit, num_rows=num_rows, rows=tuple(rows or ()), seed=seed)
        inspection = _inspected(run, request)
        _write(inspection, files, most_tokens or None)
        console = Console(quiet=RANK != 0)
        showing = Showing(
            shows_spaces=whitespace,
            shows_boundaries=boundaries,
            most_tokens=most_tokens or None,
            width=console.width if console.is_terminal else None,
        )
        _print(inspection, showing, console)
        _check_trainable(inspection)


def _inspected(run: RunFile, request: "Request") -> "DataInspection":
    """The inspection of a run's data. RunFileError for a dataset or a row that there is not."""
    arguments = run.training_arguments()
    check_name(run, request.only)
    from holdfast.data.progress import bars
    from holdfast.inspect.data import inspect_data

    with bars(are_shown=not arguments.disable_tqdm):
        of_trainer = run.trainer_arguments(arguments)
        inspection = inspect_data(
            of_trainer["model"],
            arguments,
            of_trainer["train_dataset"],
            of_trainer.get("eval_dataset"),
            of_trainer["processing_class"],
            request,
        )
    longest = max(each.numbers.num_rows for each in inspection.datasets)
    if beyond := [row for row in request.rows if row >= longest]:
        raise RunFileError(
            f"--row {beyond[0]} was asked for, but the data that were looked at have {longest} rows, counted from 0. "
            "Name an earlier row, or raise --limit."
        )
    return inspection


def check_name(run: RunFile, name: str | None) -> None:
    """RunFileError for a dataset that the run does not have."""
    of_eval = run["data.eval"]
    names = ["train", *(["eval"] if of_eval is not None else []), *(of_eval if isinstance(of_eval, dict) else [])]
    if name is not None and name not in names:
        raise RunFileError(
            f"--dataset is the name of a dataset of the run: {', '.join(map(str, names))}. Found {name!r}."
        )


def _write(inspection: "DataInspection", files: dict[str, Path | None], most_tokens: int | None) -> None:
    if RANK != 0:
        return
    if (path := files["html"]) is not None:
        from holdfast.inspect.page import write_page

        write_page(inspection, path, most_tokens and most_tokens * _MORE_IN_HTML)
    if (path := files["json"]) is not None:
        from holdfast.inspect.numbers_file import write_json

        write_json(inspection, path)
    if (path := files["png"]) is not None:
        from holdfast.inspect.plots import write_png

        write_png(inspection, path)


_MORE_IN_HTML = 10
"""A page can be scrolled: it shows so many times the tokens of the terminal."""


def _print(inspection: "DataInspection", showing: "Showing", console: Console) -> None:
    from holdfast.cli.printed_lines import print_lines
    from holdfast.inspect.lines import report_lines

    print_lines(console, report_lines(inspection, showing), _STYLES)


def _check_trainable(inspection: "DataInspection") -> None:
    """ValueError with what would end the run, once all has been shown."""
    for dataset in inspection.datasets:
        if dataset.refusal is not None:
            raise ValueError(dataset.refusal)
