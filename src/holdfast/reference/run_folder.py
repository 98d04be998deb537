"""A folder on disk that belongs to one reference of one process, and is removed with it.

Several runs may have one `output_dir`, at once or in turn. So each reference that has files there makes a folder of
random name in `output_dir/_reference/`, and its process locks a file beside the folder. The folder is removed when the
reference is collected, or when Python ends. A killed process leaves its folder, but its lock is free: the next run
finds the free lock and removes the folder. A run that saves checkpoints holds a lock while it trains, so that a second
run in the same folder sees the first.

Some file systems have no locks. There an owner has ended if its process was of this machine and is gone; folders of
other machines are never removed. Given up: mounts whose locks count on one machine only. There a run on another machine
may remove a folder in use. Reading that folder is then an error, never another number.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from holdfast.store.processes import has_ended, machine

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".lock"
MAX_ATTEMPTS = 100
"""How often a lock file is made before something else is said to remove it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that made a lock file, its machine, and whether the lock is of a run that saves or of a folder."""

    process: int
    machine: str
    is_run: bool


@final
class RunFolder:
    """A folder of random name in `root`. It is made when its path is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._path: Path | None = None
        self._finalize: weakref.finalize | None = None

    def path(self) -> Path:
        """The folder's path. No other process writes to the folder. OSError where it cannot be made."""
        if self._path is None:
            lock, descriptor = _new_lock(self.root, is_run=False)
            self._finalize = weakref.finalize(self, _release, lock, descriptor, os.getpid())
            _other_runs(self.root, own_lock=lock)
            self._path = _folder_of(lock)
            self._path.mkdir()
        return self._path

    def remove(self) -> None:
        """Removes the folder and all that is in it, if it was made."""
        if self._finalize is not None:
            self._finalize()
        self._path = self._finalize = None


def remove_left_over(root: Path) -> None:
    """Removes the folders in `root` whose owners have ended, and `root` itself where nothing else is in it."""
    if root.is_dir():
        _other_runs(root, own_lock=None)
        with contextlib.suppress(OSError):  # it is not empty while others use it
            root.rmdir()


@contextlib.contextmanager
def running(root: Path) -> Iterator[None]:
    """A context in which other runs see that this run saves into the folder that holds `root`.

    On entry, folders that killed runs left in `root` are removed, and a warning names each run that is saving there
    already.
    """
    try:
        lock, descriptor = _new_lock(root, is_run=True)
    except OSError:  # a run that cannot write here gets its error when it has to write
        yield
        return
    try:
        for owner in _other_runs(root, own_lock=lock):
            logger.warning(
                "%s is in use by another run (process %d on %s). Each keeps its reference in a folder of its own, but "
                "checkpoints of the same step would replace each other, and both write into one record: give each run "
                "an output_dir.",
                root.parent, owner.process, owner.machine,
            )  # fmt: skip
        yield
    finally:
        _release(lock, descriptor, os.getpid())


def _new_lock(root: Path, *, is_run: bool) -> tuple[Path, int]:
    """A new lock file in `root`, and the descriptor that holds the lock. OSError where the file cannot be made."""
    content = json.dumps(asdict(Owner(process=os.getpid(), machine=machine(), is_run=is_run)))
    for _ in range(MAX_ATTEMPTS):
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f"{secrets.token_hex(8)}{LOCK}"
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileNotFoundError:  # another run has just removed the empty `root`
            continue
        is_locked = _lock(descriptor)
        if is_locked is not False and _is_file(lock, descriptor):
            try:
                os.write(descriptor, content.encode())
            except OSError:  # the disk is full
                _release(lock, descriptor, os.getpid())
                raise
            return lock, descriptor
        os.close(descriptor)  # before it was locked, another run took the file for one of a killed run
    raise OSError(f"no lock file of this process stays in {root}: something else removes it")


def _lock(descriptor: int) -> bool | None:
    """True if the descriptor now holds the lock, False if another holds it, None on a file system without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the file that the descriptor was opened on."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _other_runs(root: Path, *, own_lock: Path | None) -> list[Owner]:
    """The other runs that save checkpoints now. Folders and locks in `root` whose owners have ended are removed."""
    runs: list[Owner] = []
    for lock in sorted(root.glob(f"*{LOCK}")):
        if lock == own_lock:
            continue
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:  # the file is gone, or belongs to another user
            continue
        try:
            owner = _owner(descriptor)
            if _owner_has_ended(owner, _lock(descriptor)):
                if _is_file(lock, descriptor):
                    _remove(lock)
            elif owner is not None and owner.is_run:
                runs.append(owner)
        finally:
            os.close(descriptor)
    return runs


def _owner(descriptor: int) -> Owner | None:
    """The owner that a lock file names; None where the file names none."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, OSError, AttributeError):  # AttributeError: Windows has no `pread`
        return None


def _owner_has_ended(owner: Owner | None, is_locked: bool | None) -> bool:
    """Whether the owner of a lock has ended. `is_locked` is what `_lock` returned for its file."""
    if is_locked is not None:
        return is_locked
    return owner is not None and owner.machine == machine() and has_ended(owner.process)


def _folder_of(lock: Path) -> Path:
    return lock.with_suffix("")


def _remove(lock: Path) -> None:
    """Removes a folder and then its lock file, so that no folder is ever without a lock file."""
    shutil.rmtree(_folder_of(lock), ignore_errors=True)
    if not _folder_of(lock).exists():
        with contextlib.suppress(OSError):
            lock.unlink()


def _release(lock: Path, descriptor: int, process: int) -> None:
    """Removes the folder and the lock of `process`. A fork of that process removes nothing."""
    if os.getpid() != process:
        return
    if fcntl is None:  # Windows cannot remove an open file
        os.close(descriptor)
        _remove(lock)
    else:
        _remove(lock)
        os.close(descriptor)
    with contextlib.suppress(OSError):  # the folder is not empty while others use it
        lock.parent.rmdir()
