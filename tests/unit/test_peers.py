"""Which process counts as lost, and what the others say of it; the runs are in `tests/distributed/test_deaths.py`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore

from holdfast.peers import phase
from holdfast.peers.beat import Beat, Verdict
from holdfast.peers.guard import guarded, is_of_communication
from holdfast.peers.links import Link, Links, neighbours
from holdfast.peers.signs import Signs, born, state_of
from holdfast.peers.verdict import Peer, gone, is_behind, judge
from holdfast.peers.watch import Watch, described

LIMIT, NOW = 30.0, 1000.0
WORKS = Beat(rank=1, host="b", pid=7, name="training", step=3, num_collectives=9, idle=0.0, asleep=0.0, locked=0.0)
SLEEPS = replace(WORKS, idle=31.0, asleep=31.0, locked=31.0, at="mine.py:3, in pause")
IS_LOCKED = replace(WORKS, idle=31.0, asleep=0.0, locked=31.0)
ON_THE_NETWORK = replace(WORKS, idle=600.0, asleep=0.0, locked=0.0)


def peer(beat: Beat, *, heard: float = 1.0, awaited: float | None = 20.0, **more: Any) -> Peer:
    """A process last heard of `heard` seconds ago, for which others have waited for `awaited` seconds."""
    return Peer(beat=beat, heard_at=NOW - heard, awaited_since=None if awaited is None else NOW - awaited, **more)


@pytest.mark.parametrize(
    ("found", "fate"),
    [
        (peer(WORKS, is_connected=False), "was killed, or ended without a word (os._exit), in step 3 (training)"),
        (peer(replace(WORKS, error="KeyError: 1", has_ended=True)), "ended with KeyError: 1, in step 3 (training)"),
        (peer(replace(WORKS, error="sys.exit(0)"), is_connected=False), "ended with sys.exit(0), in step 3 (training)"),
        (peer(WORKS, heard=31), "was last seen 31 s ago, in step 3 (training); it is stopped, or its host is gone"),
        (peer(WORKS, heard=31, same_machine="stopped"), "was last seen 31 s ago, in step 3 (training); it is stopped "
                                                        "(SIGSTOP)"),
        (peer(SLEEPS), "hangs in step 3 (training): it has slept for 31 s at mine.py:3, in pause"),
        (peer(replace(SLEEPS, is_long=True, at="")), "hangs in step 3 (training): it has slept for 31 s"),
        (peer(IS_LOCKED), "hangs in step 3 (training): it has slept for 31 s"),
        (peer(replace(SLEEPS, name="loading the model", step=None, asleep=None, at="")),
         "hangs while loading the model: it has slept for 31 s"),
    ],
)  # fmt: skip
def test_a_process_that_is_lost(found: Peer, fate: str) -> None:
    verdict = judge(found, 4, NOW, LIMIT)
    assert verdict == Verdict(rank=1, text=f"Rank 1 of 4 (host b, pid 7) {fate}.")


@pytest.mark.parametrize(
    "found",
    [
        peer(WORKS),
        peer(WORKS, heard=29),
        peer(WORKS, heard=31, same_machine="computes"),
        peer(replace(WORKS, name=None, step=None), heard=500),
        peer(replace(WORKS, name=None, step=None), is_connected=False),
        peer(replace(WORKS, name=None, has_ended=True)),
        peer(replace(WORKS, error="KeyError: 1")),
        peer(replace(WORKS, signal=15, has_ended=True)),
        peer(SLEEPS, awaited=None),
        peer(SLEEPS, awaited=9),
        peer(replace(SLEEPS, idle=29.0)),
        peer(replace(SLEEPS, name=None)),
        peer(replace(SLEEPS, idle=0.5)),
        peer(ON_THE_NETWORK),
        peer(replace(IS_LOCKED, is_long=True)),
        peer(replace(ON_THE_NETWORK, is_long=True, asleep=None, locked=None)),
    ],
    ids=[
        "works", "silent for less than the limit", "keeps Python from running", "silent after its part",
        "killed after its part", "ended after its part", "its script may go on after an error", "was asked to end",
        "sleeps, and nobody waits", "others have not waited for long", "sleeps for less than the limit",
        "sleeps outside", "computes in another thread", "waits for the network", "a download in another thread",
        "waits for files, unseen",
    ],
)  # fmt: skip
def test_a_process_that_may_be_all_right(found: Peer) -> None:
    assert judge(found, 4, NOW, LIMIT) is None


def test_a_process_that_ended_before_the_others_is_named_once_it_is_needed() -> None:
    ended = peer(replace(WORKS, name=None, step=None, has_ended=True))
    assert gone(ended, 2) == Verdict(
        rank=1, text="Rank 1 of 2 (host b, pid 7) has ended before the others, outside of holdfast."
    )
    asked = gone(peer(replace(WORKS, signal=15)), 2)
    assert asked == Verdict(
        rank=1, text="Rank 1 of 2 (host b, pid 7) was asked to end by SIGTERM, in step 3 (training).", exit_code=143
    )
    assert gone(peer(WORKS), 2) is None


OTHER = replace(WORKS, rank=0)


@pytest.mark.parametrize(
    ("other", "is_waiting"),
    [
        (OTHER, False),
        (replace(OTHER, num_collectives=10), True),
        (replace(OTHER, num_collectives=8), False),
        (replace(OTHER, step=4), True),
        (replace(OTHER, step=4, num_collectives=8), False),
        (replace(OTHER, waits=True), True),
        (replace(OTHER, waits=True, num_collectives=8), False),
        (replace(OTHER, name=None, num_collectives=10), False),
        (replace(OTHER, num_collectives=None), False),
        (replace(OTHER, num_collectives=None, step=4), True),
        (replace(OTHER, rank=1, num_collectives=10), False),
    ],
)
def test_who_waits_for_whom(other: Beat, is_waiting: bool) -> None:
    assert is_behind(WORKS, [other]) is is_waiting
    assert not is_behind(replace(WORKS, waits=True), [other])


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8, 17, 64, 1000])
def test_every_process_is_connected_with_few_and_reaches_all(num_ranks: int) -> None:
    links = {rank: neighbours(rank, num_ranks) for rank in range(num_ranks)}
    assert all(rank in links[other] for rank, others in links.items() for other in others)
    assert all(rank not in others for rank, others in links.items())
    assert max(map(len, links.values())) <= 2 * num_ranks.bit_length()
    if num_ranks <= 4:
        assert all(len(others) == num_ranks - 1 for others in links.values())
    reached = {0}
    for _ in range(num_ranks.bit_length()):
        reached |= {other for rank in reached for other in links[rank]}
    assert reached == {*range(num_ranks)}


@pytest.mark.parametrize("beat", [Beat(rank=0, host="a", pid=1), SLEEPS, replace(WORKS, num_collectives=0, step=0)])
def test_a_beat_arrives_as_it_was_sent(beat: Beat) -> None:
    """Zero is a number, and no absence."""
    assert Beat.of(json.loads(beat.line())["beat"]) == beat


def test_links_carry_lines_and_show_that_a_process_has_ended() -> None:
    """Two processes find each other in a store; a stranger without the token is sent away."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    first, second = (Links(rank, 2, ("127.0.0.1", store.port)) for rank in (0, 1))
    try:
        assert second.dial([0]) == []  # the other has not said yet where it listens
        assert first.publish()
        assert second.publish()
        (link,) = second.dial([0])
        _until(lambda: bool(first.accept()))
        assert link.send(WORKS.line())
        found: list[Any] = []
        _until(lambda: bool(found.extend(first.links[1].received()[0]) or found))
        assert found == [json.loads(WORKS.line())]
        second.drop(0)
        _until(lambda: not first.links[1].received()[1])

        second.addresses[0] = {**second.addresses[0], "token": "another"}
        second._look_up = lambda rank: None  # type: ignore[method-assign]
        first.drop(1)
        (stranger,) = second.dial([0])
        _until(lambda: not (first.accept() or stranger.received()[1]))
        assert first.links == {}
    finally:
        for links in (first, second):
            for each in links.sockets():
                each.close()


