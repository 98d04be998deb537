"""Signals within `interruptible` and `handled`: what is raised when, and what is put back."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from holdfast import interruption
from holdfast.interruption import SIGNALS, Interrupted, Stopped, handled, interruptible

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


@pytest.fixture(autouse=True)
def defaults(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Python's default actions, as in a process of its own; and no launcher."""
    for name in interruption._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def raised_by(work: Callable[[], object], context: Callable[..., Any] = handled) -> BaseException | None:
    """What leaves `context()` when it is around `work()`."""
    try:
        with context():
            work()
    except BaseException as error:
        return error
    return None


def nothing() -> None:
    """Does nothing."""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_at_once(number: int) -> None:
    raised = raised_by(lambda: [send(number), pytest.fail("it went on")])
    assert isinstance(raised, Interrupted)
    assert isinstance(raised, KeyboardInterrupt)
    assert raised.exit_code == CODES[number]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_script_ends_with_the_code_of_the_signal(number: int, caplog: pytest.LogCaptureFixture) -> None:
    """SIGINT is Python's own `KeyboardInterrupt`; the others are exits, with what was done as a warning."""

    def work() -> None:
        with interruption.saying("Half of it is kept."):
            send(number)

    raised = raised_by(work, interruptible)
    assert type(raised) is (Interrupted if number == signal.SIGINT else Stopped)
    said = str(raised) if number == signal.SIGINT else caplog.messages[0]
    assert said == f"Stopped by {signal.Signals(number).name}. Half of it is kept."
    assert getattr(raised, "code", 130) == CODES[number]


@pytest.mark.parametrize("context", [handled, interruptible])
def test_handlers_are_put_back(context: Callable[..., Any]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with context():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        with context():
            pass
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("chosen", [signal.SIG_IGN, lambda number, frame: None])
def test_a_handler_of_the_users_own_stays(chosen: Any) -> None:
    signal.signal(signal.SIGTERM, chosen)
    with handled():
        send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is chosen
        assert not interruption.is_asked()


def test_a_handler_that_is_installed_meanwhile_stays() -> None:
    def chosen(number: int, frame: Any) -> None:
        pass

    assert raised_by(lambda: signal.signal(signal.SIGTERM, chosen)) is None
    assert signal.getsignal(signal.SIGTERM) is chosen


def test_nothing_is_installed_in_another_thread() -> None:
    found: list[Any] = []

    def work() -> None:
        with interruptible():
            found.extend(signal.getsignal(number) for number in SIGNALS)
            interruption.wait()
            interruption.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(number) for number in SIGNALS]


def test_a_signal_waits_until_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    steps = []

    def work() -> None:
        interruption.wait("the step is finished first.")
        send(signal.SIGTERM)
        steps.append("finished")
        interruption.check()
        steps.append("another")

    assert isinstance(raised_by(work), Interrupted)
    assert steps == ["finished"]
    assert capfd.readouterr().err == "\nSIGTERM: the step is finished first.\n"


@pytest.mark.parametrize("asks", [True, False])
def test_a_signal_waits_for_the_end_of_a_context(asks: bool) -> None:
    steps = []

    def work() -> None:
        with interruption.waiting() as check:
            send(signal.SIGTERM)
            steps.append("written")
            if asks:
                check()
                steps.append("another")
        steps.append("after it")

    assert isinstance(raised_by(work), Interrupted)
    assert steps == ["written"]


def test_a_short_wait_within_a_longer_one_raises_nothing() -> None:
    steps = []

    def work() -> None:
        interruption.wait()
        with interruption.waiting() as check:
            send(signal.SIGTERM)
            check()
        steps.append("after it")
        interruption.at_once()
        steps.append("after the longer one")

    assert isinstance(raised_by(work), Interrupted)
    assert steps == ["after it"]


def test_what_is_lost_in_a_library_is_raised_in_the_end() -> None:
    def work() -> None:
        with contextlib.suppress(BaseException):
            send(signal.SIGTERM)

    assert isinstance(raised_by(work), Interrupted)


def test_what_python_cannot_raise_is_raised_a_little_later(capfd: pytest.CaptureFixture[str]) -> None:
    class Thing:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    assert isinstance(raised_by(lambda: [Thing() and None, time.sleep(10), pytest.fail("it was lost")]), Interrupted)
    assert "ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("is_chained", [True, False], ids=["chained", "by C code"])
def test_an_error_in_its_place_is_no_other_error(is_chained: bool) -> None:
    """Cleaning up may raise, and C code makes its own error of whatever it meets."""

    def work() -> None:
        replaced = TimeoutError()
        try:
            send(signal.SIGTERM)
        except Interrupted as error:
            replaced.__context__ = error if is_chained else None
        raise replaced

    assert isinstance(raised_by(work, interruptible), Stopped)


