"""The commands `holdfast train`, `precompute` and `demo`. Thin: they read the run file, call, and print.

The other commands are in the modules of their names (`cli.store`, `cli.data`, `cli.inspect`, `cli.select`,
`cli.report`, `cli.quickstart`); which errors end in a message is in `cli.errors`. All works the same under
`accelerate launch -m holdfast.cli train run.yaml` and `torchrun`, where only the first process prints.
"""

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from holdfast import interruption
from holdfast.cli import store as store_cli
from holdfast.cli.data import data
from holdfast.cli.errors import RANK, messages
from holdfast.cli.inspect import inspect
from holdfast.cli.options import Debug, RunFilePath
from holdfast.cli.paths import path_option
from holdfast.cli.quickstart import quickstart
from holdfast.cli.report import report, reported
from holdfast.cli.runfile import RunFile, read_run_file
from holdfast.cli.select import select
from holdfast.cli.text import printable
from holdfast.cli.yaml_text import to_yaml
from holdfast.interruption import SIGNALS, Interrupted
from holdfast.peers.guard import advise
from holdfast.peers.own_watch import begin
from holdfast.peers.phase import doing
from holdfast.secrets import masked

if TYPE_CHECKING:
    from holdfast.config import DPOConfig
    from holdfast.trainer import DPOTrainer

_output = Console(quiet=RANK != 0)
_TRAINED = "The model is trained, and complete"

_UsageError = typer.BadParameter.__mro__[1]
"""Of click, or of the copy of it that typer may bring."""


class _Commands(TyperGroup):
    """Commands whose usage errors show control characters as escapes."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _printable_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _printable_usage():
            return super().invoke(ctx)


@contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, _UsageError):
            vars(error)["message"] = printable(vars(error)["message"])
        raise


app = typer.Typer(
    name="holdfast",
    cls=_Commands,
    help="Direct Preference Optimization with a first-class reference model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store_cli.app)
app.command()(data)
app.command()(quickstart)
app.command()(report)
app.command()(inspect)
app.command()(select)


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
    run_file: RunFilePath,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: training.beta=0.2")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a model on preference pairs, as a run file says."""
    with messages(debug, going_on=partial(_command, "train", run_file, overrides or [])):
        run, arguments = _joined("train", run_file, overrides or [])
        assert arguments.output_dir is not None  # it has a default
        folder = Path(arguments.output_dir)
        _check_writable(folder)
        _report(folder, _train(run, arguments, folder))


