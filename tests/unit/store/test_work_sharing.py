"""Work shared out among processes: claims, waits, and what another process leaves undone."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.batch import ContentId
from holdfast.store import work_sharing as claims
from holdfast.store.store import LogpStore
from holdfast.store.work_sharing import CLAIM, CLAIM_SECONDS, claimed_blocks
from stores import KEY, filled, same, values


def test_blocks_are_those_that_are_missing(tmp_path):
    content = values(25)
    ids = list(content)
    opened = LogpStore.open(tmp_path, KEY)
    opened.add({key: content[key] for key in ids[8:12]})
    blocks = []
    for block in claimed_blocks(opened, [*ids, *ids], 10):
        assert len(list(opened.folder.glob(f"*{CLAIM}"))) == 1
        blocks.append(block)
        opened.add({key: content[key] for key in block})
    assert blocks == [ids[:8], ids[12:20], ids[20:]]
    assert not list(opened.folder.glob(f"*{CLAIM}"))
    assert same(LogpStore.open(tmp_path, KEY).get(ids), content)
    assert list(claimed_blocks(opened, ids, 10)) == []


def test_two_that_fill_one_store_do_not_do_the_same(tmp_path):
    """Turn by turn: each has one block in progress, so at the end both do the last one."""
    content = values(70)
    both = [LogpStore.open(tmp_path, KEY) for _ in range(2)]
    work = [claimed_blocks(opened, list(content), 10) for opened in both]
    done: list[ContentId] = []
    alive = [0, 1]
    for turn in itertools.cycle((0, 1)):
        block = next(work[turn], None)
        if block is None:
            alive.remove(turn)
            if not alive:
                break
            continue
        done += block
        both[turn].add({key: content[key] for key in block})
    assert set(done) == set(content)
    assert len(done) - len(content) <= 10
    assert LogpStore.open(tmp_path, KEY).num_completions == 70


def test_a_block_that_was_given_up_is_taken_by_another(tmp_path):
    content = values(20)
    one, two = LogpStore.open(tmp_path, KEY), LogpStore.open(tmp_path, KEY)
    ids = list(content)
    first = claimed_blocks(one, ids, 10)
    assert next(first) == ids[:10]
    second = claimed_blocks(two, ids, 10)
    assert next(second) == ids[10:]
    two.add({key: content[key] for key in ids[10:]})
    assert next(second) == ids[:10]  # only claimed ones are left
    first.close()
    assert next(claimed_blocks(one, ids, 10)) == ids[:10]


@pytest.mark.parametrize(
    ("claim", "age", "is_void"),
    [
        ("{alive} {host}", 0, False),
        ("{dead} {host}", 0, True),
        ("{dead} elsewhere", 0, False),
        ("{dead} elsewhere", CLAIM_SECONDS + 9, True),
        ("", 0, False),
    ],
)
def test_a_claim_ends_with_its_process(tmp_path, claim, age, is_void):
    ids = list(values(20))
    opened = LogpStore.open(tmp_path, KEY)
    next(abandoned := claimed_blocks(opened, ids, 10))
    (path,) = opened.folder.glob(f"*{CLAIM}")
    alive, host = path.read_text().split(" ")
    assert int(alive) == os.getpid()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path.write_text(claim.format(alive=alive, host=host, dead=ended.pid))
    os.utime(path, (time.time() - age, time.time() - age))
    assert next(claimed_blocks(LogpStore.open(tmp_path, KEY), ids, 10)) == (ids[:10] if is_void else ids[10:])
    abandoned.close()


class Other:
    """A process that has claimed the first ten of twenty completions; the rest is stored. Sleeping costs no time."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = values(20)
        self.ids = list(self.content)
        self._work = claimed_blocks(LogpStore.open(folder, KEY), self.ids, 10)
        next(self._work)
        self.ours = filled(folder, {key: self.content[key] for key in self.ids[10:]})
        (self.claim,) = self.ours.folder.glob(f"*{CLAIM}")
        self.machine = self.claim.read_text().split(" ")[1]
        self.is_of(os.getppid())  # which is there
        self.num_sleeps, self.told = 0, []
        self._now = time.monotonic()
        self.on_sleep: Callable[[int], None] = lambda num_sleeps: None
        monkeypatch.setattr(claims.time, "monotonic", lambda: self._now)
        monkeypatch.setattr(claims.time, "sleep", self._sleep)

    def is_of(self, process: int) -> None:
        self.claim.write_text(f"{process} {self.machine}")

    def _sleep(self, seconds: float) -> None:
        assert claims.SHORTEST_POLL_SECONDS / 2 <= seconds <= claims.LONGEST_POLL_SECONDS
        self._now += seconds
        self.num_sleeps += 1
        self.on_sleep(self.num_sleeps)
        assert self.num_sleeps < 10_000, "it waits for ever"

    def waited(self) -> list[list[ContentId]]:
        """What is left to us."""
        blocks = []
        for block in claimed_blocks(self.ours, self.ids, 10, self.told.append):
            blocks.append(block)
            self.ours.add({key: self.content[key] for key in block})
        assert same(LogpStore.open(self.ours.folder.parent, KEY).get(self.ids), self.content)
        return blocks


