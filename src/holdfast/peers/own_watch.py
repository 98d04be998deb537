"""The watch of this process: begun once, when it joins a run of several, and told how the process ends."""

import atexit
import faulthandler
import os
import sys
from collections.abc import Callable
from typing import Any

from holdfast.peers.lost import LostPeerError
from holdfast.peers.watch import Watch

ENDING_SECONDS = 15.0
"""How long a process that has failed may take to end once its script has."""

_watch: Watch | None = None


def begin() -> None:
    """Begins to watch the other processes of the run, once; nothing in a run of one process."""
    global _watch
    environment = os.environ
    if _watch is not None and _watch.process == os.getpid():
        return
    try:
        rank, num_ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        master = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        if not 0 <= rank < num_ranks or num_ranks < 2:
            return
        import holdfast.internals.torch  # noqa: F401  in the main thread, before another thread does

        _watch = Watch(rank, num_ranks, master)
    except (KeyError, ValueError, OSError):
        return
    atexit.register(_end)
    hook = sys.excepthook
    sys.excepthook = lambda kind, error, traceback: _uncaught(hook, kind, error, traceback)
    _watch.start()


def _uncaught(hook: Callable[..., Any], kind: Any, error: BaseException, traceback: Any) -> None:
    """`sys.excepthook`: of a process that is lost, only its name is said; any other error is said, and told."""
    watch = current()
    if watch is not None and isinstance(error, LostPeerError):
        watch.say_and_exit(error.verdict)
    hook(kind, error, traceback)
    _end()


def current() -> Watch | None:
    """The watch of this process; None where there is none."""
    return _watch if _watch is not None and _watch.process == os.getpid() else None


def _end() -> None:
    """Tells the others that this process ends. One that ends by an error may not hang while it does."""
    if (watch := current()) is not None and watch.end():
        faulthandler.dump_traceback_later(ENDING_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
