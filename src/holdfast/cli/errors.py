"""Which errors end a command in a message, and which keep their traceback.

An error that a user can mend is one message without a traceback (`--debug` shows it): a refused run file, an error of
the operating system (a missing file, a full disk), memory that is used up, and a `ValueError` or `TypeError` raised in
this package. Every other exception is a defect and keeps its traceback. Given up: a library's `ValueError` about a
user's value keeps its traceback too, since it may as well be a defect. What can be foreseen is checked in this package
first.

SIGTERM, SIGINT and SIGUSR1 end a command in a message too: what is kept, and how to go on (`holdfast.interruption`).

A command that another process of the run has left in the lurch ends in one line about that process (`holdfast.peers`).

Under `accelerate launch` an error is printed by every process that has it, since it may be the only one.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from holdfast.cli.text import printable
from holdfast.cli.yaml_document import RunFileError
from holdfast.interruption import Interrupted, at_once, finished, handled, interruption_behind
from holdfast.own_error import is_own
from holdfast.peers.guard import guarded, say_and_exit
from holdfast.peers.lost import LostPeerError

RANK = int(rank) if (rank := os.environ.get("RANK", "")).isdecimal() else 0
"""The number of this process among those that a launcher started."""

_console = Console(stderr=True)


@contextmanager
def messages(
    debug: bool, *, of_libraries: bool = False, going_on: Callable[[Interrupted], str] | None = None
) -> Iterator[None]:
    """Ends the command with a message where a user can mend the error. The exit code is 2 for an error in the run file,
    else 1. With `debug`, every error keeps its traceback.

    `of_libraries`: a library's `ValueError` is the user's as well. That is so where a command does nothing but read a
    user's files. `going_on` says with which command a stopped one goes on; by default with itself.
    """
    with handled():
        try:
            at_once()
            with guarded("starting"):
                yield
            finished()
        except BaseException as error:
            if (interrupted := interruption_behind(error)) is not None:
                _print_interruption(interrupted, going_on)
                raise typer.Exit(interrupted.exit_code) from None
            if isinstance(error, LostPeerError):
                say_and_exit(error)
            if debug or not isinstance(error, Exception) or not _is_for_user(error, of_libraries=of_libraries):
                raise
            prefix = f"[rank {RANK}] " if RANK else ""
            text = printable(prefix + _message(error), keeps_lines=True)
            _console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
            raise typer.Exit(2 if isinstance(error, RunFileError) else 1) from error


def _print_interruption(interrupted: Interrupted, going_on: Callable[[Interrupted], str] | None) -> None:
    """What is kept, and how to go on: printed by the first process among those that a launcher started."""
    if RANK == 0:
        done = f"stopped by {interrupted.number.name}. {interrupted.done}".rstrip()
        _console.print(escape(printable(done)), soft_wrap=True, highlight=False)
        command = shlex.join(["holdfast", *sys.argv[1:]]) if going_on is None else going_on(interrupted)
        if command:
            _console.print(escape(printable(f"To go on: {command}")), soft_wrap=True, highlight=False)


_OUT_OF_MEMORY = (
    "the memory is used up: {}. Lower per_device_train_batch_size or max_length, or set tokens_per_batch, which "
    "computes a batch in parts."
)


def _is_memory(error: Exception) -> bool:
    """Whether memory is used up. torch raises RuntimeError where it is the host's, and a class of its own otherwise."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _message(error: Exception) -> str:
    return _OUT_OF_MEMORY.format(_first_line(error)) if _is_memory(error) else str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _is_for_user(error: Exception, *, of_libraries: bool) -> bool:
    if isinstance(error, OSError) or _is_memory(error) or (of_libraries and isinstance(error, ValueError)):
        return True
    return is_own(error)
