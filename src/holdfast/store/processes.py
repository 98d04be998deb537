"""Which machine a process runs on, and whether a process of this machine has ended.

Files that processes share name their owner by machine and process number. Given up: asking about processes of other
machines.
"""

import os
import socket
from pathlib import Path


def machine() -> str:
    """A name for the host and the container, within which a process number means one process."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def has_ended(process: int) -> bool:
    """Whether a process of this machine is gone, or is a zombie. False in case of doubt."""
    if os.name != "posix" or process <= 0:  # 0 and below stand for groups of processes
        return process <= 0
    try:
        os.kill(process, 0)  # sends nothing, but fails where there is no such process
        # "number (command) state ..."; a command may itself have brackets and spaces.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (ProcessLookupError, OverflowError):  # no process can have a number so large
        return True
    except (OSError, IndexError, UnicodeDecodeError):
        return False
