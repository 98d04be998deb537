"""What stands around everything that needs the other processes: `guarded("training")`.

An error that is only the consequence of another process's end says nothing (`Connection closed by peer`). It leaves the
outermost guard as `LostPeerError`, which names that process. Any other error, and how it was left, is told to the
others, so that they can name this process. In a run of one process a guard only announces a phase.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.interruption import Interrupted, interruptible, interruption_behind
from holdfast.peers import own_watch, phase
from holdfast.peers.beat import Verdict
from holdfast.peers.lost import LostPeerError
from holdfast.peers.watch import Watch

CERTAIN_SECONDS = 15.0
"""How long it may take to learn which process has ended, once an error of communication shows that one has."""
SIGNAL_SECONDS = 12.0
"""The same after a signal, which launchers send to the others when a process has failed."""
_OF_COMMUNICATION = re.compile(
    r"gloo|NCCL|c10d|Connection (closed|reset|refused)|Broken pipe|[Ss]ocket|Timed out waiting|ProcessGroup|TCPStore"
)


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """A context, or a decorator, for what needs the other processes; `name` says what is done, as in `phase.doing`.
    LostPeerError where one of them is lost. Within another guard it only announces the phase. It is `interruptible`."""
    with interruptible(), _guarded(name):
        yield


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    if phase.depth() > 0:
        with phase.doing(name):
            yield
        return
    phase.at_step(None)
    if (own := own_watch.current()) is not None:
        own.enter()
        if own.verdict is not None:
            raise LostPeerError(own.line(own.verdict), own.verdict)
    with phase.doing(name):
        try:
            yield
        except BaseException as error:
            own = own_watch.current()  # it may have begun meanwhile
            if own is not None:
                _leave(own, error)
            raise
    if (own := own_watch.current()) is not None:
        own.leave(None)


def _leave(own: Watch, error: BaseException) -> None:
    """Tells the others how this process leaves what it did. LostPeerError where one of them has ended before."""
    if isinstance(error, LostPeerError):
        raise error
    interrupted = interruption_behind(error)
    verdict = _behind(own, error, interrupted)
    if verdict is not None:
        raise LostPeerError(own.line(verdict), verdict) from error
    own.leave(error, interrupted.number if interrupted is not None else 0)


def _behind(own: Watch, error: BaseException, interrupted: Interrupted | None) -> Verdict | None:
    """The lost process of which `error` is a consequence; None where it is this process's own."""
    if interrupted is not None:
        verdict = own.wait_for_verdict(SIGNAL_SECONDS, needs_all=False)
        return verdict if verdict is not None and verdict.exit_code == 1 else None
    if is_of_communication(error):
        return own.wait_for_verdict(CERTAIN_SECONDS, needs_all=True)
    return None


def is_of_communication(error: BaseException) -> bool:
    """Whether the error, or one that it came of, was raised where processes communicate."""
    return any(
        type(each).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
        or (isinstance(each, RuntimeError) and _OF_COMMUNICATION.search(str(each)) is not None)
        for each in phase.chain(error)
    )


def say_and_exit(error: LostPeerError) -> None:
    """Ends the process at once, with the line about the lost process as its last on stderr."""
    if (own := own_watch.current()) is not None:
        own.say_and_exit(error.verdict)


def advise(advice: Callable[[], str], *, is_default: bool = False) -> None:
    """Has the last line about a lost process end with what `advice` returns: how the run goes on. A default yields to
    what was said before."""
    own = own_watch.current()
    if own is not None and not (is_default and own.is_advised):
        own.advice, own.is_advised = advice, not is_default
