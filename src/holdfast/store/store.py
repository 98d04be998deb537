"""The store: reference log-probs on disk, per token, computed once and never stale.

A store is the folder `<root>/<digest of its StoreKey>`. It holds shards, which are only ever added (`shard.py`), and a
manifest (`manifest.py`). The key says what the numbers were computed with, the content id which tokens they are for. A
look-up needs nothing else, so every run that would compute the same number finds it.

There is no list of the shards and no lock: a file whose name is the digest of its bytes is a shard, whoever wrote it. A
kill loses only what was not yet in a shard. A damaged shard is set aside, and its completions count as missing. No path
is absolute, so a folder can be copied. Values stay in the mapped files until they are read: the processes of one
machine share one copy, in the system's cache.

Given up: rows in order, and one big file (`holdfast store gc` merges small shards).
"""

import contextlib
import errno
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from holdfast.batch import ContentId
from holdfast.store.files import (
    LAST_USED,
    DamagedError,
    UnusableError,
    flush_folder,
    set_aside,
    write_durably,
)
from holdfast.store.index import Index, sums_at
from holdfast.store.key import StoreKey
from holdfast.store.manifest import MANIFEST, keys_alike, read_manifest, write_manifest
from holdfast.store.refusals import check_values, reading, warn_unused, writing
from holdfast.store.removal import remove_store
from holdfast.store.shard import Shard, open_shard, shard_paths, write_shard
from holdfast.store.trust import Trust

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHARD_COMPLETIONS = 512
"""A shard is written once this many completions have been added, so a kill loses no more."""
SHARD_SECONDS = 30.0
"""A shard is also written with the first addition after so much time."""

_NUM_THREADS = 8
_NUM_LISTINGS, _NUM_TRIES = 10, 10


def default_root() -> Path:
    """The folder of all stores: `$HOLDFAST_HOME/store`, else `holdfast/store` in the platform's folder for caches."""
    if home := os.environ.get("HOLDFAST_HOME"):
        return Path(home).expanduser() / "store"
    if sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "holdfast" / "store"


