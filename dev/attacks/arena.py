"""Commands run in forks of a process that has imported everything, so that one costs little more than its work.

A fork is a process group of its own. What it prints goes to a file; one that takes too long is killed with its group.
"""

import contextlib
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended: its exit code (negative: the signal that killed it; None: it had to be killed after the
    longest time), all that it printed, and how many seconds it took."""

    code: int | None
    text: str
    seconds: float


def run(
    argv: Sequence[str],
    *,
    folder: Path,
    longest: float = 60,
    file_bytes: int | None = None,
    user: int | None = None,
    meanwhile: Callable[[int, float], None] = lambda child, began: None,
) -> Outcome:
    """`holdfast *argv` in `folder`. `file_bytes` is the size that no file may exceed, `user` whose
    rights the command has. `meanwhile(child, began)` is called
    again and again while the child runs."""
    said = folder / "said.txt"
    gc.freeze()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _live(argv, folder, said, file_bytes, user)
    code: int | None = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        if seconds > longest:
            break
        meanwhile(child, began)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # nothing of it stays
    if code is None:
        os.waitpid(child, 0)
    text = said.read_bytes().decode("utf-8", "backslashreplace") if said.exists() else ""
    return Outcome(code=code, text=text, seconds=time.monotonic() - began)


def _live(argv: Sequence[str], folder: Path, said: Path, file_bytes: int | None, user: int | None) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["HOLDFAST_HOME"] = str(folder / "home")
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        if user is not None:
            os.environ["HOME"] = str(folder)
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        code = _exit_code(argv)
    except BaseException:  # whatever the command did not turn into an exit code is its traceback
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _exit_code(argv: Sequence[str]) -> int:
    """The code with which the command `holdfast` would end."""
    from holdfast.cli.__main__ import main

    sys.argv = ["holdfast", *argv]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else (0 if end.code is None else 1)
    except KeyboardInterrupt:
        return 130
    return 0
