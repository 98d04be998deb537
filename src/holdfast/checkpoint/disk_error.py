"""Errors of a disk that is full or cannot be written to, whichever library has them, as one message.

Python raises OSError. safetensors and tokenizers raise errors of their own with the number of the system's error in
their text, and torch says at which byte it stopped. The message says what was to be written and where, the reason, how
many bytes are free, and how to go on. Given up: the number of bytes that would have been needed.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from holdfast.store.files import free_bytes

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NUMBER = re.compile(r"(?:os error |\[Errno )(\d+)")
_CUT = ("unexpected pos", "PytorchStreamWriter", "inline_container", "file write failed", "iostream error")
"""What torch says where its archive could not be written whole."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DiskError:
    """Why a file could not be written, and whether that is for want of room."""

    reason: str
    is_full: bool

    @classmethod
    def of(cls, error: BaseException) -> "DiskError | None":
        """The error of the disk that `error` stands for; None where it stands for none."""
        if isinstance(error, OSError):
            if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
                return None
            return cls(reason=error.strerror or os.strerror(error.errno), is_full=error.errno in _FULL)
        if found := _NUMBER.search(str(error)):
            number = int(found[1])
            return cls(reason=os.strerror(number), is_full=number in _FULL)
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _CUT):
            before = error.__cause__ or error.__context__
            return (cls.of(before) if before is not None else None) or cls(
                reason="a file could not be written to its end", is_full=True
            )
        return None


@contextmanager
def writing(content: str, folder: Path, way_on: Callable[[], str]) -> Iterator[None]:
    """Turns an error of the disk into a ValueError: `content` was to be written to `folder`, why it was not, and how to
    go on. `way_on()` is a clause that follows "Free some space" or "Change its permissions"."""
    try:
        yield
    except Exception as error:
        found = DiskError.of(error)
        if found is None:
            raise
        if found.is_full:
            raise ValueError(
                f"{content} was to be written to {folder}, but there is no room for it: {found.reason}, "
                f"{_free(folder)} bytes are free. What was written of it is removed. Free some space there (or raise "
                f"the limit that was met), then {way_on()}."
            ) from error
        raise ValueError(
            f"{content} was to be written to {folder}, which cannot be written to ({found.reason}). What was written "
            f"of it is removed. Mend that (its permissions, its disk), then {way_on()}."
        ) from error


def _free(folder: Path) -> str:
    try:
        return f"{free_bytes(folder):,}"
    except OSError:
        return "an unknown number of"
