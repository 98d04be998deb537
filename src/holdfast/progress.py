"""Progress: a bar on a terminal, plain lines in a file or a pipe, the notebook's own bar in a notebook.

On a terminal all bars share one display below what is printed, redrawn where something has moved and at most a few
times a second, by no thread: a dataloader may fork. In a file there is a line for each tenth, and no control character.
Given up: a clock that ticks while a step is under way.
"""

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from holdfast.visible import visible

_REDRAW_SECONDS = 0.25
_LINE_SECONDS = 30.0
"""Between two lines about one thing in a file pass so many seconds, unless it is done or another tenth of it is."""
_LEAST_SECONDS = 1.0
"""What is done sooner needs no line."""


def is_notebook() -> bool:
    """Whether this is a notebook, which draws bars of its own."""
    python: Any = sys.modules.get("IPython")
    shell = None if python is None else python.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def is_terminal() -> bool:
    """Whether messages go to a terminal that can redraw a line."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # a stream that was closed, or stands in for one
        return False


class Bar(Protocol):
    """Something that goes on."""

    def update(self, number: int = 1) -> object:
        """So many more are done."""
        ...

    def note(self, text: str) -> object:
        """What is said beside it, such as a speed."""
        ...

    def close(self) -> object:
        """It ends, done or not."""
        ...


def open_bar(total: int, description: str, unit: str, *, is_shown: bool, done: int = 0, is_lasting: bool = True) -> Bar:
    """A bar that must be closed. `total` of `unit` make it whole, and `done` are done already. With `is_lasting` it
    stays on the terminal when it is closed. Nothing is shown without `is_shown`."""
    if not is_shown:
        return NoBar()
    description = visible(description)
    if is_notebook():
        return NotebookBar(total, description, unit, done)
    if is_terminal():
        return TerminalBar(total, description, done, is_lasting=is_lasting)
    return PlainBar(total, description, unit, done)


@contextlib.contextmanager
def bar(total: int, description: str, unit: str, *, is_shown: bool) -> Iterator[Bar]:
    """A context with such a bar."""
    opened = open_bar(total, description, unit, is_shown=is_shown)
    try:
        yield opened
    finally:
        opened.close()


def is_displaying() -> bool:
    """Whether bars are on the terminal now, which a bar of another library would disturb."""
    return _display.is_there


def write(text: str) -> None:
    """Prints a line to standard output, above the bars."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@final
class NoBar:
    """Shows nothing."""

    def update(self, number: int = 1) -> None:
        """See `Bar`."""

    def note(self, text: str) -> None:
        """See `Bar`."""

    def close(self) -> None:
        """See `Bar`."""


@final
class NotebookBar:
    """A bar of `tqdm` in a notebook."""

    def __init__(self, total: int, description: str, unit: str, done: int) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, desc=description, unit=f" {unit}", initial=done)

    def update(self, number: int = 1) -> None:
        """See `Bar`."""
        self._bar.update(number)

    def note(self, text: str) -> None:
        """See `Bar`."""
        self._bar.set_postfix_str(visible(text), refresh=False)

    def close(self) -> None:
        """See `Bar`."""
        self._bar.close()


@final
class PlainBar:
    """Lines in a file or a pipe."""

    def __init__(self, total: int, description: str, unit: str, done: int) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._done = self._first = self._said = done
        self._note = ""
        self._begin = self._last = time.monotonic()

    def update(self, number: int = 1) -> None:
        """See `Bar`."""
        self._done += number
        now = time.monotonic()
        is_tenth = self._done - self._said >= self._total / 10 and now - self._last >= _LEAST_SECONDS
        if self._done < self._total and (is_tenth or now - self._last >= _LINE_SECONDS):
            self._say(now)

    def note(self, text: str) -> None:
        """See `Bar`."""
        self._note = visible(text)

    def close(self) -> None:
        """See `Bar`."""
        now = time.monotonic()
        if self._said < self._done and now - self._begin >= _LEAST_SECONDS:
            self._say(now)

    def _say(self, now: float) -> None:
        left = time_left(now - self._begin, self._done - self._first, self._total - self._done)
        parts = [f"{self._done:,} of {self._total:,} {self._unit}", self._note, left and f"{left} left"]
        sys.stderr.write(f"{self._description}: {', '.join(filter(None, parts))}\n")
        sys.stderr.flush()
        self._said, self._last = self._done, now


