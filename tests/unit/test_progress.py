"""Bars: on a terminal they redraw a line, in a file they are lines without a control character."""

import os
import pty
import re
import subprocess
import sys

import pytest

from holdfast import progress

SCRIPT = """
import sys, time
from holdfast import progress
progress._LEAST_SECONDS = 0.0
outer = progress.open_bar(40, "training", "steps", is_shown=True, done=10)
for step in range(10, 40):
    with progress.bar(2, "inner \\x1b[2J", "parts", is_shown=step == 20) as inner:
        inner.update()
    outer.note("5 pairs/s")
    outer.update()
    if step == 30:
        progress.write("a line")
outer.close()
print("last")
"""


def on_a_terminal(columns: int) -> str:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the end of a terminal
            break
        if not part:
            break
        parts.append(part)
    assert process.wait() == 0
    return b"".join(parts).decode()


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal(columns: int) -> None:
    text = on_a_terminal(columns)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "40/40" in shown and "5 pairs/s" in shown and "inner \\x1b[2J" in shown  # noqa: PT018
    lines = [line.rstrip("\r").split("\r")[-1] for line in shown.split("\n")]
    assert max(map(len, lines)) <= columns
    assert [line.strip() for line in lines if "line" in line or "last" in line] == ["a line", "last"]
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is there


def test_in_a_file() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout == "a line\nlast\n"
    lines = result.stderr.splitlines()
    assert not [each for each in result.stderr.replace("\n", "") if not each.isprintable()]
    assert lines[0].startswith("training: 14 of 40 steps, 5 pairs/s, 0:00:0")
    assert lines[-1] == "training: 40 of 40 steps, 5 pairs/s"
    assert [line for line in lines if line.startswith("inner")] == ["inner \\x1b[2J: 1 of 2 parts, 0:00:00 left"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (90061, "25:01:01")]
)
def test_a_clock(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text


def test_the_time_left() -> None:
    """10 of 40 are done in 60 seconds, so 30 take 180."""
    assert progress.time_left(60, 10, 30) == "0:03:00"
    assert progress.time_left(60, 0, 30) == ""


def test_nothing_is_shown_where_it_is_not_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.bar(2, "x", "parts", is_shown=False) as shown:
        shown.note("y")
        shown.update(2)
    assert capfd.readouterr() == ("", "")
