"""Commands that a page shows, run as far as a test can.

bash itself reads a block, with stand-ins for the programs in front of its `PATH`: each notes with what arguments it was
called, and in which folder. So quotes, variables, comments and continued lines mean what they mean to a reader. Then
each call is judged in this process: `holdfast` is run, of launchers the arguments are read by the launcher's own parser
and the command behind them is run, of others it is checked that what they name exists.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from typer.testing import CliRunner

from code_blocks import ROOT
from holdfast.cli.app import app
from holdfast.quickstart import folder

_NOTE = """#!/bin/bash
printf '%s\\0' "$PWD" "${0##*/}" "$@" >> "$NOTED_CALLS"
printf '\\n\\0' >> "$NOTED_CALLS"
"""
_EXECUTE = '#!/bin/bash\nexec "$@"\n'
_CLONE = '#!/bin/bash\nfor last; do :; done\nname="${last##*/}"\nln -sfn . "${name%.git}"\n'

OTHER_PROGRAMS: Mapping[str, str] = {
    "srun": _EXECUTE,
    "scontrol": "#!/bin/bash\necho host-0\n",
    "git": _CLONE,
    "open": "#!/bin/bash\n",
    "tensorboard": "#!/bin/bash\n",
}
"""Programs that are not judged, and what stands for them."""


@dataclass(frozen=True, slots=True)
class Call:
    """A program that a block called."""

    folder: Path
    program: str
    arguments: list[str]


def run_block(text: str, folder: Path, bin_folder: Path) -> None:
    """Runs a block of bash in a folder. AssertionError names the command that is wrong."""
    for call in calls_of(text, folder, bin_folder):
        with _in_folder(call.folder):
            JUDGES[call.program](call)


def calls_of(text: str, folder: Path, bin_folder: Path) -> list[Call]:
    """The programs that a block of bash calls, in order. AssertionError where bash itself objects."""
    _write_stand_ins(bin_folder)
    noted = bin_folder / "noted"
    noted.write_bytes(b"")
    environment = {
        "PATH": f"{bin_folder}:/usr/bin:/bin",
        "NOTED_CALLS": str(noted),
        "HOME": str(folder),
        "NODE_RANK": "0",
        "MASTER_ADDR": "host-0",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "host-[0-1]",
    }
    done = subprocess.run(
        ["/bin/bash", "-uc", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert not done.stderr, f"bash says: {done.stderr}"
    calls = []
    for record in noted.read_bytes().split(b"\n\0"):
        if record:
            where, program, *arguments = record.decode().removesuffix("\0").split("\0")
            calls.append(Call(Path(where), program, arguments))
    return calls


def _write_stand_ins(folder: Path) -> None:
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for name, script in {**dict.fromkeys(JUDGES, _NOTE), **OTHER_PROGRAMS}.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)


class _in_folder:  # used as a function
    """The current folder for a while."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._before = os.getcwd()
        os.chdir(self._folder)

    def __exit__(self, *error: object) -> None:
        os.chdir(self._before)


# --- judges -----------------------------------------------------------------------------------------------------------


def holdfast(arguments: Sequence[str]) -> str:
    """The output of `holdfast`, run in this process and in the current folder. AssertionError where it fails."""
    code, printed = output_of(arguments)
    assert code == 0, f"holdfast {shlex.join(arguments)} ended with {code}:\n{printed}"
    return printed


def output_of(arguments: Sequence[str], *, columns: int = 80) -> tuple[int, str]:
    """The exit code of `holdfast`, and what a pipe gets of it; with the lines of stderr where it fails."""
    words = [*arguments]
    if words[:2] in (["store", "export"], ["store", "verify"]) and len(words) > 2:
        words[2] = next((Path(os.environ["HOLDFAST_HOME"]) / "store").iterdir()).name  # a page cannot know the digest
    small = partial(folder.write_quickstart, num_steps=(2, 2), num_pairs=40)
    with (
        mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
        mock.patch.object(folder, "write_quickstart", small),  # a minute's work otherwise
    ):
        result = CliRunner().invoke(app, words)
    return result.exit_code, result.output if result.exit_code else result.stdout


def _holdfast(call: Call) -> None:
    holdfast(call.arguments)


def _behind_launcher(script: str, arguments: Sequence[str]) -> None:
    assert script == "holdfast.cli", f"a launcher starts {script}"
    holdfast(arguments)


def _torchrun(call: Call) -> None:
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(call.arguments)
    assert read.module
    _behind_launcher(read.training_script, read.training_script_args)


def _accelerate(call: Call) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert call.arguments[0] == "launch", f"accelerate {call.arguments[0]} is not known here"
    read = launch_command_parser().parse_args(call.arguments[1:])
    if read.config_file is not None:
        load_config_from_file(read.config_file)
    assert read.module
    _behind_launcher(read.training_script, read.training_script_args)


def _make(call: Call) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in call.arguments:
        assert word in targets or "=" in word, f"make {word}: the Makefile has {targets}"


def _pytest(call: Call) -> None:
    for word in call.arguments:
        assert word.startswith("-") or (ROOT / word.partition("::")[0]).exists(), f"pytest {word}: not there"


def _pip(call: Call) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for asked in re.findall(r"(?:holdfast|\.)\[([\w,]+)\]", " ".join(call.arguments)):
        assert set(asked.split(",")) <= extras.keys(), f"pip install of {asked}: the extras are {sorted(extras)}"


def _python(call: Call) -> None:
    """Modules are judged like programs, examples are run; of other scripts it is checked that they are there, and that
    they have the options."""
    first, *arguments = call.arguments
    if first == "-m":
        name, *arguments = arguments
        if name == "venv":
            return
        if name == "holdfast.cli":
            holdfast(arguments)
            return
        JUDGES[name](Call(call.folder, name, arguments))
        return
    script = Path(first)
    assert script.exists(), f"python {first}: not there"
    if script.resolve().is_relative_to(ROOT / "examples") or not script.resolve().is_relative_to(ROOT):
        run_script(script, arguments)
        return
    source = "".join(part.read_text() for part in (script.rglob("*.py") if script.is_dir() else [script]))
    for word in arguments:
        assert not word.startswith("--") or word.partition("=")[0] in source, f"python {first} has no {word}"


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """Runs a script in this process, as `python script arguments` does."""
    with mock.patch.object(sys, "argv", [str(script), *arguments]):
        code: Any = None
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code
    assert code in (None, 0), f"python {script} {shlex.join(arguments)} ended with {code}"


JUDGES: Mapping[str, Callable[[Call], None]] = {
    "holdfast": _holdfast,
    "torchrun": _torchrun,
    "accelerate": _accelerate,
    "make": _make,
    "pytest": _pytest,
    "pip": _pip,
    "python": _python,
    "python3": _python,
}
"""Programs by name, and what becomes of a call of each."""
