"""The command `holdfast select`: a part of a run's pairs, chosen by a margin, as a file to train on.

The margins are those that `holdfast inspect` shows. Log-probs come from the store, which is filled where it lacks one,
so a selection by another margin scores nothing, and neither does a run on what was selected. Rows are written as the
run's file has them, before `data.columns` gives their columns other names, so one run file reads both.
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.data import check_name
from holdfast.cli.errors import RANK, messages
from holdfast.cli.inspect_options import Overrides
from holdfast.cli.options import Debug, RunFilePath
from holdfast.cli.output_files import check_files
from holdfast.cli.paths import path_option
from holdfast.cli.runfile import RunFile, read_run_file
from holdfast.cli.sources import Source
from holdfast.cli.text import printable
from holdfast.cli.yaml_document import RunFileError
from holdfast.inspect.selection.request import By, Keep, Request

if TYPE_CHECKING:
    from datasets import Dataset

_STYLES = {"heading": "bold", "warning": "bold yellow", "faint": "dim"}


def _share(value: float) -> float:
    """A usage error where it is no share of the pairs."""
    if not 0 < value <= 1:
        raise typer.BadParameter(
            f"a share of the pairs is above 0 and at most 1; found {value:g}. Half of them is 0.5."
        )
    return value


def select(
    run_file: RunFilePath,
    output: Annotated[
        Path,
        typer.Option(parser=path_option, metavar="FILE", help="Write the rows there: a new .jsonl or .parquet file."),
    ],
    share: Annotated[float, typer.Option(callback=_share, help="Keep this share of the pairs: 0.5 is half of them.")],
    keep: Annotated[Keep, typer.Option(help="Which pairs by their margins; random: whatever those are.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--run", parser=path_option, metavar="OUT", help="The trained policy: a run's folder, a checkpoint."
        ),
    ] = None,
    by: Annotated[By | None, typer.Option(help="Whose margin; without it implicit_margin.")] = None,
    absolute: Annotated[bool, typer.Option("--absolute", help="Go by the margin's absolute value.")] = False,
    per_token: Annotated[bool, typer.Option("--per-token", help="Go by mean log-probs of tokens, not sums.")] = False,
    dataset: Annotated[str, typer.Option(metavar="NAME", help="`train`, `eval`, or one of several.")] = "train",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws the pairs of `--keep random`.")] = 0,
    margin_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Write each pair's margin too, as a column of this name.")
    ] = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Choose a part of a run's pairs by a margin, and write them into a file to train on."""
    by = _margin(by, keep, out)
    request = Request(share=share, keep=keep, by=by, is_absolute=absolute, per_token=per_token, seed=seed)
    with messages(debug):
        check_files({"output": output})
        run = read_run_file(run_file, overrides or [])
        _check_dataset(run, dataset)
        _select(run, request, out, dataset=dataset, output=output, column=margin_column)
        if RANK == 0:
            typer.echo(printable(f"written: {output}"))
            if dataset == "train":
                typer.echo(printable(f"to train on them: {_command(run, run_file, overrides or [], output)}"))


def _margin(by: By | None, keep: Keep, out: Path | None) -> By:
    """The margin that is meant. A usage error where it needs a trained policy, and none is named; or the other way."""
    if by is None and keep is Keep.RANDOM and out is None:
        return By.REFERENCE  # only shown
    if by is not By.REFERENCE and out is None:
        asked = "by default" if by is None else "by this margin"
        raise typer.BadParameter(
            f"{asked} pairs are chosen by what a trained policy makes of them. Name its folder with --run OUT, or "
            "choose by reference_margin.",
            param_hint="--by",
        )
    if by is By.REFERENCE and out is not None:
        raise typer.BadParameter(
            "reference_margin is of the reference alone, so the trained policy would not be asked. Leave it out, or "
            "choose by implicit_margin or policy_margin.",
            param_hint="--run",
        )
    return by or By.IMPLICIT


def _check_dataset(run: RunFile, name: str) -> None:
    """RunFileError where that is not one dataset of the run."""
    check_name(run, name)
    sets = run["data.eval"]
    if name == "eval" and isinstance(sets, dict) and name not in sets:
        raise RunFileError(
            f"--dataset is 'eval', and the run has several evaluation sets: {', '.join(map(str, sets))}. Name one."
        )


def _select(
    run: RunFile, request: Request, out: Path | None, *, dataset: str, output: Path, column: str | None
) -> None:
    """Writes the chosen rows, and prints what was chosen. ValueError, TypeError or OSError where that cannot be."""
    from holdfast.cli.printed_lines import console_of_reports, print_lines, width_of
    from holdfast.cli.run_numbers import run_numbers
    from holdfast.cli.trained_by import other_values
    from holdfast.inspect.selection.file import check_column, check_output, write_rows
    from holdfast.inspect.selection.selection import select as select_pairs
    from holdfast.inspect.selection.selection import selection_lines

    check_output(output)
    run.training_arguments()  # a fault of the run file comes before anything is read
    rows = _rows_as_written(run, dataset)
    if rows is not None and column is not None:
        check_column(column, rows)  # before anything is scored
    numbers = run_numbers(run, out, only=dataset)
    (of_dataset,) = numbers.datasets
    rows = of_dataset.loaded if rows is None else rows
    if column is not None:
        check_column(column, rows)
    selection = select_pairs(numbers, of_dataset, request)
    if RANK == 0:
        check_output(output)
        values = None if column is None else selection.margins[selection.places]
        write_rows(rows, selection.rows, output, column=column, values=values)
    notes = (*(other_values(run, out) if out is not None else ()), *numbers.notes)
    console = console_of_reports()
    print_lines(console, selection_lines(selection, notes, width_of(console)), _STYLES)


def _rows_as_written(run: RunFile, name: str) -> "Dataset | None":
    """The rows of a dataset under the names that its file gives their columns; None where that makes no difference."""
    source = run["data.train"] if name == "train" else run["data.eval"]
    source = source[name] if isinstance(source, dict) and name in source else source
    if not isinstance(source, Source) or source.is_stream:
        return None
    from holdfast.data.load import load_preferences

    options = {key: value for key, value in source.options.items() if key != "columns"}
    rows: Any = load_preferences(source.path, **options)
    return None if isinstance(rows, dict) else rows


def _command(run: RunFile, run_file: Path, overrides: Sequence[str], output: Path) -> str:
    """The command that trains on the selection, into a folder of its own."""
    replaced = {"data.train": _in_yaml(output), "training.output_dir": _in_yaml(output.with_suffix(""))}
    if not isinstance(run["data.train"], Source):  # a mixture: its rows are as it has made them
        replaced |= {key: "null" for key in ("data.columns", "data.stopping") if run[key] is not None}
    others = [each for each in overrides if each.partition("=")[0] not in replaced]
    settings = [*others, *(f"{key}={value}" for key, value in replaced.items())]
    return shlex.join(["holdfast", "train", str(run_file), *(word for each in settings for word in ("--set", each))])


def _in_yaml(path: Path) -> str:
    """The path as a value of a run file."""
    text = path.as_posix()
    is_plain = re.fullmatch(r"[\w./-]*[A-Za-z][\w./-]*", text, re.ASCII) is not None
    return text if is_plain else json.dumps(text.replace("$", "$$"), ensure_ascii=False)
