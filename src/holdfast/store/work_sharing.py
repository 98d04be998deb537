"""Fills a store with several processes at once, and resumes a fill that crashed.

The processes may be ranks of one job or jobs of their own; more may join at any time, and none needs to know how many
there are. Each takes the next block of completions that is missing from the store and that no other process has
claimed. So they share the work evenly, however fast each is.

A fill that crashed leaves finished shards and claims. The shards count, so only what is missing is computed again. A
claim is a file that one process made, and no lock: what is stored never depends on it. A claim is void once its process
has ended. When only claimed blocks are left, a process waits for them, and takes over each whose owner has died or
shows no progress for `PATIENCE_SECONDS`. It holds no claim while it waits, so no wait is for ever.

Given up: processes that finish at the same time, since a block is never divided. Processes that must compute together,
since weights are spread over them, take part as one: see `reference.sources.lockstep`.
"""

import contextlib
import logging
import os
import random
import stat
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from holdfast.batch import ContentId
from holdfast.store.files import CLAIM, DamagedError, read_file, remove
from holdfast.store.processes import has_ended, machine
from holdfast.store.store import SHARD_COMPLETIONS, LogpStore

logger = logging.getLogger(__name__)

CLAIM_SECONDS = 900.0
"""A claim is void if it was not renewed for so long. Each batch renews it."""
PATIENCE_SECONDS = 120.0
"""How long a process waits, by its own clock, for a claim that nobody renews. It is more than a batch takes, and more
than a network file system needs to show what another machine has done (60 s). A value too short only costs double
work."""
SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.02, 1.0
"""How long a process waits before it looks at the claims of others again."""

_Renewals = dict[Path, tuple[int, float]]
"""By claim: when its file was last renewed, and when this process first saw that, by its own clock."""


def claimed_blocks(
    store: LogpStore,
    ids: Sequence[ContentId],
    num_per_block: int = SHARD_COMPLETIONS,
    on_wait: Callable[[int], None] = lambda num_blocks: None,
) -> Generator[list[ContentId], None, None]:
    """Yields those of `ids` that are missing from `store`, a block at a time, until none is missing.

    The caller computes and adds each block before it asks for the next; then the block is written. All processes must
    give the same `ids` in the same order. A block is `num_per_block` neighbours in `ids`, of which only the missing
    ones are yielded. While nothing else is to do, `on_wait` is called with the number of blocks of other processes.
    """
    ids = list(dict.fromkeys(ids))
    blocks = [ids[begin : begin + num_per_block] for begin in range(0, len(ids), num_per_block)]
    renewals: _Renewals = {}
    with_others: dict[Path, list[ContentId]] = {}
    for block in blocks:
        store.refresh()
        if not store.missing(block):
            continue
        path = store.folder / f"{_digest(block)}{CLAIM}"
        if _claim(store, path, renewals):
            yield from _work(store, path, block)
        else:
            with_others[path] = block
    yield from _take_over(store, with_others, renewals, on_wait)


def _work(store: LogpStore, path: Path, block: Sequence[ContentId]) -> Generator[list[ContentId], None, None]:
    """What is missing of a block that this process has claimed; nothing, if it is complete by now."""
    store.claim = path
    try:
        # A previous owner wrote the block before it removed its claim.
        store.refresh()
        if missing := store.missing(block):
            yield missing
            store.flush()
    finally:
        store.claim = None
        remove(path)


def _take_over(
    store: LogpStore,
    with_others: Mapping[Path, list[ContentId]],
    renewals: _Renewals,
    on_wait: Callable[[int], None],
) -> Generator[list[ContentId], None, None]:
    """What other processes leave undone of the blocks that they claimed; ends when every block is stored."""
    unfinished, pause = dict(with_others), SHORTEST_POLL_SECONDS
    while unfinished:
        num_unfinished = len(unfinished)
        store.refresh()
        unfinished = {path: block for path, block in unfinished.items() if store.missing(block)}
        for path in random.sample([*unfinished], len(unfinished)):  # in random order, since several processes may wait
            if _is_own(path):  # of another generator of this process, which cannot go on while this one waits
                yield store.missing(unfinished.pop(path))
                store.flush()
                break
            if _claim(store, path, renewals):
                yield from _work(store, path, unfinished.pop(path))
                break
        if len(unfinished) < num_unfinished:
            pause = SHORTEST_POLL_SECONDS
        elif unfinished:
            on_wait(len(unfinished))
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(1.5 * pause, LONGEST_POLL_SECONDS)


def _claim(store: LogpStore, path: Path, renewals: _Renewals) -> bool:
    """Whether this process does the work now. A void claim is removed first, or ignored where it cannot be removed."""
    store.check_writable()
    if (_is_void(path) or _is_stale(path, renewals)) and not remove(path):
        return True
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    except OSError:  # no claim is needed to work; the store itself says when it cannot be written to
        return True
    with contextlib.suppress(OSError), os.fdopen(descriptor, "w") as file:
        file.write(f"{os.getpid()} {machine()}")
    return True


def _owner(path: Path) -> tuple[int, str]:
    """(process, machine). OSError where the claim is gone, ValueError where it is not written yet or is no claim."""
    try:
        process, owner_machine = read_file(path, 4_096).decode().split(" ", 1)
    except DamagedError as error:
        raise ValueError(str(error)) from error
    return int(process), owner_machine


def _is_own(path: Path) -> bool:
    """Whether this process made a claim."""
    with contextlib.suppress(OSError, ValueError):
        return _owner(path) == (os.getpid(), machine())
    return False


def _is_void(path: Path) -> bool:
    """Whether a claim is too old or no file, or its process is one of this machine and has ended."""
    with contextlib.suppress(OSError, ValueError):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or time.time() - status.st_mtime > CLAIM_SECONDS:
            return True
        process, owner_machine = _owner(path)
        return owner_machine == machine() and has_ended(process)
    return False


def _is_stale(path: Path, renewals: _Renewals) -> bool:
    """Whether this process has seen no renewal of a claim for `PATIENCE_SECONDS`."""
    try:
        renewed = path.lstat().st_mtime_ns
    except OSError:
        return False
    if renewals.get(path, (None, 0.0))[0] != renewed:
        renewals[path] = renewed, time.monotonic()
    return time.monotonic() - renewals[path][1] > PATIENCE_SECONDS


def _digest(block: Sequence[ContentId]) -> str:
    return xxhash.xxh3_128_hexdigest(np.array(block, dtype=np.int64).tobytes())
