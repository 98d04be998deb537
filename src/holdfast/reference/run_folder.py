"""A folder on disk that belongs to one reference of one process, and goes with it.

Several runs may have one `output_dir`, at once or in turn. So each reference that keeps files there makes a folder of
random name in `output_dir/_reference/`, and its process holds a lock on a file beside it. The folder is removed when
the reference goes or Python ends. A kill leaves it; a lock that is free then says that its owner has ended, and the
next run removes the folder. A run that saves holds a lock too while it trains, by which a second one sees the first.

On a file system without locks, an owner has ended if its process was of this machine and is gone; folders of other
machines stay there. Given up: mounts on which locks count on one machine only. There a run of another machine may
remove a folder in use, and who reads it gets an error, never other numbers.
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
MOST_TRIES = 100


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who holds a lock: its process and machine, and whether it is a run that saves or one reference's files."""

    process: int
    machine: str
    is_run: bool


@final
class RunFolder:
    """A folder of its own in `root`, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._path: Path | None = None

    def path(self) -> Path:
        """The folder, which nobody else writes to. OSError where it cannot be made."""
        if self._path is None:
            lock, descriptor = _claimed(self.root, is_run=False)
            weakref.finalize(self, _give_up, lock, descriptor, os.getpid())
            _living_runs(self.root, but=lock)
            self._path = _folder_of(lock)
            self._path.mkdir()
        return self._path


@contextlib.contextmanager
def running(root: Path) -> Iterator[None]:
    """A context in which other runs see that this one saves into the folder that holds `root`. What killed runs have
    left in `root` is removed on entering it. One line of the log says so where another run is in it already."""
    try:
        lock, descriptor = _claimed(root, is_run=True)
    except OSError:  # what cannot be written is said where something has to be
        yield
        return
    try:
        for owner in _living_runs(root, but=lock):
            logger.warning(
                "%s is in use by another run (process %d on %s). Each keeps its reference in a folder of its own, but "
                "checkpoints of the same step would replace each other: give each run an output_dir.",
                root.parent, owner.process, owner.machine,
            )  # fmt: skip
        yield
    finally:
        _give_up(lock, descriptor, os.getpid())


def _claimed(root: Path, *, is_run: bool) -> tuple[Path, int]:
    """A new lock file in `root`, and the descriptor that holds its lock. OSError where it cannot be made."""
    content = json.dumps(asdict(Owner(process=os.getpid(), machine=machine(), is_run=is_run)))
    for _ in range(MOST_TRIES):
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f"{secrets.token_hex(8)}{LOCK}"
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileNotFoundError:  # another run has just removed `root`, which was empty
            continue
        is_locked = _lock(descriptor)
        if is_locked is not False and _is_file(lock, descriptor):
            os.write(descriptor, content.encode())
            return lock, descriptor
        os.close(descriptor)  # another run took it for left over before it was locked
    raise OSError(f"no lock file of this process stays in {root}: something else removes it")


def _lock(descriptor: int) -> bool | None:
    """True if the lock is this descriptor's now, False if it is another's, None where there are no locks."""
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


def _living_runs(root: Path, *, but: Path) -> list[Owner]:
    """The other runs that save. What owners that have ended left in `root` is removed."""
    living: list[Owner] = []
    for lock in sorted(root.glob(f"*{LOCK}")):
        if lock == but:
            continue
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:  # gone, or another user's
            continue
        try:
            owner = _owner(descriptor)
            if _is_over(owner, _lock(descriptor)):
                if _is_file(lock, descriptor):
                    _remove(lock)
            elif owner is not None and owner.is_run:
                living.append(owner)
        finally:
            os.close(descriptor)
    return living


def _owner(descriptor: int) -> Owner | None:
    """Who made a lock file; None where that is not written."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, OSError, AttributeError):  # `pread` is POSIX's
        return None


def _is_over(owner: Owner | None, is_locked: bool | None) -> bool:
    """Whether the owner of a lock has ended, after `is_locked` was tried."""
    if is_locked is not None:
        return is_locked
    return owner is not None and owner.machine == machine() and has_ended(owner.process)


def _folder_of(lock: Path) -> Path:
    return lock.with_suffix("")


def _remove(lock: Path) -> None:
    """A folder, and then its lock file, so that no folder is ever without."""
    shutil.rmtree(_folder_of(lock), ignore_errors=True)
    if not _folder_of(lock).exists():
        with contextlib.suppress(OSError):
            lock.unlink()


def _give_up(lock: Path, descriptor: int, process: int) -> None:
    """What `process` owns is removed; nothing by its forks."""
    if os.getpid() != process:
        return
    if fcntl is None:  # Windows removes no open file
        os.close(descriptor)
        _remove(lock)
    else:
        _remove(lock)
        os.close(descriptor)
    with contextlib.suppress(OSError):  # others are still in it
        lock.parent.rmdir()
