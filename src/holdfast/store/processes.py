"""Who is who among processes that share files: on which machine one runs, and whether it has ended."""

import os
import socket
from pathlib import Path


def machine() -> str:
    """Where the numbers of processes mean the same: containers may have one host name, and their own numbers."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def has_ended(process: int) -> bool:
    """Whether a process of this machine is gone, or waits for nothing but that its parent notices; if in doubt, not."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)  # asks whether it is there
        # "number (command) state ...", and a command may have brackets and spaces.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except ProcessLookupError:
        return True
    except (OSError, IndexError):
        return False
