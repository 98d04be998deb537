"""On a CPU, the memory that a step frees is kept for the next one.

A step frees gigabytes and takes them again a moment later. glibc's malloc gives blocks of 32 MiB and more back to the
system at once, and others as soon as they lie at the end of its heap, so that the next step's are cleared page by page
by the kernel: an eighth of the time of a step with large tensors. Here it is told to keep up to `KEPT_BYTES`.

Given up: other processes may use that memory only when this one has ended.
"""

import ctypes
import os
import platform

KEPT_BYTES = 2**30
"""Free memory that is kept at the end of the heap, and the size from which blocks are given back all the same."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Whether glibc's malloc will keep it: not where there is another, nor where the environment tells it otherwise."""
    is_told = any(name in os.environ for name in _VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if is_told or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(what, KEPT_BYTES) == 1 for what in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(done)
