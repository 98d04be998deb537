"""Filling a store that is killed with SIGKILL, at random instants and at every step of writing: nothing wrong is ever
stored, and a kill costs one shard at most. And several processes that fill one store at once.

The file is also the program that fills: a process that has everything imported, and forks for each life.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

import holdfast
from holdfast.batch import ContentId
from holdfast.store import store
from holdfast.store import work_sharing as claims
from holdfast.store.files import PARTIAL
from holdfast.store.key import StoreKey
from holdfast.store.maintenance import carry_out, cleanup_steps, merge, stores, verify
from holdfast.store.shard import shard_paths
from holdfast.store.store import LogpStore
from holdfast.store.work_sharing import CLAIM, claimed_blocks

pytestmark = pytest.mark.slow

KEY = StoreKey(
    weights_digest="5a" * 16, config_digest="c0" * 16, numerics={"dtype": "torch.float32"}, description="killed"
)
NUM_COMPLETIONS, NUM_PER_SHARD, NUM_PER_BATCH = 2_000, 64, 8
NUM_KILLS = 30


def content_id(number: int) -> ContentId:
    """That of the completion of this number."""
    return (number * 0x9E3779B97F4A7C15 % 2**64 - 2**63, number)


def logps(number: int) -> Tensor:
    """Its log-probs, as a model would compute them: always the same."""
    return -torch.frac(torch.arange(1 + number % 37) * 0.37 + number * 0.11).float()


IDS = [content_id(number) for number in range(NUM_COMPLETIONS)]
EXPECTED = {content_id(number): logps(number) for number in range(NUM_COMPLETIONS)}

# Filling -------------------------------------------------------------------------------------------------------------


def compute(ids: Sequence[ContentId], log: int) -> dict[ContentId, Tensor]:
    """What a model would do for a batch; says in a file, which a kill leaves, for how many completions."""
    time.sleep(0.0005 * len(ids))
    found = {key: logps(key[1]) for key in ids}
    os.write(log, b"." * len(ids))
    return found


def fill(folder: str, log: int, num_completions: int) -> None:
    """Completes a store, in the order of the completions."""
    with LogpStore.open(folder, KEY) as opened:
        missing = opened.missing(IDS[:num_completions])
        for begin in range(0, len(missing), NUM_PER_BATCH):
            opened.add(compute(missing[begin : begin + NUM_PER_BATCH], log))


def share(folder: str, log: int, num_completions: int) -> None:
    """Completes a store together with others."""
    with LogpStore.open(folder, KEY) as opened:
        for block in claimed_blocks(opened, IDS[:num_completions], NUM_PER_SHARD):
            for begin in range(0, len(block), NUM_PER_BATCH):
                opened.add(compute(block[begin : begin + NUM_PER_BATCH], log))


def fill_again(folder: str, log: int, num_completions: int) -> None:
    """Completes a store together with others, several times, whatever becomes of it; what it finds is right."""
    for _ in range(4):
        share(folder, log, num_completions)
        found = LogpStore.open(folder, KEY).get(IDS)
        assert all(torch.equal(found[key], EXPECTED[key]) for key in found)


def is_over(folder: str) -> bool:
    """Whether there is nothing more to look at, or nobody who waits."""
    return Path(f"{folder}.stop").exists() or os.getppid() == 1


def look(folder: str, log: int, num_completions: int) -> None:
    """Lists and verifies until there is nothing more to see: no store is ever damaged."""
    while not is_over(folder):
        problems = {facts.problem for facts in stores(Path(folder))} - {None}
        assert problems <= {"nothing is in it yet, or it is no store"}, problems
        assert sum(facts.num_damaged for facts in stores(Path(folder))) == 0
        assert verify(Path(folder)) == []


def clean_up(folder: str, log: int, num_completions: int) -> None:
    """Merges, and now and then removes the whole store."""
    draw = random.Random(os.getpid())
    while not is_over(folder):
        time.sleep(0.05)
        for step in cleanup_steps(Path(folder), max_bytes=0 if draw.random() < 0.05 else None):
            with contextlib.suppress(ValueError):  # went, and is being begun again
                carry_out(step)
        if draw.random() < 0.05:
            LogpStore.open(folder, KEY).drop()


def deadly(last: int) -> None:
    """From now on this process does not get beyond file operation number `last`; of a write, the half is done."""
    count = 0

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == last:
                if name == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return called

    for name in ("mkdir", "open", "write", "fsync", "close", "replace", "unlink", "utime"):
        setattr(os, name, counted(name, getattr(os, name)))


def live(asked: dict[str, Any]) -> None:
    """A life."""
    store.SHARD_COMPLETIONS = NUM_PER_SHARD
    claims.PATIENCE_SECONDS = asked["patience"]
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if asked["deadly"]:
        deadly(asked["deadly"])
    if asked["work"] == "merge":
        merge(Path(asked["folder"]) / KEY.digest())
    else:
        works = {"fill": fill, "share": share, "fill again": fill_again, "look": look, "clean up": clean_up}
        works[asked["work"]](asked["folder"], log, asked["num_completions"])


def main() -> None:
    """Asked for a life, forks and tells its process; asked for `{"wait": process}`, tells its status when it ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            tell(os.waitpid(asked["wait"], 0)[1])
            continue
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(asked)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        tell(child)


