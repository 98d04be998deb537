"""Work on a store shared out among the processes that happen to fill it, ranks of one job or jobs of their own.

Each process takes the next block of completions that is missing and that nobody else has claimed; so they share the
work evenly however fast each is, more may join at any time, and none needs to know how many there are. A claim is a
file that one process made, and no lock: what is stored never depends on it. When only claimed blocks are left, they
are computed as well, since who claimed them may have died; so each process repeats at most the blocks in progress at
the end. Given up: use where all processes must compute together (sharded parameters); share out by rank there.
"""

import contextlib
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from holdfast.reference.index import ContentId
from holdfast.reference.shards import remove
from holdfast.reference.store import SHARD_COMPLETIONS, LogpStore

CLAIM = ".claim"
CLAIM_SECONDS = 900.0
"""A claim of another machine is void after this time; one of this machine as soon as its process has ended."""


def claimed_blocks(
    store: LogpStore, ids: Sequence[ContentId], num_per_block: int = SHARD_COMPLETIONS
) -> Iterator[list[ContentId]]:
    """Those of `ids` that are missing from `store`, block by block, until none is: each block to be computed and added
    before the next is asked for, when it is written. All processes must give the same `ids` in the same order.

    Of a block's `num_per_block` ids, which stand together in `ids`, only the missing ones are yielded."""
    ids = list(dict.fromkeys(ids))
    blocks = [ids[begin : begin + num_per_block] for begin in range(0, len(ids), num_per_block)]
    claimed: list[list[ContentId]] = []
    for block in blocks:
        store.refresh()
        if not (missing := store.missing(block)):
            continue
        path = store.folder / f"{_digest(block)}{CLAIM}"
        if not _claim(store, path):
            claimed.append(block)
            continue
        try:
            yield missing
            store.flush()
        finally:
            remove(path)
    random.Random(uuid.uuid4().int).shuffle(claimed)
    for block in claimed:
        store.refresh()
        if missing := store.missing(block):
            yield missing
            store.flush()


def _claim(store: LogpStore, path: Path) -> bool:
    """True if the claim is this process's now."""
    store.check_writable()
    if _is_void(path):
        remove(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    except OSError:  # a claim is not needed; that the store cannot be written to is said elsewhere
        return True
    with contextlib.suppress(OSError), os.fdopen(descriptor, "w") as file:
        file.write(f"{os.getpid()} {socket.gethostname()}")
    return True


def _is_void(path: Path) -> bool:
    """Whether who made a claim is gone."""
    with contextlib.suppress(OSError, ValueError):
        if time.time() - path.stat().st_mtime > CLAIM_SECONDS:
            return True
        process, host = path.read_text().split(" ", 1)
        if host == socket.gethostname() and os.name == "posix":
            try:
                os.kill(int(process), 0)  # asks whether it is there
            except ProcessLookupError:
                return True
    return False


def _digest(block: Sequence[ContentId]) -> str:
    return xxhash.xxh3_128_hexdigest(np.array(block, dtype=np.int64).tobytes())
