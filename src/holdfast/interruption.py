"""What a process does when it is asked to end, by SIGTERM, by SIGINT (ctrl-C) or by SIGUSR1.

Within `interruptible()` the first of these signals raises `Interrupted`: at once, or after `wait()` at the next place
that asks with `check()`, such as the end of an optimizer step. So files are flushed and claims are released on the way
out. A second signal has its default action: it ends the process at once. The exit code is 128 + the signal's number:
143, 130 or 138.

Only a default action is replaced. A handler that was installed on purpose stays, and so does a signal that is ignored
(as `nohup` and a shell's `&` do). In another thread than the main one, nothing is installed. Children that are forked
meanwhile inherit the handler: see `_Handling.heard_in_child`. Given up: an answer during one long call into a library,
which Python's handlers wait for; and the children of the start methods `spawn` and `forkserver`, which inherit nothing.
"""

import logging
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from holdfast.peers.lost import LostPeerError

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
SAME_REQUEST_SECONDS = 2.0
"""Under a launcher, a signal this soon after the one before is the same request. A ctrl-C reaches the processes from
the terminal and once more from `torchrun`."""
ANSWER_SECONDS = 30.0
"""For so long a process on its way out takes one SIGTERM for the launcher's answer to the end of another process."""
WORKER_SECONDS, MOST_LOOKS = 0.5, 20
"""How long a forked child that gets SIGTERM goes on before it looks whether its parent was told too; and how often it
looks while the parent was not."""
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables of which each launcher of several processes sets one."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to end by the signal `number`.

    `done` says what was finished and kept. `checkpoint` is the one that a training run goes on from, and `advice` says
    how it does from Python.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = signal.Signals(number)
        self.done = ""
        self.advice = ""
        self.checkpoint: Path | None = None

    @property
    def exit_code(self) -> int:
        """What the process exits with: 128 + the signal's number, as shells count."""
        return 128 + self.number

    def __str__(self) -> str:
        return " ".join(filter(None, [f"Stopped by {self.number.name}.", self.done, self.advice]))


@final
class Stopped(SystemExit):
    """What the Python interface raises after SIGTERM and SIGUSR1: the process exits with `code`, without a traceback.
    After SIGINT it raises `Interrupted`, which is a `KeyboardInterrupt`."""


def _is_launched() -> bool:
    """Whether a launcher of several processes has started this one."""
    return any(name in os.environ for name in _LAUNCHERS)


