"""What a process tells the others about itself every second, and whenever it begins to do something else."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The state of one process. Times are in seconds, by its own clock."""

    rank: int
    host: str
    pid: int
    machine: str = ""
    """Within it, a process number means one process: host and container."""
    born: str = ""
    """When the process began, as its machine counts; empty where that is unknown."""

    name: str | None = None
    """What it does; None where it does nothing of this package. See `phase.Phase` for this and the next two."""
    is_long: bool = False
    waits: bool = False
    step: int | None = None
    num_collectives: int | None = None
    """How many collective operations it has begun; None where torch does not say."""
    idle: float = 0.0
    """For how long it has shown no sign of life; see `signs`."""
    asleep: float | None = None
    """For how long its main thread has slept, at every look; None where that cannot be seen."""
    locked: float | None = None
    """The same, where waiting for another thread counts as sleep."""
    at: str = ""
    """Where in the code its main thread is: filled in once it is idle."""

    error: str = ""
    """The error with which it left what it did; the phase is then the one in which that was raised."""
    signal: int = 0
    """The signal by which it was asked to end, and left what it did."""
    has_ended: bool = False
    """Whether it ends now."""

    def line(self) -> bytes:
        """The beat as a line of JSON; what is empty is left out."""
        return _line("beat", {name: value for name, value in asdict(self).items() if not _is_empty(value)})

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        """The beat of a record that `line` wrote."""
        return cls(**record)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A process that the run cannot go on without, and what became of it: a sentence without its end."""

    rank: int
    text: str
    exit_code: int = 1
    """What the others exit with."""

    def line(self) -> bytes:
        """The verdict as a line of JSON."""
        return _line("verdict", asdict(self))


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == ""


def _line(kind: str, record: dict[str, Any]) -> bytes:
    return json.dumps({kind: record}).encode() + b"\n"
