"""The thread that tells the other processes of the run that this one lives, and ends this one when one of them is lost.

`own_watch.begin` starts it in a run of several processes. It touches no collective operation. When it finds by the rule
in `verdict` that another process is lost, or hears it from one that did, it tells the others, and gives the main thread
`GRACE_SECONDS` to come to its own error and unwind. A main thread that does not, since it waits in a collective
operation where no signal and no exception reaches it, is ended with the process: the last line on stderr then names the
process that was lost. A lost process of this machine that is stopped is killed, since its own launcher would wait for
it. Nothing is ended while this process does nothing of this package.

Given up: processes that the launcher starts and that are lost before they come here, while they import.
"""

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

from holdfast import interruption
from holdfast.peers import phase
from holdfast.peers.beat import Beat, Verdict
from holdfast.peers.links import Link, Links, neighbours
from holdfast.peers.signs import Signs, born, seconds_used, state_of
from holdfast.peers.verdict import Peer, gone, is_behind, judge

LIMIT_SECONDS = 30.0
"""How long a process may be silent, or hang."""
BEAT_SECONDS = 1.0
MEETING_TURN_SECONDS = 0.05
"""How often a process looks for others before it knows them all."""
GRACE_SECONDS, SAVING_SECONDS = 5.0, 15.0
"""How long the main thread may take to end by itself once a process is lost; the latter where it writes files."""
STUCK_SECONDS = 20.0
"""How long this process may stand still after another one has ended, before it counts as unable to go on."""
RECONNECT_SECONDS = 4.0
"""How long the end of a connection may be the network's, where the other process is on another machine."""
SUSPENDED_SECONDS = 5.0
"""Where this thread itself did not run for so long, this process was suspended, and what it missed proves nothing."""