@final
class TerminalBar:
    """A bar on the terminal."""

    def __init__(self, total: int, description: str, done: int, *, is_lasting: bool) -> None:
        self._is_lasting = is_lasting
        self._task = _display.add(description, total, done)

    def update(self, number: int = 1) -> None:
        """See `Bar`."""
        _display.advance(self._task, number)

    def note(self, text: str) -> None:
        """See `Bar`."""
        _display.note(self._task, visible(text))

    def close(self) -> None:
        """See `Bar`."""
        _display.end(self._task, is_lasting=self._is_lasting)


class _TimeLeft(ProgressColumn):
    """The time left; once all is done, the time that it took."""

    max_refresh = None

    def render(self, task: Task) -> Text:
        """See `rich.progress.ProgressColumn`."""
        elapsed, done = task.elapsed or 0.0, task.completed - task.fields["first"]
        if task.total is not None and task.completed >= task.total:
            return Text(f"in {clock(elapsed)}")
        return Text(f"{time_left(elapsed, done, (task.total or 0) - task.completed) or '-:--'} left")


@final
class _Display:
    """The bars of this process on the terminal, in one display of `rich`, which is there while there are bars."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._open: set[TaskID] = set()
        self._last = 0.0

    @property
    def is_there(self) -> bool:
        """Whether there are bars."""
        return self._progress is not None

    def add(self, description: str, total: int, done: int) -> TaskID:
        """Begins a bar."""
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=18),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}", markup=False),
                _TimeLeft(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
                auto_refresh=False,
                redirect_stdout=_is_shown_there(sys.stdout),
            )
            self._progress.start()
            self._progress.console.show_cursor(True)  # a kill could not bring it back
        task = self._progress.add_task(description, total=total, completed=done, note="", first=done)
        self._open.add(task)
        self._redraw(is_due=True)
        return task

    def advance(self, task: TaskID, number: int) -> None:
        """Moves a bar."""
        if self._progress is not None and task in self._open:
            self._progress.advance(task, number)
            self._redraw()

    def note(self, task: TaskID, text: str) -> None:
        """Says something beside a bar."""
        if self._progress is not None and task in self._open:
            self._progress.update(task, note=text)

    def end(self, task: TaskID, *, is_lasting: bool) -> None:
        """Ends a bar, and with the last one the display."""
        if self._progress is None or task not in self._open:
            return
        self._open.remove(task)
        self._progress.stop_task(task)
        if not is_lasting:
            self._progress.remove_task(task)
        self._redraw(is_due=True)
        if not self._open:
            self.stop()

    def stop(self) -> None:
        """Ends the display, whatever bars there are."""
        progress, self._progress = self._progress, None
        self._open = set()
        if progress is not None:
            progress.stop()

    def _redraw(self, *, is_due: bool = False) -> None:
        now = time.monotonic()
        if self._progress is not None and (is_due or now - self._last >= _REDRAW_SECONDS):
            self._last = now
            self._progress.refresh()


_display = _Display()
atexit.register(_display.stop)


def time_left(seconds: float, done: float, left: float) -> str:
    """The time for what is left, at the pace so far; empty while that is unknown."""
    return clock(seconds / done * left) if done > 0 and left > 0 else ""


def clock(seconds: float) -> str:
    """A time span as hours, minutes and seconds: 0:02:30."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _is_shown_there(stream: Any) -> bool:
    """Whether what is printed there appears on a terminal, so that it must go above the bars."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
