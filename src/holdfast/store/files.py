"""Files of a store: each is complete or absent, read without trust in what it is, and set aside when damaged.

A file is written under another name, flushed to the disk, and then renamed. So a file of its own name is complete, even
after a power cut. Whatever else has such a name (a folder, a pipe, a device, a link to nothing) is damage, and nothing
waits for it. Given up: speed, since each file waits for the disk.
"""

import errno
import json
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1
"""The format of shards, manifests and exported files. Raise it when an older version could misread what is written."""

PARTIAL = ".partial"
"""How the name of a file ends while it is written."""
CORRUPT = ".corrupt"
"""How the name of a damaged file ends once it is set aside."""
DROPPED = ".dropped"
"""How the name of a store's folder ends while it is removed."""
CLAIM = ".claim"
"""How the name of a claim's file ends (`holdfast.store.work_sharing`)."""
LAST_USED = "last-used"
"""The file whose time of change says when the store was last used."""


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_BROKEN = {errno.EIO: "the disk cannot read it", errno.ELOOP: "it is a link to itself", errno.ENXIO: "it is a device"}


class DamagedError(Exception):
    """A file of a store is not as it was written. Its text says how, as a clause."""


class UnusableError(DamagedError):
    """A file of a store that this process cannot read or must not believe. It may be sound, so it stays in place."""


class NewerFormatError(ValueError):
    """A file has a format that this version of the package does not know."""


def open_file(path: Path) -> BinaryIO:
    """The file at `path`, open for reading. Nothing is waited for.

    DamagedError where it is no file, UnusableError where it may not be read or is a link to nothing, FileNotFoundError
    if it is gone.
    """
    try:
        _check_kind(path.stat())  # before it is opened: to open a device may have an effect
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        file = os.fdopen(os.open(path, flags), "rb")
        try:
            _check_kind(os.fstat(file.fileno()))
        except DamagedError:
            file.close()
            raise
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise UnusableError(f"it cannot be read: {error.strerror}") from error
        if error.errno in _BROKEN:
            raise DamagedError(_BROKEN[error.errno]) from error
        if error.errno in (errno.ENOENT, errno.ESTALE):
            if path.is_symlink():
                raise UnusableError("it is a link to nothing") from error
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        raise
    return file


def _check_kind(status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise DamagedError(f"it is {_KINDS.get(kind, 'something else')}, not a file")


def read_file(path: Path, most_bytes: int) -> bytes:
    """The bytes of a small file. DamagedError where it has more than `most_bytes`; and the errors of `open_file`."""
    with open_file(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise DamagedError(f"it has more than {most_bytes:,} bytes")
    return data


def parsed_json(data: bytes) -> dict[str, Any]:
    """The JSON object that `data` are. DamagedError where they are none, or one that nests too deep to be read."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError("it is not JSON that can be read") from error
    if not isinstance(found, dict):
        raise DamagedError("it is something else")
    return found


def is_newer(format_number: Any, known: int) -> bool:
    """Whether a format is newer than the `known` one. DamagedError where it is no number of a format."""
    if not isinstance(format_number, int) or isinstance(format_number, bool) or not 1 <= format_number < 1 << 31:
        raise DamagedError("its format is no number")
    return format_number > known


def newer_format(path: Path, format_number: Any) -> str:
    """The message of the error for a file whose format this version does not know."""
    return (
        f"the store's file {path} was to be read; it has format {format_number}, and this version of holdfast reads up "
        f"to {FORMAT}. Update holdfast, or choose another folder for the store (`$HOLDFAST_HOME`)."
    )


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes a file that has its name only once it is complete and on the disk. An error leaves nothing behind.

    By default nobody but its owner may change it, so its owner is its author.
    """
    partial = path.with_name(f"{uuid.uuid4().hex}{PARTIAL}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:  # also where the process is asked to end
        remove(partial)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk. Windows does so by itself, and has no call for it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path) -> bool:
    """Renames a damaged file so that it is not read again; False where that is not permitted."""
    try:
        os.replace(path, path.with_name(path.name + CORRUPT))
    except FileNotFoundError:  # another process did it
        return True
    except OSError:
        return False
    return True


def remove(path: Path) -> bool:
    """Removes a file; False where that is not permitted, or where Windows still has it open."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