@final
class Watch:
    """The watch of one process over the others. Any thread may call it."""

    def __init__(self, rank: int, num_ranks: int, master: tuple[str, int]) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.process = os.getpid()
        self.verdict: Verdict | None = None
        self.limit = LIMIT_SECONDS
        self.advice: Callable[[], str] = str
        """Says how the run goes on."""
        self.is_advised = False
        self._links = Links(rank, num_ranks, master)
        self._neighbours = neighbours(rank, num_ranks)
        self._peers: dict[int, Peer] = {}
        self._signs = Signs()
        self._own = Beat(
            rank=rank, host=socket.gethostname(), pid=os.getpid(), machine=_machine(), born=born(os.getpid())
        )
        self._fate: dict[str, Any] = {}
        self._collectives: int | None = None
        self._judged_at = self._concluded_at = 0.0
        self._moved_at = time.monotonic()
        self._position: tuple[Any, ...] = ()
        self._is_published = False
        self._is_meeting = True
        self._changed = threading.Condition()

    def start(self) -> None:
        """Starts the thread."""
        phase.listen(self.tell)
        threading.Thread(target=self._run, name="holdfast peers", daemon=True).start()

    # --- what the main thread says and asks ---------------------------------------------------------------------------

    def tell(self) -> bool:
        """Tells the others now what this process does; whether all was sent."""
        if os.getpid() != self.process:
            return True
        return self._links.send_all(self._beat().line())

    def leave(self, error: BaseException | None, number: int = 0) -> None:
        """Tells the others that this process has left what it did: by `error`, or asked by the signal `number`."""
        if error is not None:
            doing, step = phase.of_error(error)
            self._fate = {"name": doing.name if doing else None, "step": step}
            self._fate |= {"signal": number} if number else {"error": described(error)}
        self._send_surely()

    def enter(self) -> None:
        """Forgets how this process left what it did before."""
        self._fate = {}

    def end(self) -> bool:
        """Tells the others that this process ends; whether it does by an error."""
        self._fate = {**self._fate, "has_ended": True}
        self._send_surely()
        return "error" in self._fate or self.verdict is not None

    def wait_for_verdict(self, seconds: float, *, needs_all: bool) -> Verdict | None:
        """Which process is lost, once that is known, at most after `seconds`; None where none is. With `needs_all`,
        this process cannot go on without any of them, so one that has just ended is lost. Otherwise it is known that
        none is as soon as all have been heard of."""
        began = time.monotonic()

        def is_known() -> bool:
            if self.verdict is not None or needs_all:
                return self.verdict is not None or self._gone() is not None
            return all(_is_settled(peer, began) for peer in [*self._peers.values()])

        with self._changed:
            self._changed.wait_for(is_known, timeout=seconds)
        if self.verdict is None and needs_all and (found := self._gone()) is not None:
            self._conclude(found)
        return self.verdict

    def meet(self, seconds: float) -> list[int]:
        """Waits until all processes that this one watches were heard of; the ranks that were not after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_met_all() or self.verdict is not None, timeout=seconds)
        self._is_meeting = False
        return [rank for rank in self._neighbours if rank not in self._peers]

    def _has_met_all(self) -> bool:
        return not self._is_meeting or all(rank in self._peers for rank in self._neighbours)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _send_surely(self) -> None:
        """Sends what this process is at, and waits a moment where the network is slow."""
        until = time.monotonic() + 1.0
        while not self.tell() and time.monotonic() < until:
            time.sleep(0.01)

    def _beat(self) -> Beat:
        doing, step = phase.current()
        beat = replace(self._own, step=step, num_collectives=self._collectives)
        if doing is not None:
            beat = replace(beat, name=doing.name, is_long=doing.is_long, waits=doing.waits)
        return replace(beat, **self._fate)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self.process == os.getpid():
            try:
                self._turn()
            except Exception as error:  # a watch that fails must not fail the run
                if os.environ.get("HOLDFAST_DEBUG"):
                    sys.stderr.write(f"holdfast peers: {error!r}\n")
                time.sleep(BEAT_SECONDS)

    def _turn(self) -> None:
        """What is done about once a second."""
        now, began = time.monotonic(), self._judged_at or time.monotonic()
        if now - began > SUSPENDED_SECONDS:
            for peer in self._peers.values():
                peer.heard_at, peer.awaited_since = now, None
        self._judged_at = now
        self._look()
        self._connect()
        self.tell()
        self._notify()
        until = now + (BEAT_SECONDS if self._has_met_all() else MEETING_TURN_SECONDS)
        while (left := until - time.monotonic()) > 0:
            self._listen(left)
        self._judge(time.monotonic())
        self._end_if_due(time.monotonic())

    def _look(self) -> None:
        from holdfast.internals.torch import num_collectives

        self._signs.look()
        with contextlib.suppress(Exception):
            self._collectives = num_collectives()
        idle = self._signs.idle
        at = self._signs.place() if idle > self.limit / 2 else ""
        seen = {"idle": idle, "asleep": self._signs.asleep, "locked": self._signs.locked, "at": at}
        self._own = replace(self._own, **seen)
        position = (self._collectives, *phase.current(), idle < BEAT_SECONDS)
        if position != self._position or idle < BEAT_SECONDS:
            self._position, self._moved_at = position, time.monotonic()

    def _connect(self) -> None:
        """Makes the connections that are missing; of two processes the one of the higher rank makes it."""
        if not self._is_published:
            self._is_published = self._links.publish()
        missing = [
            rank for rank in self._neighbours if rank < self.rank and not {rank} & {*self._links.links, *self._peers}
        ]
        self._greet(self._links.dial(missing) if missing and self._is_published else [])

    def _greet(self, made: list[Link]) -> None:
        for link in made:
            with contextlib.suppress(OSError):
                link.send(self._beat().line() + (self.verdict.line() if self.verdict else b""))

    def _listen(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            for each in self._links.sockets():
                selector.register(each, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(seconds)]
        own = [link.socket for link in self._links.links.values()]
        if any(each not in own for each in ready):
            self._greet(self._links.accept())
        for rank, link in [*self._links.links.items()]:
            if link.socket in ready:
                self._hear_all(rank, link)

    def _hear_all(self, rank: int, link: Link) -> None:
        """Hears what has come over a connection: the last words of a process that ended and its end count at once."""
        records, is_open = link.received()
        with self._changed:
            for record in records:
                self._hear(rank, record, is_open=is_open)
            if not is_open and self._links.links.get(rank) is link:
                self._disconnected(rank)
        self._end_if_due(time.monotonic())

    def _hear(self, rank: int, record: dict[str, Any], *, is_open: bool = True) -> None:
        if "verdict" in record:
            self._conclude(Verdict(**record["verdict"]))
            return
        beat, now = Beat.of(record["beat"]), time.monotonic()
        peer = self._peers.setdefault(rank, Peer(beat=beat, heard_at=now))
        is_news = beat.signal != 0 and (peer.beat.signal == 0 or peer.beat is beat)
        peer.beat, peer.heard_at, peer.is_connected, peer.same_machine = beat, now, True, None
        peer.lost_at = 0.0 if is_open else now
        if is_news and phase.current()[0] is not None and not interruption.is_asked_anywhere():
            _pass_on(beat.signal)
        self._notify()
        if beat.has_ended or beat.error:
            self._judge(now)

    def _disconnected(self, rank: int) -> None:
        """The connection with a process has ended: it is gone, or the network was interrupted."""
        self._links.drop(rank)
        if (peer := self._peers.get(rank)) is None:
            return
        if self._is_gone(peer.beat) or peer.beat.has_ended:
            peer.is_connected = False
        elif rank < self.rank:
            made = self._links.dial([rank])
            self._greet(made)
            peer.is_connected = bool(made)
            peer.lost_at = 0.0
        else:
            peer.lost_at = time.monotonic()
        self._judge(time.monotonic())

    def _is_gone(self, beat: Beat) -> bool:
        """Whether a process of this machine is no more."""
        if not beat.born or beat.machine != self._own.machine:
            return False
        return born(beat.pid) != beat.born or state_of(beat.pid) in ("Z", "X")

    # --- judging and ending -------------------------------------------------------------------------------------------

    def _judge(self, now: float) -> None:
        with self._changed:
            for rank, peer in self._peers.items():
                if peer.lost_at and rank not in self._links.links and now - peer.lost_at > RECONNECT_SECONDS:
                    peer.is_connected = False
                if now - peer.heard_at > self.limit / 2:
                    self._ask_the_system(peer)
                others = [self._beat(), *(other.beat for other in self._peers.values())]
                if not is_behind(peer.beat, others):
                    peer.awaited_since = None
                elif peer.awaited_since is None:
                    peer.awaited_since = now
                if self.verdict is None and self.limit > 0:
                    found = judge(peer, self.num_ranks, now, self.limit)
                    if found is not None:
                        self._conclude(found)
            if self.verdict is None and now - self._moved_at > STUCK_SECONDS and (found := self._gone()) is not None:
                self._conclude(found)

    def _ask_the_system(self, peer: Peer) -> None:
        """Notes what the system says of a silent process of this machine."""
        beat = peer.beat
        if not beat.born or beat.machine != self._own.machine:
            return
        if self._is_gone(beat):
            peer.same_machine, peer.is_connected = "gone", False
        elif state_of(beat.pid) == "T":
            peer.same_machine = "stopped"
        else:
            used = seconds_used(beat.pid)
            if used > peer.seconds_used:
                peer.seconds_used, peer.computed_at = used, time.monotonic()
            is_at_work = time.monotonic() - peer.computed_at < self.limit / 2
            peer.same_machine = "computes" if is_at_work else "waits"

    def _gone(self) -> Verdict | None:
        """A process that has ended outside of what it had to do with this one, if there is one."""
        found = (gone(peer, self.num_ranks) for peer in self._peers.values())
        return next(filter(None, found), None)

    def _conclude(self, found: Verdict) -> None:
        """Notes which process is lost, and tells the others."""
        with self._changed:
            if self.verdict is not None:
                return
            self.verdict, self._concluded_at = found, time.monotonic()
            self._changed.notify_all()
        self._links.send_all(found.line())
        peer = self._peers.get(found.rank)
        if peer is not None and peer.same_machine == "stopped" and not self._is_gone(peer.beat):
            with contextlib.suppress(OSError):
                os.kill(peer.beat.pid, signal.SIGKILL)  # it cannot end itself, and its launcher waits for it

    def _end_if_due(self, now: float) -> None:
        """Ends the process where a main thread that cannot go on has not ended it."""
        doing, _ = phase.current()
        if self.verdict is None or doing is None:
            return
        grace = SAVING_SECONDS if doing.is_long and self.verdict.rank != self.rank else GRACE_SECONDS
        if now - self._concluded_at > grace:
            self.say_and_exit(self.verdict)

    def line(self, verdict: Verdict) -> str:
        """The last line of this process, about a process that is lost."""
        with contextlib.suppress(Exception):
            others = "" if verdict.rank == self.rank else f" Rank {self.rank} cannot go on without it."
            return f"{verdict.text}{others} {self.advice()}".strip()
        return verdict.text

    def say_and_exit(self, verdict: Verdict) -> None:
        """Ends the process at once; its last line on stderr names the process that is lost."""
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        for child in _children():
            child.terminate()
        os.write(2, f"\n{self.line(verdict)}\n".encode(errors="replace"))
        os._exit(verdict.exit_code)


def _pass_on(number: int) -> None:
    """The main thread ends as another process does that got a signal, where it handles that signal."""
    if callable(signal.getsignal(number)):
        os.kill(os.getpid(), number)


def described(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code if error.code is not None else ''})"
    first = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {first.rstrip('.')}" if first else type(error).__name__
    return "".join(letter if letter.isprintable() else " " for letter in text[:300])


def _is_settled(peer: Peer, since: float) -> bool:
    """Whether a process was heard of since then and has a connection, or has said before how it ends."""
    has_said = peer.beat.has_ended or peer.beat.signal != 0 or not peer.is_connected
    return has_said or (peer.heard_at > since and not peer.lost_at)


def _children() -> list[Any]:
    """The processes that this one has started to read or prepare data. Some would outlive it."""
    modules = [sys.modules.get(name) for name in ("multiprocessing", "multiprocess")]
    return [child for module in modules if module is not None for child in module.active_children()]


def _machine() -> str:
    """A name for the host and the container, within which a process number means one process."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