@final
class _Handling:
    """The handlers of the outermost `interruptible()`, and what they have heard.

    `shared` is memory that forked children see: whether the parent waits, and how far its end is.
    """

    _WAITS, _PHASE = 0, 1
    _RUNNING, _ASKED, _ENDING = 0, 1, 2

    def __init__(self) -> None:
        self.process = os.getpid()
        self.asked: int | None = None
        self.notice = ""
        self.is_finished = False
        self.is_raised = False
        self._asked_at = 0.0
        self._is_answered = False
        """Whether SIGTERM has come after another signal: a launcher's answer to the end of another process."""
        self._shared = mmap.mmap(-1, 2)
        self._previous: dict[int, Any] = {}
        self._unraisablehook = sys.unraisablehook
        self._is_lost = False
        self._child = self._num_looks = 0

    @property
    def waits(self) -> bool:
        """Whether a signal waits for `check()` instead of raising at once."""
        return bool(self._shared[self._WAITS])

    @waits.setter
    def waits(self, value: bool) -> None:
        self._shared[self._WAITS] = value

    def install(self) -> None:
        """Replaces the default actions."""
        for number in SIGNALS:
            found = signal.getsignal(number)
            is_default = found in (signal.SIG_DFL, signal.default_int_handler)
            if is_default or isinstance(getattr(found, "__self__", None), _Handling):  # the latter: of a parent process
                self._previous[number] = signal.signal(number, self.heard)
        self._unraisablehook, sys.unraisablehook = sys.unraisablehook, self.found_unraisable

    def restore(self) -> None:
        """Puts back what was replaced, unless somebody else has replaced it since."""
        if sys.unraisablehook == self.found_unraisable:
            sys.unraisablehook = self._unraisablehook
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self.heard:
                is_awaited = number == signal.SIGTERM and self.asked is not None and not self._is_answered
                signal.signal(number, self.heard_at_the_end if is_awaited and _is_launched() else previous)

    def heard_at_the_end(self, number: int, frame: Any) -> None:
        """The handler for one SIGTERM once this process is on its way out."""
        signal.signal(number, signal.SIG_DFL)
        if time.monotonic() - self._asked_at > ANSWER_SECONDS:
            _default_action(number)

    def heard(self, number: int, frame: Any) -> None:
        """The handler: raises, or leaves the request to the next `check()`; a second signal ends the process."""
        if os.getpid() != self.process:
            self.heard_in_child(number)
        elif self._is_lost:
            self._is_lost = False
            self.end()
        elif self.asked is not None:
            is_launched = _is_launched()
            is_answer = is_launched and number == signal.SIGTERM != self.asked and not self._is_answered
            self._is_answered = self._is_answered or is_answer
            if not is_answer and (not is_launched or time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS):
                _default_action(number)
        else:
            self.ask(number)
            if not self.waits:
                self.end()
            elif self.notice and not self.is_finished and os.environ.get("RANK", "0") == "0":
                os.write(2, f"\n{signal.Signals(number).name}: {self.notice}\n".encode())  # `print` may be at work

    def heard_in_child(self, number: int) -> None:
        """In a forked child. Its parent is told too, and ends it. So the child goes on: the parent may need a data
        loader's worker to finish a step, or a worker of a pool to let go of a lock. But SIGTERM is also how a parent
        ends a child: one that is still there a little later, or gets another, ends without a word, unless the parent
        waits."""
        if number != signal.SIGTERM:
            return
        if self._child == os.getpid() and not (self.waits and self._shared[self._PHASE] != self._ENDING):
            _default_action(number)
        self._child, self._num_looks = os.getpid(), 0
        signal.signal(signal.SIGALRM, self._look_again)
        signal.setitimer(signal.ITIMER_REAL, WORKER_SECONDS)

    def _look_again(self, number: int, frame: Any) -> None:
        phase, self._num_looks = self._shared[self._PHASE], self._num_looks + 1
        may_be_asked = phase == self._RUNNING and self._num_looks < MOST_LOOKS  # the parent may be in a long call
        if self.waits and (phase == self._ASKED or may_be_asked) and os.getppid() == self.process:
            signal.setitimer(signal.ITIMER_REAL, WORKER_SECONDS)
        else:
            _default_action(signal.SIGTERM)

    def found_unraisable(self, unraisable: Any) -> None:
        """`sys.unraisablehook`: what was raised where Python cannot raise, as in `__del__`, is raised again a little
        later."""
        if isinstance(unraisable.exc_value, Interrupted) and os.getpid() == self.process:
            self._is_lost = True
            main, number = threading.main_thread().ident, unraisable.exc_value.number
            assert main is not None
            threading.Timer(0.02, signal.pthread_kill, (main, number)).start()
        else:
            self._unraisablehook(unraisable)

    def ask(self, number: int) -> None:
        """Notes the request to end."""
        self.asked, self._asked_at = number, time.monotonic()
        self._shared[self._PHASE] = self._ASKED

    def end(self) -> None:
        """Raises what was asked for."""
        assert self.asked is not None
        self._asked_at = time.monotonic()
        self._shared[self._PHASE] = self._ENDING
        self.is_raised = True
        raise Interrupted(self.asked)


_handling: _Handling | None = None