@pytest.fixture
def other(tmp_path, monkeypatch):
    return Other(tmp_path, monkeypatch)


def test_a_live_claim_is_waited_for(other):
    def done(num_sleeps: int) -> None:
        if num_sleeps == 7:
            filled(other.ours.folder.parent, {key: other.content[key] for key in other.ids[:10]})
            os.unlink(other.claim)

    other.on_sleep = done
    assert other.waited() == []
    assert (other.num_sleeps, other.told) == (7, [1] * 7)


def test_a_claim_that_is_gone_while_something_is_missing_is_taken_over(other):
    some = {key: other.content[key] for key in other.ids[:4]}  # what its owner had written

    def given_up(num_sleeps: int) -> None:
        if num_sleeps == 3:
            filled(other.ours.folder.parent, some)
            os.unlink(other.claim)

    other.on_sleep = given_up
    assert other.waited() == [other.ids[4:10]]
    assert other.num_sleeps == 3
    assert not other.claim.exists()


def test_a_claim_whose_owner_dies_is_taken_over(other):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        other.is_of(process.pid)
        other.on_sleep = lambda num_sleeps: process.communicate() and None if num_sleeps == 5 else None
        assert other.waited() == [other.ids[:10]]
    assert other.num_sleeps == 5
    assert not other.claim.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is there until its parent asks for its end")
def test_a_process_that_has_ended_unnoticed_is_gone(other):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        other.is_of(process.pid)
        assert other.waited() == [other.ids[:10]]
        assert other.num_sleeps == 0


@pytest.mark.parametrize("claim", ["{alive} {machine}", "{alive} elsewhere", ""])
def test_no_wait_is_for_ever(other, claim):
    """A process that hangs, one of another machine, or one that died before it had put its name down."""
    other.claim.write_text(claim.format(alive=os.getppid(), machine=other.machine))
    begin = time.monotonic()
    assert other.waited() == [other.ids[:10]]
    assert claims.PATIENCE_SECONDS < time.monotonic() - begin <= claims.PATIENCE_SECONDS + claims.LONGEST_POLL_SECONDS
    assert not other.claim.exists()


def test_a_claim_that_is_renewed_is_waited_for_longer(other):
    """Every 100 polls of a second at most; after 1,000 it is not renewed any more."""
    begin = time.time()
    other.on_sleep = lambda num: os.utime(other.claim, (begin + num,) * 2) if num <= 1_000 and num % 100 == 0 else None
    assert other.waited() == [other.ids[:10]]
    assert 1_000 + claims.PATIENCE_SECONDS <= other.num_sleeps <= 1_000 + 2 * claims.PATIENCE_SECONDS + 1


def test_a_claim_that_cannot_be_removed_is_no_obstacle(other, monkeypatch):
    monkeypatch.setattr(claims, "remove", lambda path: False)
    assert other.waited() == [other.ids[:10]]
    assert other.claim.exists()


def test_each_addition_renews_the_claim(tmp_path):
    content = values(10)
    opened = LogpStore.open(tmp_path, KEY)
    work = claimed_blocks(opened, list(content), 10)
    next(work)
    (path,) = opened.folder.glob(f"*{CLAIM}")
    for key, value in content.items():
        os.utime(path, (0, 0))
        opened.add({key: value})
        assert time.time() - path.stat().st_mtime < 60
    assert next(work, None) is None
    opened.add(values(1, seed=1))
    assert not path.exists()


def test_what_is_finished_between_the_look_and_the_claim_is_not_done_again(tmp_path, monkeypatch):
    content = values(10)
    opened = LogpStore.open(tmp_path, KEY)
    plain = LogpStore.check_writable

    def finished(self: LogpStore) -> None:
        plain(self)
        monkeypatch.setattr(LogpStore, "check_writable", plain)
        filled(tmp_path, content)

    monkeypatch.setattr(LogpStore, "check_writable", finished)
    assert list(claimed_blocks(opened, list(content), 10)) == []
    assert same(opened.get(content), content)
    assert not list(opened.folder.glob(f"*{CLAIM}"))
