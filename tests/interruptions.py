"""A process that runs `holdfast` in forks of itself, and signals each at chosen instants; a JSON object per line.

A fork has everything imported, so a command costs little more than its work. An instant is a number of events: of
tensor operations and of file events, so it is the same instant each time, whatever else the machine does.

Asked: `{"argv", "folder", "at"}`: the command's arguments, where it runs, and `[[event, signal], ...]`. `python` as the
first argument trains by the Python interface instead; then `true` as the second one resumes.
Answered: `{"code", "text", "events"}`: the exit code (negative: the signal that ended it), what it printed, and how
many events there were (null where it was ended by a signal's default action).
"""

import contextlib
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import holdfast.cli.assembly  # noqa: F401  # everything is imported once, before the forks
from holdfast import interruption
from holdfast.cli.__main__ import main as command_line
from policies import POLICIES, config, trainer


class Instants(TorchDispatchMode):
    """Sends this process signals at these numbers of events."""

    def __init__(self, at: list[list[int]]) -> None:
        super().__init__()
        self.at: dict[int, int] = {pair[0]: pair[1] for pair in at}
        self.num_events = 0
        self.is_on = True
        sys.addaudithook(self._heard)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation itself, counted."""
        self._count()
        return operation(*args, **kwargs or {})

    def _heard(self, event: str, args: Any) -> None:
        if event.split(".")[0] in ("open", "os", "shutil"):
            self._count()

    def _count(self) -> None:
        if self.is_on and threading.current_thread() is threading.main_thread():
            self.num_events += 1
            if (number := self.at.pop(self.num_events, None)) is not None:
                os.kill(os.getpid(), number)


def python(is_resumed: bool) -> None:
    """A run by the Python interface, which ends as the signals make it end."""
    args = config(Path("out"), save_strategy="no", optim="adamw_torch", learning_rate=0.01, max_steps=6)
    ours = trainer(POLICIES["lora_fresh"](), args)
    ours.train(resume_from_checkpoint=is_resumed)
    ours.save_model()
    ours.save_state()


def live(asked: dict[str, Any], answers: int) -> int:
    """The exit code of what was asked for; the fork ends with it."""
    os.chdir(asked["folder"])
    os.environ["HOLDFAST_HOME"] = str(Path(asked["folder"]) / "home")
    for number in interruption.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ["holdfast", *asked["argv"]]
    code: Any = 0
    with Instants(asked["at"]) as instants:
        try:
            python(asked["argv"][1:] == ["true"]) if asked["argv"][0] == "python" else command_line()
        except SystemExit as end:
            code = end.code or 0
        except KeyboardInterrupt as interrupted:  # Python would print a traceback, and end by the signal
            sys.stderr.write(f"KeyboardInterrupt: {interrupted}\n")
            code = 130
    instants.is_on = False
    os.write(answers, str(instants.num_events).encode())
    return code


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Forks and waits."""
    said = Path(asked["folder"]) / "said.txt"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            os.close(reading)
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = live(asked, writing)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with open(reading) as stream:
        events = stream.read()
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # nothing of it stays
    return {
        "code": os.waitstatus_to_exitcode(status),
        "text": said.read_text(errors="replace"),
        "events": int(events) if events else None,
    }


def main() -> None:
    """Answers until nothing more is asked."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