def _default_action(number: int) -> None:
    """Ends the process as if nobody had handled the signal."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _current() -> _Handling | None:
    """The handlers of this process, seen from the thread that they run in; None where there are none."""
    is_main = threading.current_thread() is threading.main_thread()
    return _handling if is_main and _handling is not None and _handling.process == os.getpid() else None


@contextmanager
def handled() -> Iterator[None]:
    """A context within which signals raise `Interrupted`. The outermost one installs the handlers, and restores those
    before it in the end; an inner one changes nothing."""
    global _handling
    if _current() is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handling = _handling = _Handling()
    handling.install()
    try:
        yield
        if (
            handling.asked is not None and not handling.is_finished
        ):  # by a signal that waited, or whose exception got lost in a library
            handling.end()
    finally:
        handling.restore()
        _handling = None


@contextmanager
def interruptible() -> Iterator[None]:
    """`handled` for the Python interface; also a decorator. Signals leave the outermost one as Python's own would:
    SIGINT as `Interrupted`, SIGTERM and SIGUSR1 as `Stopped`, with a warning that says what was done."""
    if _current() is not None:
        yield
        return
    interrupted: Interrupted | None = None
    with handled():
        try:
            yield
            check()
        except BaseException as error:
            interrupted = interruption_behind(error)
            if interrupted is None:
                raise
        else:
            return
        caught()
        if interrupted.number == signal.SIGINT:
            raise interrupted
        logger.warning("%s", interrupted)
        raise Stopped(interrupted.exit_code) from interrupted


def interruption_behind(error: BaseException | None) -> Interrupted | None:
    """The `Interrupted` that `error` is, or in whose place it was raised: by a library's clean-up, or by C code that
    makes another error of whatever it meets. None where there is none, or where it has become an exit already, or where
    another process of the run is lost."""
    handling, behind = _current(), error
    if isinstance(error, SystemExit | LostPeerError):
        return None
    while behind is not None:
        if isinstance(behind, Interrupted):
            return behind
        behind = behind.__context__
    return Interrupted(handling.asked) if handling is not None and handling.is_raised and handling.asked else None


def caught() -> None:
    """The `Interrupted` was caught, so what is raised from now on is an error of its own."""
    if (handling := _current()) is not None:
        handling.is_raised = False


def wait(notice: str = "") -> None:
    """From now on, signals wait for `check()` or `at_once()`. `notice` says what they wait for, when one comes."""
    if (handling := _current()) is not None:
        handling.waits, handling.notice = True, notice


def at_once() -> None:
    """From now on, signals raise at once. `Interrupted` where one has waited."""
    if (handling := _current()) is not None:
        handling.waits = False
        check()


def is_asked() -> bool:
    """Whether the process was asked to end."""
    return asked_signal() is not None


def asked_signal() -> int | None:
    """The number of the signal that asked the process to end; None where none did."""
    handling = _current()
    return None if handling is None else handling.asked


def is_asked_anywhere() -> bool:
    """Whether the main thread was asked to end. Any thread may ask."""
    handling = _handling
    return handling is not None and handling.process == os.getpid() and handling.asked is not None


def ask(number: int) -> None:
    """Does as if the signal had come and waited. Another process of the run got it."""
    if (handling := _current()) is not None:
        handling.ask(number)


def check() -> None:
    """`Interrupted` where the process was asked to end."""
    if (handling := _current()) is not None and handling.asked is not None:
        handling.end()


def finished() -> None:
    """All that was to be done is done: a request to end that has waited is void, and so is one that comes."""
    if (handling := _current()) is not None:
        handling.asked, handling.waits, handling.is_finished = None, True, True


@contextmanager
def saying(done: str) -> Iterator[None]:
    """A context whose `Interrupted` says `done`, where nothing within it says more."""
    try:
        yield
    except Interrupted as interrupted:
        interrupted.done = interrupted.done or done
        raise


@contextmanager
def waiting(notice: str = "") -> Iterator[Callable[[], None]]:
    """A context in which signals wait, at most until its end. It gives a function that raises `Interrupted` where one
    has come. Within a longer wait, that function and the end raise nothing."""
    handling = _current()
    if handling is None or handling.waits:
        yield lambda: None
        return
    wait(notice)
    try:
        yield check
    finally:
        handling.waits = False
    check()
