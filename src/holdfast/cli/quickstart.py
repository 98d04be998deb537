"""`holdfast quickstart`: a small model, pairs and a run file to try everything on. It reads its options and prints."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from holdfast.cli.errors import messages
from holdfast.cli.options import Debug
from holdfast.cli.paths import path_option
from holdfast.cli.text import printable

_output = Console()


def quickstart(
    folder: Annotated[
        Path, typer.Argument(parser=path_option, metavar="[FOLDER]", help="Where to write; made where missing.")
    ] = Path("quickstart"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the model and of the pairs.")] = 0,
    debug: Debug = False,
) -> None:
    """Make a small model, preference pairs and a run file to try everything on: offline, in about a minute."""
    with messages(debug):
        from holdfast.quickstart.folder import NUM_STEPS, check_is_free, write_quickstart

        check_is_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with Progress(console=_output, disable=not _output.is_terminal) as progress:
            task = progress.add_task("a small model learns to talk", total=NUM_STEPS)
            written = write_quickstart(folder, seed=seed, on_step=lambda: progress.advance(task))
        for what, path in (("model", written.model), ("pairs", written.pairs), ("held-out pairs", written.held_out)):
            _output.print(f"{what}: {escape(printable(str(path)))}", soft_wrap=True)
        command = shlex.join(["holdfast", "train", str(written.run_file)])
        _output.print(f"now: {escape(printable(command))}", soft_wrap=True)