@app.command()
def precompute(
    run_file: RunFilePath,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: training.max_length=512")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compute the reference log-probs of a run file's data into the store, where `holdfast train` will find them.

    Under `accelerate launch` the processes share the work; a job that was killed goes on where it was.
    """
    with messages(debug, going_on=partial(_command, "precompute", run_file, overrides or [])):
        run, arguments = _joined("precompute", run_file, overrides or [])
        has_reference = (
            arguments.reference_options(is_stream=False, has_ref_model=run["reference.model"] is not None).way != "none"
        )
        arguments.precompute_ref_log_probs = True
        assert arguments.output_dir is not None  # it has a default
        _check_writable(Path(arguments.output_dir))
        is_stream = run["data.train"].is_stream
        if is_stream or arguments.sync_ref_model or not has_reference:
            raise ValueError(_NOT_AHEAD)  # before anything is loaded
        from holdfast.cli.assembly import trainer_of

        reference = trainer_of(run, arguments).reference
        if reference is None or not reference.is_precomputed:
            raise ValueError(_NOT_AHEAD)
        _output.print(escape(printable(reference.describe())))


_NOT_AHEAD = (
    "Log-probs were to be computed ahead, but this run's cannot be: its data are a stream, its reference moves "
    "(sync_ref_model), is asked in windows (reference_window), or there is none. `holdfast train` computes them as it "
    "goes; change that option to have them stored."
)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(parser=path_option, metavar="FOLDER", help="Folder for the table and the plot.")
    ] = Path("holdfast-demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the source, the pairs and the training.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Run the DPO paper's controlled experiment in miniature: offline, with an exact answer to compare with."""
    with messages(debug):
        _check_writable(output)
        from holdfast.demo import run_demo

        with interruption.saying(f"The experiment has to begin anew; nothing is in {output} yet."):
            result = run_demo(output, seed=seed)
    raise typer.Exit(result.exit_code)


def _train(run: RunFile, arguments: "DPOConfig", folder: Path) -> dict[str, float]:
    """The metrics of a run that is trained, saved into `folder` and evaluated."""
    from holdfast.checkpoint.hosts import agreed_checkpoint
    from holdfast.checkpoint.sound import check_together, resuming
    from holdfast.cli.assembly import trainer_of

    checkpoint = agreed_checkpoint(arguments.resume_from_checkpoint, folder)
    if checkpoint is not None:
        adopts = arguments.adopt_checkpoint
        check_together(checkpoint, resuming(checkpoint), reads_all=False, adopts=adopts)  # before anything is loaded
    with interruption.saying("Nothing is trained yet."):
        trainer = trainer_of(run, arguments)
    with reported(trainer, folder) as write_report:
        return _trained(run, trainer, folder, write_report)


def _trained(run: RunFile, trainer: "DPOTrainer", folder: Path, write_report: Callable[[], None]) -> dict[str, float]:
    """The metrics of a trainer's run: trained, saved into `folder` with its report, evaluated."""
    from holdfast.checkpoint.placed import write_text
    from holdfast.checkpoint.sound import last_complete

    arguments: DPOConfig = trainer.args
    result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    interruption.wait("the trained model is saved first. A second signal ends it at once.")
    write_report()
    if (folder / "README.md").is_file():  # the card of the last checkpoint: now with the report's picture
        trainer.create_model_card(model_name=(arguments.hub_model_id or "").split("/")[-1] or None)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    metrics = dict(result.metrics)
    if run["data.eval"] is not None:
        with _after_training(trainer, folder, "evaluated"):
            evaluation = trainer.evaluate()
        trainer.save_metrics("eval", evaluation)
        metrics |= evaluation
    if trainer.is_world_process_zero():
        text = to_yaml(masked(run.document.values))
        write_text(folder / "run.yaml", text, lambda: last_complete(folder, none="train again"))
    if arguments.push_to_hub:
        with _after_training(trainer, folder, "pushed to the hub"):
            trainer.push_to_hub()
    return metrics


@contextmanager
def _after_training(trainer: "DPOTrainer", folder: Path, what: str) -> Iterator[None]:
    """A context for a step that follows the final save, and may be given up."""
    from holdfast.checkpoint.folder import complete_checkpoints

    try:
        interruption.at_once()
        yield
        interruption.wait()
    except Interrupted as interrupted:
        interrupted.done = f"{_TRAINED} in {folder}. It was not {what}."
        last = f"checkpoint-{trainer.state.global_step}"
        interrupted.checkpoint = next((path for path in complete_checkpoints(folder) if path.name == last), None)
        raise


def _command(name: str, run_file: Path, overrides: list[str], interrupted: Interrupted) -> str:
    """The command line with which a stopped run goes on; empty where it would only train once more."""
    if interrupted.checkpoint is None and interrupted.done.startswith(_TRAINED):
        return ""
    key = "training.resume_from_checkpoint"
    if interrupted.checkpoint is not None:
        from holdfast.checkpoint.folder import complete_checkpoints

        is_newest = interrupted.checkpoint == complete_checkpoints(interrupted.checkpoint.parent)[-1]
        overrides = [override for override in overrides if not override.startswith(f"{key}=")]
        overrides = [*overrides, f"{key}={'true' if is_newest else interrupted.checkpoint}"]
    options = [word for override in overrides for word in ("--set", override)]
    words = shlex.join([name, str(run_file), *options])
    return (
        f"holdfast {words}" if os.environ.get("WORLD_SIZE", "1") == "1" else f"launch `-m holdfast.cli {words}` again"
    )


def _joined(name: str, run_file: Path, overrides: list[str]) -> "tuple[RunFile, DPOConfig]":
    """A run file and its options, once this process has met the others of the run."""
    begin()
    run = read_run_file(run_file, overrides)
    advise(partial(_advice, name, run_file, overrides, None))
    with doing("joining the other processes", waits=True):
        arguments = run.training_arguments()
    advise(partial(_advice, name, run_file, overrides, arguments.output_dir))
    return run, arguments


def _advice(name: str, run_file: Path, overrides: list[str], folder: str | None) -> str:
    """How a run goes on after one of its processes was lost: the last complete checkpoint in `folder`, and a
    command."""
    from holdfast.checkpoint.folder import complete_checkpoints

    stopped = Interrupted(SIGNALS[0])
    if name == "train" and folder is not None:
        found = complete_checkpoints(Path(folder))
        stopped.checkpoint = found[-1] if found else None
    where = f" {stopped.checkpoint} is complete." if stopped.checkpoint is not None else ""
    return f"{where} To go on: {_command(name, run_file, overrides, stopped)}".strip()


def _check_writable(folder: Path) -> None:
    """Makes the folder where it is missing. `ValueError` where it cannot be written to, before anything is loaded."""
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
        table.add_row(escape(printable(name)), f"{value:.6g}" if isinstance(value, float) else printable(str(value)))
    _output.print(table)
    _output.print(f"model, tokenizer and run.yaml: {escape(printable(str(folder)))}", soft_wrap=True)
    _output.print(f"what became of it: {escape(printable(str(folder / 'report.html')))}", soft_wrap=True)
    _output.print(f"logged numbers: {escape(printable(str(folder / 'trainer_state.json')))}", soft_wrap=True)
