"""The commands: `holdfast train`, `precompute`, `demo` and `store`. Thin: they read, call, print, and turn errors into
messages.

An error that a user can mend is one message without a traceback (`--debug` shows it): anything the run file is refused
for, what the operating system says (a missing file, a full disk), and a `ValueError` or `TypeError` raised in this
package. Every other exception is a defect and keeps its traceback. Given up: a library's `ValueError` about a user's
value shows its traceback too; what can be foreseen is checked by us first.

Works the same under `accelerate launch -m holdfast.cli train run.yaml` and `torchrun`: only the first process prints,
but an error is printed by every process that has it, since it may be the only one.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from holdfast.cli import store as store_cli
from holdfast.cli.runfile import RunFile, read_run_file
from holdfast.cli.yaml_document import RunFileError, dumped

if TYPE_CHECKING:
    from holdfast.config import DPOConfig

_rank = int(os.environ.get("RANK", "0"))
_output = Console(quiet=_rank != 0)
_errors = Console(stderr=True)

app = typer.Typer(
    name="holdfast",
    help="Direct Preference Optimization with a first-class reference model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store_cli.app)
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from holdfast import __version__

        typer.echo(f"holdfast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Direct Preference Optimization with a first-class reference model."""


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run file; docs/cli.md describes it.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: training.beta=0.2")
    ] = None,
    debug: _Debug = False,
) -> None:
    """Train a model on preference pairs, as a run file says."""
    with _messages(debug):
        run = read_run_file(run_file, overrides or [])
        arguments = run.training_arguments()
        assert arguments.output_dir is not None  # it has a default
        folder = Path(arguments.output_dir)
        _check_writable(folder)
        _report(folder, _train(run, arguments, folder))


@app.command()
def precompute(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run file; docs/cli.md describes it.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: training.max_length=512")
    ] = None,
    debug: _Debug = False,
) -> None:
    """Compute the reference log-probs of a run file's data into the store, where `holdfast train` will find them.

    Under `accelerate launch` the processes share the work; a job that was killed goes on where it was.
    """
    with _messages(debug):
        run = read_run_file(run_file, overrides or [])
        arguments = run.training_arguments()
        arguments.precompute_ref_log_probs = True
        assert arguments.output_dir is not None  # it has a default
        _check_writable(Path(arguments.output_dir))
        from holdfast.cli.assembly import trainer_of

        reference = trainer_of(run, arguments).reference
        if reference is None or not reference.is_precomputed:
            raise ValueError(
                "Log-probs were to be computed ahead, but this run's cannot be: its data are a stream, its reference "
                "moves (sync_ref_model), is asked in windows (reference_window), or there is none. `holdfast train` "
                "computes them as it goes; change that option to have them stored."
            )
        _output.print(escape(reference.describe()))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the table and the plot.")] = Path("holdfast-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the source, the pairs and the training.")] = 0,
    debug: _Debug = False,
) -> None:
    """Run the DPO paper's controlled experiment in miniature: offline, with an exact answer to compare with."""
    with _messages(debug):
        _check_writable(output)
        from holdfast.demo import run_demo

        result = run_demo(output, seed=seed)
    raise typer.Exit(result.exit_code)


def _train(run: RunFile, arguments: "DPOConfig", folder: Path) -> dict[str, float]:
    """Trains, saves and evaluates into `folder`; the metrics."""
    from holdfast.cli.assembly import trainer_of

    trainer = trainer_of(run, arguments)
    result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    metrics = dict(result.metrics)
    if run.evaluation is not None:
        evaluation = trainer.evaluate()
        trainer.save_metrics("eval", evaluation)
        metrics |= evaluation
    if trainer.is_world_process_zero():
        (folder / "run.yaml").write_text(dumped(run.document.values), encoding="utf-8")
    if arguments.push_to_hub:
        trainer.push_to_hub()
    return metrics


def _check_writable(folder: Path) -> None:
    """A folder that exists and can be written to; `ValueError` if that cannot be had, before anything is loaded."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"the output folder is to be {str(folder)!r}, which cannot be written to ({error.strerror or error}). "
            "Choose another folder, or change its permissions."
        ) from error


def _report(folder: Path, metrics: dict[str, float]) -> None:
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    _output.print(table)
    _output.print(f"model, tokenizer and run.yaml: {escape(str(folder))}", soft_wrap=True)
    _output.print(f"logged numbers: {escape(str(folder / 'trainer_state.json'))}", soft_wrap=True)


# Errors --------------------------------------------------------------------------------------------------------------


@contextmanager
def _messages(debug: bool) -> Iterator[None]:
    """Ends the command with a message where a user can mend the error: exit code 2 for the run file's, else 1."""
    try:
        yield
    except Exception as error:
        if debug or not _is_for_user(error):
            raise
        prefix = f"[rank {_rank}] " if _rank else ""
        _errors.print(f"[bold red]error:[/] {escape(prefix + str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2 if isinstance(error, RunFileError) else 1) from error


def _is_for_user(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    return isinstance(error, ValueError | TypeError) and _raised_in(error.__traceback__).startswith("holdfast.")


def _raised_in(traceback: TracebackType | None) -> str:
    """The name of the module whose code raised."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name


if __name__ == "__main__":
    app()
