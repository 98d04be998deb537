"""Files of a store: each is complete or absent, set aside when damaged, and removed in one step.

A file is written under another name, flushed to the disk, and then renamed. So a file of its own name is complete, even
after a power cut. A folder is removed by renaming it first. Given up: speed, since each file waits for the disk.
"""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

FORMAT = 1
"""The format of shards, manifests and exported files. Raise it when an older version could misread what is written."""

PARTIAL = ".partial"
"""How the name of a file ends while it is written."""
CORRUPT = ".corrupt"
"""How the name of a damaged file ends once it is set aside."""
DROPPED = ".dropped"
"""How the name of a store's folder ends while it is removed."""


class DamagedError(Exception):
    """A file of a store is not as it was written. Its text says how, as a clause."""


def newer_format(path: Path, format_number: Any) -> str:
    """The message of the error for a file whose format this version does not know."""
    return (
        f"the store's file {path} was to be read; it has format {format_number}, and this version of holdfast reads up "
        f"to {FORMAT}. Update holdfast, or choose another folder for the store (`$HOLDFAST_HOME`)."
    )


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file that has its name only once it is complete and on the disk. An error leaves nothing behind."""
    partial = path.with_name(f"{uuid.uuid4().hex}{PARTIAL}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
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


def remove_folder(folder: Path) -> None:
    """Removes a store's folder: at once by renaming it, then file by file. OSError where renaming is not permitted."""
    dropped = folder.with_name(f"{uuid.uuid4().hex}{DROPPED}")
    try:
        os.replace(folder, dropped)
    except FileNotFoundError:
        return
    shutil.rmtree(dropped, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