def test_an_error_while_a_signal_waits_is_an_error() -> None:
    def work() -> None:
        interruption.wait()
        send(signal.SIGTERM)
        raise ValueError("the disk is full")

    assert str(raised_by(work, interruptible)) == "the disk is full"


def test_what_comes_after_the_end_is_void() -> None:
    def work() -> None:
        interruption.wait()
        send(signal.SIGTERM)
        interruption.finished()
        send(signal.SIGINT)

    assert raised_by(work) is None


def test_nothing_is_said_where_nothing_comes(caplog: pytest.LogCaptureFixture) -> None:
    assert raised_by(nothing, interruptible) is None
    assert caplog.records == []


SCRIPT = """
import os, signal, sys, time
from holdfast import interruption
from holdfast.interruption import handled
{setup}
with handled():
    {body}
print("went on")
"""


def exit_code(body: str, setup: str = "", **environment: str) -> tuple[int, str]:
    """Of a process that runs `body` within `handled()`, and what it printed."""
    reset = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = SCRIPT.format(setup=reset + setup, body=body.replace("\n", "\n    "))
    clean = {name: value for name, value in os.environ.items() if name not in interruption._LAUNCHERS}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


TWICE = """
interruption.wait()
os.kill(os.getpid(), {})
os.kill(os.getpid(), {})
time.sleep(0.1)
interruption.finished()
"""


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGTERM")])
def test_a_second_signal_ends_the_process_at_once(first: str, second: str) -> None:
    code, said = exit_code(TWICE.format(f"signal.{first}", f"signal.{second}"))
    assert code == -signal.Signals[second]
    assert said == ""


def test_a_launcher_repeats_a_signal() -> None:
    """Ctrl-C reaches a process from the terminal and from `torchrun`, which forwards it at once."""
    code, said = exit_code(TWICE.format("signal.SIGINT", "signal.SIGINT"), TORCHELASTIC_RUN_ID="none")
    assert (code, said) == (0, "went on\n")


WAITING = """
interruption.SAME_REQUEST_SECONDS = 0
interruption.wait()
{signals}
interruption.finished()
"""
LEAVING = """
try:
    with handled():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
except KeyboardInterrupt:
    pass
{signals}
"""
LAUNCHED = {"RANK": "0"}


@pytest.mark.parametrize(
    ("is_leaving", "signals", "environment", "code"),
    [
        (False, ["SIGINT", "SIGTERM"], LAUNCHED, 0),
        (False, ["SIGUSR1", "SIGTERM"], LAUNCHED, 0),
        (False, ["SIGINT", "SIGTERM", "SIGTERM"], LAUNCHED, -15),
        (False, ["SIGTERM", "SIGTERM"], LAUNCHED, -15),
        (False, ["SIGINT", "SIGTERM"], {}, -15),
        (True, ["SIGTERM"], LAUNCHED, 0),
        (True, ["SIGTERM", "SIGTERM"], LAUNCHED, -15),
        (True, ["SIGTERM"], {}, -15),
    ],
)
def test_a_launcher_answers_the_end_of_another_process(
    is_leaving: bool, signals: list[str], environment: dict[str, str], code: int
) -> None:
    """By one SIGTERM, long after the signal that all were sent: while this process waits, or is on its way out."""
    sent = "\n".join(f"os.kill(os.getpid(), signal.{name}); time.sleep(0.1)" for name in signals)
    body, setup = ("pass", LEAVING) if is_leaving else (WAITING, "")
    found, said = exit_code(body.format(signals=sent), setup.format(signals=sent), **environment)
    assert found == code
    assert ("went on" in said) == (code == 0)


def test_a_late_signal_is_no_answer() -> None:
    sent = "interruption.ANSWER_SECONDS = 0\nos.kill(os.getpid(), signal.SIGTERM)"
    assert exit_code("pass", LEAVING.format(signals=sent), **LAUNCHED) == (-15, "")


FORKED = """
child = os.fork()
if child == 0:
    time.sleep({seconds})
    os._exit(7)
time.sleep(0.1)
{asked}
os.kill(child, {signal})
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
interruption.finished()
"""


@pytest.mark.parametrize(
    ("asked", "number", "seconds", "code"),
    [
        ("interruption.wait()\ninterruption.ask(15)", "SIGTERM", 1.5, 7),  # a worker that a step still needs
        ("interruption.wait()", "SIGINT", 0.5, 7),  # ctrl-C, which its parent gets too
        ("interruption.wait()", "SIGUSR1", 0.5, 7),
        ("", "SIGTERM", 20, -15),  # its parent ends it
    ],
)
def test_a_forked_child(asked: str, number: str, seconds: float, code: int) -> None:
    body = FORKED.format(asked=asked, signal=f"signal.{number}", seconds=seconds).strip()
    assert exit_code(body) == (0, f"{code}\nwent on\n")
