"""Work on a store shared out among the processes that happen to fill it, ranks of one job or jobs of their own.

Each process takes the next block of completions that is missing and that nobody else has claimed; so they share the
work evenly however fast each is, more may join at any time, and none needs to know how many there are. A claim is a
file that one process made, and no lock: what is stored never depends on it. When only claimed blocks are left, a
process waits for them, and takes over each whose owner has died or shows no progress. It holds no claim while it
waits, and no wait for a claim that stays as it is lasts longer than `PATIENCE_SECONDS`; so none is for ever.

Given up: an even end, since a block is never divided, and use where all processes must compute together (sharded
parameters); share out by rank there.
"""

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from holdfast.batch import ContentId
from holdfast.store.processes import has_ended, machine
from holdfast.store.shard import remove
from holdfast.store.store import SHARD_COMPLETIONS, LogpStore

logger = logging.getLogger(__name__)

CLAIM = ".claim"
CLAIM_SECONDS = 900.0
"""A claim of this age is void; one of this machine as soon as its process has ended. Each batch renews it."""
PATIENCE_SECONDS = 120.0
"""For how long a claim that nobody renews is waited for, by the clock of who waits. Longer than a batch takes, and than
a network's file system hides from one machine what another has done (60 s). Too short costs double work, no more."""
SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.02, 1.0

_Seen = dict[Path, tuple[int, float]]
"""When a claim was last renewed, by its file, and when that was seen to be so first, by this process's clock."""


def claimed_blocks(
    store: LogpStore,
    ids: Sequence[ContentId],
    num_per_block: int = SHARD_COMPLETIONS,
    on_wait: Callable[[int], None] = lambda num_blocks: None,
) -> Generator[list[ContentId], None, None]:
    """Those of `ids` that are missing from `store`, block by block, until none is: each block to be computed and added
    before the next is asked for, when it is written. All processes must give the same `ids` in the same order.

    Of a block's `num_per_block` ids, which stand together in `ids`, only the missing ones are yielded. `on_wait` is
    told of how many blocks are with other processes while there is nothing else to do, each time it is looked."""
    ids = list(dict.fromkeys(ids))
    blocks = [ids[begin : begin + num_per_block] for begin in range(0, len(ids), num_per_block)]
    seen: _Seen = {}
    with_others: dict[Path, list[ContentId]] = {}
    for block in blocks:
        store.refresh()
        if not store.missing(block):
            continue
        path = store.folder / f"{_digest(block)}{CLAIM}"
        if _claim(store, path, seen):
            yield from _work(store, path, block)
        else:
            with_others[path] = block
    yield from _taken_over(store, with_others, seen, on_wait)


def _work(store: LogpStore, path: Path, block: Sequence[ContentId]) -> Generator[list[ContentId], None, None]:
    """What is missing of a block that this process has claimed, if anything is."""
    store.claim = path
    try:
        # Whoever had the claim before wrote the block, and then removed the claim.
        store.refresh()
        if missing := store.missing(block):
            yield missing
            store.flush()
    finally:
        store.claim = None
        remove(path)


def _taken_over(
    store: LogpStore,
    with_others: Mapping[Path, list[ContentId]],
    seen: _Seen,
    on_wait: Callable[[int], None],
) -> Generator[list[ContentId], None, None]:
    """What other processes leave of the blocks that they claimed; returns when all of it is stored."""
    left, pause = dict(with_others), SHORTEST_POLL_SECONDS
    while left:
        num_left = len(left)
        store.refresh()
        left = {path: block for path, block in left.items() if store.missing(block)}
        for path in random.sample([*left], len(left)):  # several wait, and should not want the same one
            if _is_own(path):  # of another generator, which would be waited for in vain
                yield store.missing(left.pop(path))
                store.flush()
                break
            if _claim(store, path, seen):
                yield from _work(store, path, left.pop(path))
                break
        if len(left) < num_left:
            pause = SHORTEST_POLL_SECONDS
        elif left:
            on_wait(len(left))
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(1.5 * pause, LONGEST_POLL_SECONDS)


def _claim(store: LogpStore, path: Path, seen: _Seen) -> bool:
    """True if the work is this process's now. A claim that is void goes; one that cannot be removed is no obstacle."""
    store.check_writable()
    if (_is_void(path) or _is_stale(path, seen)) and not remove(path):
        return True
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    except OSError:  # a claim is not needed; that the store cannot be written to is said elsewhere
        return True
    with contextlib.suppress(OSError), os.fdopen(descriptor, "w") as file:
        file.write(f"{os.getpid()} {machine()}")
    return True


def _owner(path: Path) -> tuple[int, str]:
    """(process, machine). OSError where the claim is gone, ValueError where it is not written yet."""
    process, owner_machine = path.read_text().split(" ", 1)
    return int(process), owner_machine


def _is_own(path: Path) -> bool:
    """Whether this process made a claim."""
    with contextlib.suppress(OSError, ValueError):
        return _owner(path) == (os.getpid(), machine())
    return False


def _is_void(path: Path) -> bool:
    """Whether who made a claim is gone."""
    with contextlib.suppress(OSError, ValueError):
        if time.time() - path.stat().st_mtime > CLAIM_SECONDS:
            return True
        process, owner_machine = _owner(path)
        return owner_machine == machine() and has_ended(process)
    return False


def _is_stale(path: Path, seen: _Seen) -> bool:
    """Whether a claim has been seen for long without being renewed."""
    try:
        renewed = path.stat().st_mtime_ns
    except OSError:
        return False
    if seen.get(path, (None, 0.0))[0] != renewed:
        seen[path] = renewed, time.monotonic()
    return time.monotonic() - seen[path][1] > PATIENCE_SECONDS


def _digest(block: Sequence[ContentId]) -> str:
    return xxhash.xxh3_128_hexdigest(np.array(block, dtype=np.int64).tobytes())
