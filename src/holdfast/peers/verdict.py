"""The rule by which a process counts as lost, and the sentence that says so.

Another process counts as lost

1. at once, where it has ended in the midst of what it did: it was killed, or left by an error or an exit;
2. after `limit` seconds in which nothing came from it, though this process was awake, unless it runs on the same
   machine and is seen to compute (then a library keeps Python from running; it does not hang);
3. after `limit` seconds in which it *hangs*. It hangs while others wait for it (they have begun a collective operation
   or a step that it has not, or say that they wait), it shows no sign of life (see `signs`), and its main thread does
   nothing but sleep or wait for another thread. While it waits for files, for the network or for data
   (`Phase.is_long`), only sleep counts. A process that says that it waits for others does not hang.

A process that has ended outside of what this package does, as at the end of its script, counts as lost only where this
process cannot go on without it.

So a step of ten minutes, a compilation, a process that reads, tokenises or saves while the others wait for it, and a
run that was suspended as a whole are no losses. What is none of these, such as a connection that never answers, is left
to `ddp_timeout`. Given up: a process that waits in a loop of its own which calls `sleep`, for longer than the limit,
while others wait for it; that is a hang by this rule. `peer_timeout` is the limit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from signal import Signals
from typing import final

from holdfast.peers.beat import Beat, Verdict
from holdfast.peers.phase import words

WAIT_SECONDS = 10.0
"""Others must have waited for a process for so long, or for the limit where that is less, before it can hang."""


@final
@dataclass(slots=True, kw_only=True)
class Peer:
    """Another process of the run as this one sees it. Times are by this process's own clock."""

    beat: Beat
    heard_at: float
    is_connected: bool = True
    lost_at: float = 0.0
    """When the connection ended, where it has."""
    awaited_since: float | None = None
    """Since when others wait for it."""
    seconds_used: float = 0.0
    computed_at: float = 0.0
    """Its processor time, where it is on this machine and was silent, and when that was last seen to grow."""
    same_machine: str | None = None
    """What the system says of it then: `stopped`, `gone`, `computes` or `waits`."""


def is_behind(beat: Beat, others: Iterable[Beat]) -> bool:
    """Whether others wait for the process: they have begun what it has not."""
    if beat.waits:
        return False
    for other in others:
        if other.name is None or other.rank == beat.rank:
            continue
        both = other.num_collectives is not None and beat.num_collectives is not None
        more = both and (other.num_collectives or 0) > (beat.num_collectives or 0)
        fewer = both and (other.num_collectives or 0) < (beat.num_collectives or 0)
        if more or (not fewer and (other.step or 0) > (beat.step or 0)) or (other.waits and not fewer):
            return True
    return False


def is_hung(beat: Beat, limit: float) -> bool:
    """Whether the process only sleeps, or waits for another thread of its own, for `limit` seconds."""
    if beat.name is None or beat.idle < limit:
        return False
    if beat.asleep is None or beat.locked is None:
        return not beat.is_long
    return beat.asleep >= limit or (not beat.is_long and beat.locked >= limit)


def judge(peer: Peer, num_ranks: int, now: float, limit: float) -> Verdict | None:
    """What became of a process that the others cannot go on without; None where it may be all right."""
    beat, where = peer.beat, words(peer.beat.name, peer.beat.step)
    is_over = beat.has_ended or not peer.is_connected
    if is_over and beat.error:
        return _verdict(beat, num_ranks, f"ended with {beat.error}, {where}")
    if is_over and not beat.signal and beat.name is not None:
        return _verdict(beat, num_ranks, f"was killed, or ended without a word (os._exit), {where}")
    silence = now - peer.heard_at
    if not is_over and silence >= limit and beat.name is not None and peer.same_machine != "computes":
        why = "it is stopped (SIGSTOP)" if peer.same_machine == "stopped" else "it is stopped, or its host is gone"
        return _verdict(beat, num_ranks, f"was last seen {silence:.0f} s ago, {where}; {why}")
    awaited = peer.awaited_since is not None and now - peer.awaited_since >= min(WAIT_SECONDS, limit)
    if not is_over and awaited and is_hung(beat, limit):
        at = f" at {beat.at}" if beat.at else ""
        return _verdict(beat, num_ranks, f"hangs {where}: it has slept for {beat.idle:.0f} s{at}")
    return None


def gone(peer: Peer, num_ranks: int) -> Verdict | None:
    """What became of a process that has ended otherwise, once this process is known to need it; None while it lives."""
    beat, where = peer.beat, words(peer.beat.name, peer.beat.step)
    if beat.signal:
        return _verdict(beat, num_ranks, f"was asked to end by {Signals(beat.signal).name}, {where}", 128 + beat.signal)
    if beat.has_ended or not peer.is_connected:
        return _verdict(beat, num_ranks, f"has ended before the others, {where}")
    return None


def _verdict(beat: Beat, num_ranks: int, fate: str, exit_code: int = 1) -> Verdict:
    text = f"Rank {beat.rank} of {num_ranks} (host {beat.host}, pid {beat.pid}) {fate}."
    return Verdict(rank=beat.rank, text=text, exit_code=exit_code)
