"""How glibc's malloc is told to keep the memory that a training step frees, for the next step on a CPU.

A step frees gigabytes and allocates them again a moment later. glibc's malloc returns freed blocks of 32 MiB and more
to the system at once, and smaller ones when they lie at the end of its heap. The kernel must then clear every page anew
for the next step, which costs an eighth of the time of a step with large tensors. So malloc is told here to keep up to
`MOST_BYTES_KEPT`. Given up: other processes get that memory only when this one has ended.
"""

import ctypes
import os
import platform

MOST_BYTES_KEPT = 2**30
"""Free memory that malloc keeps at the end of its heap. Blocks of this size and more are still returned at once."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Whether malloc was told to keep freed memory. It is not told where it is not glibc's, or where environment
    variables configure it already."""
    is_configured = any(name in os.environ for name in _VARIABLES)
    is_configured = is_configured or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if is_configured or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [mallopt(option, MOST_BYTES_KEPT) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(accepted)