@final
class LogpStore:
    """The completions stored under `key` in `root`; made by `open`. Several threads may use it.

    As a context manager it writes what was added when it ends, also where it ends by an exception.
    """

    def __init__(self, root: Path, key: StoreKey) -> None:
        self.key = key
        self.folder = Path(root) / key.digest()
        self._lock = threading.RLock()
        self._shards: list[Shard] = []
        self._seen: set[str] = set()
        self._passed_over: set[str] = set()
        self._index = Index()
        self._buffer: dict[ContentId, Tensor] = {}
        self._flushed_at = time.monotonic()
        self._is_begun = False
        self._alike: tuple[Self, ...] = ()
        self.claim: Path | None = None
        """The claim file under which work goes on (`holdfast.store.work_sharing`); renewed with each addition."""

    @classmethod
    def open(cls, root: Path | str, key: StoreKey) -> Self:
        """The store, all its shards checked. A store that was never written to is empty, and has no folder yet.

        Stores in `root` that hold the same numbers, under another version of a moving reference with the same weights,
        are read as well. Damaged files are set aside under another name, or skipped where that is not permitted, with a
        warning; so are files that cannot be read, or that `holdfast.store.trust` does not believe, which stay in place.
        ValueError if the store was written by a newer version of the package, or its folder cannot be read.
        """
        store = cls._opened_alone(Path(root), key)
        with reading(store.folder):
            alike = keys_alike(Path(root), key)
        store._alike = tuple(cls._opened_alone(Path(root), other) for other in alike)
        return store

    @classmethod
    def _opened_alone(cls, root: Path, key: StoreKey) -> Self:
        store = cls(root, key)
        with reading(store.folder):
            if store.folder.is_dir():
                store._check_manifest()
                store.refresh()
                store._touch()
        return store

    # Reading ----------------------------------------------------------------------------------------------------------

    def get(self, ids: Iterable[ContentId], lengths: Iterable[int] | None = None) -> dict[ContentId, Tensor]:
        """The log-probs (fp32 `[n]`, nats, copies) of those of `ids` that are stored.

        `lengths` are their numbers of tokens; a completion that is stored with another number counts as missing.
        """
        ids = list(ids)
        lengths = None if lengths is None else list(lengths)
        with self._lock:
            logps = self._buffered(ids, lengths)
            located = self._index.find(_array(ids), None if lengths is None else np.array(lengths, dtype=np.int64))
            rows = np.flatnonzero(located.shard >= 0)
            shards, starts, stops = located.shard[rows], located.start[rows], located.start[rows] + located.length[rows]
            slices = zip(rows.tolist(), shards.tolist(), starts.tolist(), stops.tolist(), strict=True)
            for row, shard, start, stop in slices:
                stored = self._shards[shard].logps[start:stop]
                logps.setdefault(ids[row], torch.from_numpy(stored.copy()))
        for other in self._alike:
            rows = [row for row, content_id in enumerate(ids) if content_id not in logps]
            logps |= other.get([ids[row] for row in rows], None if lengths is None else [lengths[row] for row in rows])
        return logps

    def sums(self, content: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The sum (fp64 `[Q]`, nats) of the log-probs of each of these completions, given by content id `[Q 2]` and
        number of tokens `[Q]`; NaN where it is not stored. ValueError where what was added cannot be written."""
        self.flush()
        with self._lock:
            sums = sums_at(self._index.find(content, lengths), [shard.logps for shard in self._shards])
        for other in self._alike if np.isnan(sums).any() else ():
            sums = np.where(np.isnan(sums), other.sums(content, lengths), sums)
        return sums

    def missing(self, ids: Iterable[ContentId], lengths: Iterable[int] | None = None) -> list[ContentId]:
        """Those of `ids` that are not stored (see `get`), each once, in their order."""
        ids = list(ids)
        lengths = None if lengths is None else list(lengths)
        with self._lock:
            buffered = self._buffered(ids, lengths)
            located = self._index.find(_array(ids), None if lengths is None else np.array(lengths, dtype=np.int64))
        rows = np.flatnonzero(located.shard < 0).tolist()
        for other in self._alike:
            logps = other.get([ids[row] for row in rows], None if lengths is None else [lengths[row] for row in rows])
            rows = [row for row in rows if ids[row] not in logps]
        return [content_id for content_id in dict.fromkeys(ids[row] for row in rows) if content_id not in buffered]

    def has(self, content_id: ContentId, length: int | None = None) -> bool:
        """Whether a completion is stored (see `get`)."""
        return not self.missing([content_id], None if length is None else [length])

    def refresh(self) -> int:
        """Reads what other processes have written since the store was opened or last refreshed; the number of
        completions that are new."""
        with self._lock:
            before = self._index.num_completions
            damaged: list[tuple[Path, DamagedError]] = []
            # A shard that is gone before it is opened was merged into another, which was written first: list again.
            for _ in range(_NUM_LISTINGS):
                if not self._read_new(damaged):
                    break
            if damaged:
                self._set_aside(damaged)
            return self._index.num_completions - before

    @property
    def num_completions(self) -> int:
        """Number of completions, in shards or still in memory."""
        return self._index.num_completions + len(self._buffer)

    @property
    def num_tokens(self) -> int:
        """Number of their tokens."""
        return self._index.num_tokens + sum(len(logps) for logps in self._buffer.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards that have been opened."""
        return sum(shard.num_bytes for shard in self._shards)

    # Writing ----------------------------------------------------------------------------------------------------------

    def add(self, logps: Mapping[ContentId, Tensor]) -> None:
        """Adds the log-probs (fp32 `[n]`) of completions; those that are stored already stay as they are.

        They are written with the next shard. ValueError where a completion is new and cannot be written, or where its
        log-probs are no finite fp32 vector.
        """
        tensors = {content_id: value.detach().cpu() for content_id, value in logps.items()}
        check_values(tensors)
        with self._lock:
            for content_id in self.missing(tensors, [len(value) for value in tensors.values()]):
                self.check_writable()
                if content_id in self._buffer:  # with another length
                    self.flush()
                self._buffer[content_id] = tensors[content_id].clone()
            if self.claim is not None:
                with contextlib.suppress(OSError):
                    os.utime(self.claim)
            is_late = time.monotonic() - self._flushed_at >= SHARD_SECONDS
            if len(self._buffer) >= SHARD_COMPLETIONS or (self._buffer and is_late):
                self.flush()

    def flush(self) -> None:
        """Writes what was added since the last shard as a new one.

        ValueError where that is not possible; it stays in memory, and a later call tries again.
        """
        with self._lock:
            if not self._buffer:
                return
            content = _array(self._buffer)
            lengths = np.array([len(value) for value in self._buffer.values()], dtype=np.int64)
            logps = torch.cat(list(self._buffer.values())).numpy()
            with self._writing(f"{len(lengths)} completions ({16 * len(lengths) + 4 * len(logps):,} bytes)"):
                path = self._in_folder(lambda: write_shard(self.folder, self.key.digest(), content, lengths, logps))
                shard = self._opened(path, None)
                if isinstance(shard, DamagedError):
                    raise OSError(errno.EIO, f"read back, {shard}")
            self._buffer.clear()
            self._flushed_at = time.monotonic()
            self._passed_over.discard(path.name)
            self._touch()
            if shard is None:  # merged already
                self.refresh()
            elif shard.name not in self._seen:
                self._include([shard])

    def check_writable(self) -> None:
        """ValueError where no shard could be written. Asked before a long computation."""
        if not self._is_begun:
            with self._writing("a manifest and shards"):
                self._in_folder(self._check_writable)
            self._is_begun = True

    def drop(self) -> None:
        """Removes the store from the disk, in one piece. What is not the store's stays, with a warning, and so does a
        folder that is not proved to be a store. OSError where that is not permitted."""
        with self._lock:
            try:
                left = remove_store(self.folder)
            except ValueError as error:
                logger.warning("%s", error)
            else:
                if left:
                    logger.warning("%s stays, with what is not the store's: %s", self.folder, ", ".join(map(str, left)))
            self._buffer.clear()
            self._shards.clear()
            self._seen.clear()
            self._passed_over.clear()
            self._index = Index()
            self._is_begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Writes what was added. A failure to write is logged, not raised, where an exception is under way."""
        if error is None:
            self.flush()
            return
        try:
            self.flush()
        except (ValueError, OSError) as second:
            logger.error("%s", second)

    # Shards, manifest and errors --------------------------------------------------------------------------------------

    def _buffered(self, ids: Sequence[ContentId], lengths: Sequence[int] | None) -> dict[ContentId, Tensor]:
        if not self._buffer:
            return {}
        buffered = {row: self._buffer[content_id] for row, content_id in enumerate(ids) if content_id in self._buffer}
        return {
            ids[row]: value.clone() for row, value in buffered.items() if lengths is None or len(value) == lengths[row]
        }

    def _read_new(self, damaged: list[tuple[Path, DamagedError]]) -> bool:
        """Opens the shards in the folder that were not seen yet; True if some were gone by then."""
        known = self._seen | self._passed_over
        paths = [path for path in shard_paths(self.folder) if path.name not in known]
        trust = Trust.of(self.folder)
        if len(paths) > 1:
            # Hashing frees the interpreter lock, and a disk may be slow to answer.
            with ThreadPoolExecutor(_NUM_THREADS) as threads:
                opened = list(threads.map(self._opened, paths, itertools.repeat(trust)))
        else:
            opened = [self._opened(path, trust) for path in paths]
        unreadable = [
            (path, error) for path, error in zip(paths, opened, strict=True) if isinstance(error, DamagedError)
        ]
        damaged += unreadable
        self._passed_over |= {path.name for path, _ in unreadable}
        self._include([shard for shard in opened if isinstance(shard, Shard)])
        return any(shard is None for shard in opened)

    def _opened(self, path: Path, trust: Trust | None) -> Shard | DamagedError | None:
        """The shard; or how it is damaged; or None if it is gone."""
        try:
            return open_shard(path, self.folder.name, trust)
        except DamagedError as error:
            return error
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return DamagedError("the disk cannot read it")

    def _include(self, shards: list[Shard]) -> None:
        self._index.add(shards)
        self._shards += shards
        self._seen |= {shard.name for shard in shards}

    def _set_aside(self, damaged: list[tuple[Path, DamagedError]]) -> None:
        unusable = [(path, error) for path, error in damaged if isinstance(error, UnusableError)]
        if unusable:
            warn_unused(self.folder, "file(s)", unusable, "left in place, since they may be sound")
        damaged = [(path, error) for path, error in damaged if not isinstance(error, UnusableError)]
        if damaged:
            are_moved = [set_aside(path) for path, _ in damaged]
            self._passed_over -= {path.name for (path, _), is_moved in zip(damaged, are_moved, strict=True) if is_moved}
            left = "left in place, since renaming them is not permitted"
            then = "renamed to *.corrupt" if all(are_moved) else left
            warn_unused(self.folder, "damaged file(s)", damaged, then)

    def _check_manifest(self) -> None:
        """Sets a damaged manifest aside; writes one where there is none and that is permitted."""
        try:
            read_manifest(self.folder)
            return
        except DamagedError as error:
            self._set_aside([(self.folder / MANIFEST, error)])
            if isinstance(error, UnusableError) and (self.folder / MANIFEST).exists():
                return
        except FileNotFoundError:
            pass
        with contextlib.suppress(OSError):
            write_manifest(self.folder, self.key)

    def _begin(self) -> None:
        """Makes the folder and its manifest. OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flush_folder(self.folder.parent)
        write_manifest(self.folder, self.key)

    def _check_writable(self) -> None:
        if (self.folder / LAST_USED).is_dir():
            set_aside(self.folder / LAST_USED)
        write_durably(self.folder / LAST_USED, b"", 0o666)  # others who use the store touch it

    def _in_folder(self, write: Callable[[], T]) -> T:
        """What `write` returns, in a folder that has a manifest. Where another process drops the store meanwhile, it is
        begun and written again."""
        for _ in range(_NUM_TRIES):
            with contextlib.suppress(FileNotFoundError):
                if not (self.folder / MANIFEST).exists():
                    self._begin()
                return write()
        self._begin()
        return write()

    def _touch(self) -> None:
        """Marks the store as used now, where that is permitted."""
        with contextlib.suppress(OSError):
            try:
                os.utime(self.folder / LAST_USED)
            except FileNotFoundError:
                os.close(os.open(self.folder / LAST_USED, os.O_WRONLY | os.O_CREAT | os.O_EXCL))

    def _writing(self, content: str) -> contextlib.AbstractContextManager[None]:
        return writing(self.folder, content, self._index.num_completions, self.num_bytes)


def _array(ids: Iterable[ContentId]) -> np.ndarray:
    return np.array(list(ids), dtype=np.int64).reshape(-1, 2)
