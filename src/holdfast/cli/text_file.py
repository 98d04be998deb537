"""The text of a file that a user named. What is no ordinary file is refused: a pipe would be waited for without end."""

import os
import stat
from pathlib import Path

MAX_BYTES = 1_000_000

_KINDS = {
    stat.S_IFDIR: "it is a directory",
    stat.S_IFIFO: "it is a pipe, and a file is needed",
    stat.S_IFCHR: "it is a device",
    stat.S_IFBLK: "it is a device",
    stat.S_IFSOCK: "it is a socket",
}


class UnreadableError(Exception):
    """A file whose text cannot be read. Its text says why, as a clause."""


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. FileNotFoundError where there is none;
    UnreadableError where it is not an ordinary file, not permitted, too large, or in another encoding."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            content = _content(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    if len(content) > MAX_BYTES:
        raise UnreadableError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableError(f"byte 0x{content[error.start]:02x} in line {line} is not UTF-8") from error


def _content(descriptor: int) -> bytes:
    """The bytes of an open file, or its first ones where there are too many."""
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        raise UnreadableError(_KINDS.get(kind, "it is not an ordinary file"))
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read(MAX_BYTES + 1)
