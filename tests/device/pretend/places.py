"""Where in the sources an operation was asked for."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

HARNESS = str(Path(__file__).parents[1])
"""The folder of this harness; of it only the planted faults ask for operations."""
FAULTS = str(Path(__file__).parents[1] / "faults.py")

PACKAGES = ("holdfast", "transformers", "peft", "accelerate")


class Place(NamedTuple):
    """A line of a file of one of `PACKAGES`."""

    package: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.package}/{self.file}:{self.line} {self.function}"


NOWHERE = Place("", "?", 0, "?")


def frames(start: FrameType | None) -> Iterator[FrameType]:
    """The calls that led to `start`, innermost first, without this harness; in a backward pass those of that pass."""
    while start is not None:
        code = start.f_code
        if code.co_name == "_engine_run_backward":
            return
        if not code.co_filename.startswith(HARNESS) or code.co_filename == FAULTS:
            yield start
        start = start.f_back


def place_of(start: FrameType | None) -> Place | None:
    """The innermost line of one of `PACKAGES`, or of a planted fault; None where there is none."""
    for frame in frames(start):
        found = _place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        if found is not None:
            return found
    return None


def place_of_error(error: BaseException) -> Place:
    """The innermost line of one of `PACKAGES` that the error went through."""
    found, trace = NOWHERE, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(HARNESS) or code.co_filename == FAULTS:
            found = _place(code.co_filename, trace.tb_lineno, code.co_name) or found
        trace = trace.tb_next
    return found


def here() -> FrameType:
    """The caller's frame."""
    return sys._getframe(1)


def _place(filename: str, line: int, function: str) -> Place | None:
    if filename == FAULTS:
        return Place("tests", "device/faults.py", line, function)
    for package in PACKAGES:
        _, found, file = filename.rpartition(f"/{package}/")
        if found and "/tests/" not in filename:
            return Place(package, file, line, function)
    return None
