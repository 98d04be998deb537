"""What happens in a run, an entry for each: a line of JSON in `logs.jsonl`, `events.jsonl` or `samples.jsonl`.

An entry is appended in one write. So a kill leaves at most a last line that is cut, which is no entry, and an entry
that was read once is never changed. A resumed run removes what came after its checkpoint before it appends.

A number that is NaN or infinite is null in its line, and is left out when it is read: all numbers of a `Log` and of an
`Event` are finite.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from holdfast.record.typed_json import from_json, to_json

LOGS, EVENTS, SAMPLES = "logs.jsonl", "events.jsonl", "samples.jsonl"

Numbers = Mapping[str, float]
E = TypeVar("E")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What was logged at a step: every number by name. `seconds` since the run began, without the time between an
    interruption and the resumption."""

    step: int
    epoch: float | None
    seconds: float | None
    numbers: Numbers

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> "Log":
        """The log that a line holds. ValueError where it holds none."""
        return from_json(cls, {"epoch": None, "seconds": None, **_apart(line, ("step", "epoch", "seconds"))})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened at a step: its kind (`sync`, `alarm`, `checkpoint`, `resumed`, `evaluation`, ...), a
    sentence, and numbers by name."""

    step: int
    kind: str
    text: str
    numbers: Numbers

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> "Event":
        """The event that a line holds. ValueError where it holds none."""
        return from_json(cls, _apart(line, ("step", "kind", "text")))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Completions of a held-out prompt at a step: the policy's and the reference's, None without a reference, beside
    those of the data. `reference_version` counts a moving reference's syncs. Completions end after `max_new_tokens`
    tokens at the latest."""

    step: int
    dataset: str
    row: int
    prompt: str
    policy: str
    reference: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    reference_version: int | None = None
    max_new_tokens: int | None = None

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> "Sample":
        """The sample that a line holds. ValueError where it holds none."""
        return from_json(cls, line)


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """Appends an entry as one line. OSError where it cannot be written; then the file is as it was."""
    line = (json.dumps(to_json(entry), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(28, os.strerror(28), str(file))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file, without the last one where it was cut. None is empty where the file is missing."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    return content.split(b"\n")[:-1]


def read_entries(file: Path, of_line: Callable[[dict[str, Any]], E]) -> tuple[E, ...]:
    """The entries of a file in their order; none where it is missing. ValueError names the file and the line that is
    damaged."""
    return tuple(_entry(file, number, line, of_line) for number, line in enumerate(whole_lines(file), 1))


def _entry(file: Path, number: int, line: bytes, of_line: Callable[[dict[str, Any]], E]) -> E:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return of_line(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}, line {number}, was read as an entry of a run's record and is damaged: {error}. Remove the line, "
            "or the folder of the record; the run's checkpoints do not depend on it."
        ) from error


def _apart(line: dict[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """A line with its numbers, all but its `own` keys, under `numbers`; without those that were not finite."""
    numbers = {name: value for name, value in line.items() if name not in own and value is not None}
    return {**{name: line[name] for name in own if name in line}, "numbers": numbers}