def tell(number: int) -> None:
    """Answers."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


# Killing -------------------------------------------------------------------------------------------------------------


class Lives:
    """The process that fills."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self, folder: Path, **asked: Any) -> int:
        """Begins a life, and returns its process."""
        defaults = {
            "work": "fill",
            "deadly": 0,
            "num_completions": NUM_COMPLETIONS,
            "patience": claims.PATIENCE_SECONDS,
        }
        return self._ask(defaults | {"folder": str(folder), "log": str(folder) + ".log"} | asked)

    def end(self, process: int) -> bool:
        """Waits for a life's end: True if it was killed, False if it had done its work."""
        status = self._ask({"wait": process})
        assert status in (0, signal.SIGKILL), f"a life ended by itself: {status}"
        return status == signal.SIGKILL

    def _ask(self, asked: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    """Lives as they are asked for."""
    environment = os.environ | {"PYTHONPATH": str(Path(holdfast.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__], env=environment, **pipes) as process:
        yield Lives(process)
        assert process.stdin
        process.stdin.close()


def num_computed(folder: Path) -> int:
    """Completions computed so far, in all lives."""
    log = Path(f"{folder}.log")
    return log.stat().st_size if log.exists() else 0


def is_as_expected(folder: Path, ids: Sequence[ContentId] = IDS) -> bool:
    """Whether a store holds these completions, all with the values of a filling that nothing interrupted."""
    found = LogpStore.open(folder, KEY).get(ids, [len(EXPECTED[key]) for key in ids])
    return found.keys() == set(ids) and all(torch.equal(found[key], EXPECTED[key]) for key in ids)


def num_stored(folder: Path) -> int:
    """Completions in the shards, as often as they are there."""
    return sum(len(load_file(path)["content"]) for path in shard_paths(folder / KEY.digest()))


@pytest.mark.nightly
def test_a_kill_at_any_instant_costs_one_shard_at_most(lives, tmp_path, caplog):
    folder = tmp_path / "killed"
    draw = random.Random(0)
    for _ in range(NUM_KILLS):
        enough = num_computed(folder) + draw.randint(0, NUM_PER_SHARD * 3 // 2)
        process = lives.begin(folder)
        while num_computed(folder) < enough:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.01))
        os.kill(process, signal.SIGKILL)
        assert lives.end(process)
        before = LogpStore.open(folder, KEY)
        found = before.get(IDS)
        assert all(torch.equal(found[key], EXPECTED[key]) for key in found)
        assert verify(folder) == []
    assert 0 < before.num_completions < NUM_COMPLETIONS
    assert not lives.end(lives.begin(folder))
    assert num_computed(folder) <= NUM_COMPLETIONS + NUM_KILLS * NUM_PER_SHARD
    assert num_stored(folder) == NUM_COMPLETIONS
    assert is_as_expected(folder)
    assert verify(folder) == []
    assert caplog.records == []

    assert not lives.end(lives.begin(tmp_path / "whole"))
    assert num_computed(tmp_path / "whole") == NUM_COMPLETIONS
    shards = [sorted(path.name for path in shard_paths(root / KEY.digest())) for root in (folder, tmp_path / "whole")]
    assert shards[0] == shards[1]  # digests: the same files, byte for byte


def test_a_kill_at_every_step_of_writing(lives, tmp_path, caplog):
    """Each life has all to do and ends a step later than the one before, until one lives."""
    num = NUM_PER_SHARD
    place, is_killed = 0, True
    while is_killed:
        place += 1
        folder = tmp_path / f"{place}"
        is_killed = lives.end(lives.begin(folder, deadly=place, num_completions=2 * num))
        num_kept = LogpStore.open(folder, KEY).num_completions
        assert num_kept in (0, num, 2 * num)
        assert [damage for damage in verify(folder) if damage.reason != "it is missing"] == []
        assert not lives.end(lives.begin(folder, num_completions=2 * num))
        assert num_computed(folder) <= 3 * num
        assert num_stored(folder) == 2 * num
        assert is_as_expected(folder, IDS[: 2 * num])
        assert verify(folder) == []
        for left in folder.glob(f"*/*{PARTIAL}"):
            os.utime(left, (0, 0))
        for step in cleanup_steps(folder):
            carry_out(step)
        assert is_as_expected(folder, IDS[: 2 * num])
        assert not list(folder.glob(f"*/*{PARTIAL}"))
    assert place > 20  # so the steps were steps of writing
    assert caplog.records == []


def test_a_kill_at_every_step_of_merging(lives, tmp_path, caplog):
    num = 4 * NUM_PER_SHARD
    place, is_killed = 0, True
    while is_killed:
        place += 1
        folder = tmp_path / f"{place}"
        assert not lives.end(lives.begin(folder, num_completions=num))
        is_killed = lives.end(lives.begin(folder, work="merge", deadly=place))
        assert is_as_expected(folder, IDS[:num])
        assert verify(folder) == []
        merge(folder / KEY.digest())
        assert num_stored(folder) == num
        assert is_as_expected(folder, IDS[:num])
    assert place > 10
    assert caplog.records == []


def sizes(folder: Path, num: int) -> list[int]:
    """Completions computed by each of the processes that share a store."""
    return [Path(f"{folder}.{number}").stat().st_size for number in range(num)]


def test_four_processes_fill_one_store(lives, tmp_path, caplog):
    """No completion is done twice, and none by a process that has nothing left to do: it waits for the others."""
    folder = tmp_path / "shared"
    processes = [lives.begin(folder, work="share", log=f"{folder}.{number}") for number in range(4)]
    reader = LogpStore.open(folder, KEY)
    while reader.num_completions < NUM_COMPLETIONS:
        reader.refresh()
        found = reader.get(IDS)
        assert all(torch.equal(found[key], EXPECTED[key]) for key in found)
        time.sleep(0.02)
    assert [lives.end(process) for process in processes] == [False] * 4
    assert min(sizes(folder, 4)) > 0
    assert sum(sizes(folder, 4)) == NUM_COMPLETIONS
    assert num_stored(folder) == NUM_COMPLETIONS
    assert is_as_expected(folder)
    assert verify(folder) == []
    assert list(folder.glob(f"*/*{CLAIM}")) == []
    assert caplog.records == []


def stopped_in_a_block(process: int, log: Path) -> None:
    """Stops a process that has done a block, and is in the midst of another."""
    while True:
        os.kill(process, signal.SIGSTOP)
        done = log.stat().st_size if log.exists() else 0
        if done > NUM_PER_SHARD and done % NUM_PER_SHARD:
            return
        os.kill(process, signal.SIGCONT)
        time.sleep(0.002)


def test_the_others_do_what_a_killed_one_has_left(lives, tmp_path):
    """And wait for each other while they do: what is done twice is the killed one's part of a block."""
    folder = tmp_path / "shared"
    processes = [lives.begin(folder, work="share", log=f"{folder}.{number}") for number in range(4)]
    stopped_in_a_block(processes[0], Path(f"{folder}.0"))
    time.sleep(0.5)  # the others come to wait for it
    os.kill(processes[0], signal.SIGKILL)
    assert [lives.end(process) for process in processes[1:]] == [False] * 3  # it has ended, and nobody has asked
    assert lives.end(processes[0])
    num_lost = sizes(folder, 4)[0] % NUM_PER_SHARD
    assert 0 < num_lost < NUM_PER_SHARD
    assert sum(sizes(folder, 4)) == NUM_COMPLETIONS + num_lost
    assert num_stored(folder) == NUM_COMPLETIONS
    assert is_as_expected(folder)
    assert verify(folder) == []
    assert list(folder.glob(f"*/*{CLAIM}")) == []


def test_a_process_that_hangs_is_not_waited_for_for_ever(lives, tmp_path):
    folder = tmp_path / "shared"
    shared = [lives.begin(folder, work="share", patience=1.0, log=f"{folder}.{number}") for number in range(3)]
    stopped_in_a_block(shared[0], Path(f"{folder}.0"))
    assert [lives.end(process) for process in shared[1:]] == [False] * 2
    assert is_as_expected(folder)
    os.kill(shared[0], signal.SIGCONT)
    assert not lives.end(shared[0])
    assert sum(sizes(folder, 3)) <= NUM_COMPLETIONS + 3 * NUM_PER_SHARD
    assert is_as_expected(folder)
    assert verify(folder) == []


def test_processes_that_do_not_share_out_do_no_harm(lives, tmp_path):
    """All four compute the same at the same time."""
    folder = tmp_path / "same"
    processes = [lives.begin(folder, num_completions=300) for _ in range(4)]
    assert [lives.end(process) for process in processes] == [False] * 4
    assert LogpStore.open(folder, KEY).num_completions == 300
    assert is_as_expected(folder, IDS[:300])
    assert verify(folder) == []


def test_merging_under_readers_and_writers(lives, tmp_path):
    folder = tmp_path / "merged"
    processes = [lives.begin(folder, work="share", log=f"{folder}.{number}") for number in range(2)]
    num_merged = 0
    while (opened := LogpStore.open(folder, KEY)).num_completions != NUM_COMPLETIONS:
        found = opened.get(IDS)
        assert all(torch.equal(found[key], EXPECTED[key]) for key in found)
        if (folder / KEY.digest()).exists():
            num_merged += merge(folder / KEY.digest())
        time.sleep(0.01)
    assert [lives.end(process) for process in processes] == [False] * 2
    assert num_merged > 0
    assert is_as_expected(folder)
    assert verify(folder) == []
    assert np.sum([len(logps) for logps in EXPECTED.values()]) == LogpStore.open(folder, KEY).num_tokens


@pytest.mark.parametrize("num_completions", [300, pytest.param(NUM_COMPLETIONS, marks=pytest.mark.nightly)])
def test_tools_beside_runs(lives, tmp_path, num_completions):
    """While two processes fill a store again and again, others list, verify, merge and remove it. Nothing is ever
    called damaged, no value is wrong, and in the end a fill is complete."""
    folder = tmp_path / "storm"
    fills = [lives.begin(folder, work="fill again", num_completions=num_completions) for _ in range(2)]
    tools = [lives.begin(folder, work=work) for work in ("look", "look", "clean up", "clean up")]
    try:
        assert [lives.end(process) for process in fills] == [False] * 2
    finally:
        Path(f"{folder}.stop").touch()
    assert [lives.end(process) for process in tools] == [False] * 4
    assert not lives.end(lives.begin(folder, num_completions=num_completions))
    assert is_as_expected(folder, IDS[:num_completions])
    assert verify(folder) == []
    for step in cleanup_steps(folder):
        carry_out(step)
    assert [path.name for path in folder.iterdir()] == [KEY.digest()]


if __name__ == "__main__":
    main()
