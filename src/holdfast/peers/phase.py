"""What this process is doing: `doing("saving a checkpoint")` around it, and `at_step(17)` where a step begins.

Announcing costs a few microseconds, and nothing else happens in a run of one process. `listener` is called when the
phase or the step changes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Phase:
    """One thing that a process does. `name` follows "while": `loading the model`."""

    name: str
    is_long: bool = False
    """Whether it may stand still for long, since it waits for files, for the network or for data."""
    waits: bool = False
    """Whether it waits for what other processes do."""


@final
class _State:
    """The phases that are under way, the innermost last, the step of the training, and the last error that left one of
    them, with what was being done."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.step: int | None = None
        self.failed: tuple[BaseException, Phase, int | None] | None = None
        self.listener: Callable[[], object] | None = None

    def changed(self) -> None:
        if self.listener is not None:
            self.listener()


_state = _State()


@contextmanager
def doing(name: str, *, is_long: bool = False, waits: bool = False) -> Iterator[None]:
    """A context in which this process does what `name` says; see `Phase`."""
    _state.phases.append(Phase(name, is_long, waits))
    _state.changed()
    try:
        yield
    except BaseException as error:
        if _state.failed is None or _state.failed[0] not in chain(error):
            _state.failed = error, *_here()
        raise
    finally:
        _state.phases.pop()
        if not _state.phases:
            _state.failed = None
        _state.changed()


def at_step(step: int | None) -> None:
    """From now on, what this process does belongs to that step of the training; None where it belongs to none."""
    if step != _state.step:
        _state.step = step
        _state.changed()


def current() -> tuple[Phase | None, int | None]:
    """What this process is doing, None where it does nothing of this package; and the step of the training."""
    phases = _state.phases
    return (phases[-1] if phases else None), _state.step


def of_error(error: BaseException) -> tuple[Phase | None, int | None]:
    """What was being done when `error`, or one that it came of, was raised."""
    failed = _state.failed
    return failed[1:] if failed is not None and failed[0] in chain(error) else current()


def _here() -> tuple[Phase, int | None]:
    return _state.phases[-1], _state.step


def chain(error: BaseException | None) -> list[BaseException]:
    """The error and those in whose handling it was raised."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def depth() -> int:
    """How many phases are under way, each within the one before."""
    return len(_state.phases)


def listen(listener: Callable[[], object] | None) -> None:
    """Has `listener` called at every change."""
    _state.listener = listener


def words(name: str | None, step: int | None) -> str:
    """A phase in words that follow "it was last seen"."""
    if name is None:
        return "outside of holdfast"
    return f"while {name}" if step is None else f"in step {step} ({name})"
