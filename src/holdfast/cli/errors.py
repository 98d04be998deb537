"""Which errors end a command in a message, and which keep their traceback.

An error that a user can mend is one message without a traceback (`--debug` shows it): a refused run file, an error of
the operating system (a missing file, a full disk), and a `ValueError` or `TypeError` raised in this package. Every
other exception is a defect and keeps its traceback. Given up: a library's `ValueError` about a user's value keeps its
traceback too, since it may as well be a defect. What can be foreseen is checked in this package first.

Under `accelerate launch` an error is printed by every process that has it, since it may be the only one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import typer
from rich.console import Console
from rich.markup import escape

from holdfast.cli.text import printable
from holdfast.cli.yaml_document import RunFileError

RANK = int(os.environ.get("RANK", "0"))
"""The number of this process among those that a launcher started."""

_console = Console(stderr=True)


@contextmanager
def messages(debug: bool, *, of_libraries: bool = False) -> Iterator[None]:
    """Ends the command with a message where a user can mend the error. The exit code is 2 for an error in the run file,
    else 1. With `debug`, every error keeps its traceback.

    `of_libraries`: a library's `ValueError` is the user's as well. That is so where a command does nothing but read a
    user's files.
    """
    try:
        yield
    except Exception as error:
        message = _of_memory(error) or str(error)
        if debug or not (_of_memory(error) or _is_for_user(error, of_libraries=of_libraries)):
            raise
        prefix = f"[rank {RANK}] " if RANK else ""
        text = printable(prefix + message, keeps_lines=True)
        _console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
        raise typer.Exit(2 if isinstance(error, RunFileError) else 1) from error


def _of_memory(error: Exception) -> str | None:
    """The message where the error says that the memory of the host or of the device is used up; else None."""
    is_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if not (isinstance(error, MemoryError) or is_torch):
        return None
    reason = next(iter(str(error).strip().splitlines()), "").rstrip(".") or type(error).__name__
    return (
        f"the memory is used up: {reason}. Use a smaller training.per_device_train_batch_size, set "
        "training.tokens_per_batch, which computes a batch in parts, or cut long rows with training.max_length."
    )


def _is_for_user(error: Exception, *, of_libraries: bool) -> bool:
    if isinstance(error, OSError) or (of_libraries and isinstance(error, ValueError)):
        return True
    return isinstance(error, ValueError | TypeError) and _raised_in(error.__traceback__).startswith("holdfast.")


def _raised_in(traceback: TracebackType | None) -> str:
    """The name of the module whose code raised the error."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name
