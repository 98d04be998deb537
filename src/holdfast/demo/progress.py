"""Progress of the demo: one bar with the time left for everything, and one for each stage.

The stages differ in the time per step, so the overall bar advances by typical seconds. Given up: exact times, since
machines differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the demo: its number of steps, and how long they typically take together."""

    name: str
    num_steps: int
    typical_seconds: float


@final
class StageProgress:
    """The bars, shown while the context is open."""

    def __init__(self, console: Console, stages: Sequence[Stage]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._unit = 100 / sum(stage.typical_seconds for stage in stages)
        self._overall = self._progress.add_task("[bold]everything, %", total=100)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._progress.update(self._overall, completed=100)  # its steps sum to that but for rounding
        self._progress.stop()

    def advancing(self, stage: Stage) -> Callable[[], None]:
        """Shows the bar of a stage, and returns what to call after each of its steps."""
        task = self._progress.add_task(stage.name, total=stage.num_steps)

        def advance() -> None:
            self._progress.advance(task)
            self._progress.advance(self._overall, self._unit * stage.typical_seconds / stage.num_steps)

        return advance