@pytest.mark.parametrize("is_here", [True, False])
def test_the_end_of_a_process_counts_at_once_with_its_last_words(
    is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's signal comes first, then the last beat of the process that was killed, with its end: whoever waits
    to know which process is lost does not take that beat for a sign of life, though the end is looked at later."""
    watch, (ours, theirs) = Watch(0, 2, ("127.0.0.1", 1)), socket.socketpair()
    beat = replace(WORKS, machine=watch._own.machine, born="long ago") if is_here else WORKS
    watch._peers[1] = Peer(beat=beat, heard_at=0.0)
    link = watch._links.links[1] = Link(ours, 1)
    plain, found = Watch._disconnected, []
    monkeypatch.setattr(Watch, "_disconnected", lambda *args: (time.sleep(0.1), plain(*args)))
    monkeypatch.setattr("holdfast.peers.watch.RECONNECT_SECONDS", 0.2)
    waits = threading.Thread(target=lambda: found.append(watch.wait_for_verdict(10, needs_all=False)))
    waits.start()
    time.sleep(0.1)
    theirs.sendall(beat.line())
    theirs.close()
    watch._hear_all(1, link)
    time.sleep(0.3)
    assert bool(found) == is_here  # the end of a connection with another machine may be the network's
    watch._judge(time.monotonic())
    waits.join()
    for each in watch._links.sockets():
        each.close()
    fate = "was killed, or ended without a word (os._exit), in step 3 (training)"
    assert found == [Verdict(rank=1, text=f"Rank 1 of 2 (host b, pid 7) {fate}.")]


def _until(is_so: Any) -> None:
    for _ in range(500):
        if is_so():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to that")


@pytest.mark.skipif(sys.platform != "linux", reason="without /proc only processor time is known")
def test_signs_of_a_main_thread_that_sleeps_or_computes() -> None:
    """As seen from another thread, which does not count itself."""
    is_over, seen = threading.Event(), []

    def look() -> None:
        signs = Signs()
        while not is_over.is_set():
            signs.look()
            seen.append((signs.idle, signs.asleep, signs.locked))
            time.sleep(0.05)

    watcher = threading.Thread(target=look)
    watcher.start()
    time.sleep(0.6)
    asleep = seen[-1]
    until = time.process_time() + 0.6
    while time.process_time() < until:
        pass
    computing = seen[-1]
    is_over.set()
    watcher.join()
    assert asleep[1] > 0.3
    assert asleep[2] >= asleep[1]
    assert computing[0] < 0.3
    assert computing[1] < 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_the_system_says_of_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    beginning = born(child.pid)
    assert beginning.isdecimal()
    child.send_signal(signal.SIGSTOP)
    _until(lambda: state_of(child.pid) == "T")
    child.kill()
    _until(lambda: state_of(child.pid) == "Z")
    assert born(child.pid) == beginning
    child.wait()
    assert (state_of(child.pid), born(child.pid)) == ("", "")


def test_phases_say_what_is_done_and_where_an_error_came_from() -> None:
    told: list[Any] = []
    phase.listen(lambda: told.append(phase.current()))

    def save() -> None:
        with phase.doing("saving a checkpoint", is_long=True):
            raise OSError("full")

    with phase.doing("training"):
        phase.at_step(3)
        try:
            save()
        except OSError as error:
            other = KeyError("other")
            other.__cause__ = error
            found = phase.of_error(other)
        assert phase.of_error(ValueError()) == phase.current()
    phase.at_step(None)
    phase.listen(None)
    assert found == (phase.Phase("saving a checkpoint", is_long=True), 3)
    names = [None if doing is None else doing.name for doing, _ in told]
    assert names == ["training", "training", "saving a checkpoint", "training", None, None]
    assert phase.depth() == 0
    assert phase.words("saving a checkpoint", 3) == "in step 3 (saving a checkpoint)"
    assert phase.words("loading the model", None) == "while loading the model"


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4796"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (ConnectionResetError(), False),
        (ValueError("a loss that is NaN"), False),
        (RuntimeError("size of tensor a (0) must match"), False),
    ],
)
def test_errors_of_communication(error: Exception, is_so: bool) -> None:
    assert is_of_communication(error) is is_so
    wrapped = ValueError("could not be read")
    wrapped.__cause__ = error
    assert is_of_communication(wrapped) is is_so


def test_an_error_in_one_line() -> None:
    assert described(ValueError("a\x07b.\nmore")) == "ValueError: a b"
    assert described(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert described(SystemExit(0)) == "sys.exit(0)"
    assert described(SystemExit()) == "sys.exit()"


def test_a_guard_does_nothing_more_in_a_run_of_one_process() -> None:
    seen = []

    @guarded("training")
    def fail() -> None:
        seen.append(phase.current()[0])
        raise RuntimeError("gloo")

    assert "WORLD_SIZE" not in os.environ
    with pytest.raises(RuntimeError, match="gloo"):
        fail()
    assert seen == [phase.Phase("training")]
