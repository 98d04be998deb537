"""Killed at any instant and resumed = never interrupted (law L5): bit for bit, for every way to hold a reference.

Each run is killed at random instants, anywhere between the making of its trainer and its end, and taken up each time
from its last complete checkpoint; and then again inside saves, syncs and windows that are being scored. `make
test` has two such instants for about half of the kinds; `make nightly` has ten more, for all. All of it once more, with
two random instants, beside another run in the same folder, which comes to what it comes to without kills, and loses no
file.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import holdfast
import kills
from holdfast.reference.run_folder import running

pytestmark = pytest.mark.slow

FEW_KILLS, MANY_KILLS = 2, 10
ALONE = (
    "model, synced", "snapshot on disk, synced, windowed, streamed", "LoRA, synced", "precomputed, synced, windowed",
)  # fmt: skip
"""Kinds that `make test` kills: the ways to hold, each with most that a checkpoint has to hold for it."""
BESIDE = ("snapshot on disk, synced, windowed",)
"""Kinds that `make test` kills beside another run: what shares most files with it."""
MOST_KILLS = 60
PLACES = {"save": [0.2, 0.6, 0.9], "sync": [0.2, 0.7], "window": [0.5]}
"""Where a run is killed deliberately, after which parts of what happens there."""

Life = Callable[..., dict[str, Any]]
Company = Callable[[Path], contextlib.AbstractContextManager[None]]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """The process that runs and kills."""
    paths = [Path(kills.__file__).parent, Path(holdfast.__file__).parent.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, kills.__file__], env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def life(server: subprocess.Popen[str]) -> Life:
    """(kind, folder, seconds until it is killed, where it is killed) -> what came of it; see `kills`."""

    def lived(
        kind: str, folder: Path, *, seconds: float | None = None, ends: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        assert server.stdin
        assert server.stdout
        asked = {"kind": kind, "folder": str(folder), "seconds": seconds, "ends": ends or {}}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        if not answer["killed"] and answer["result"] is None:
            pytest.fail(f"{asked}: {answer['output']}", pytrace=False)
        return answer

    return lived


def nightly_unless_in(chosen: tuple[str, ...]) -> list[Any]:
    """All kinds as parameters; those that are not chosen are nightly."""
    return [pytest.param(kind, marks=[] if kind in chosen else pytest.mark.nightly) for kind in kills.KINDS]


@pytest.mark.parametrize("num_kills", [FEW_KILLS, pytest.param(MANY_KILLS, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", nightly_unless_in(ALONE))
def test_a_kill_loses_nothing(kind: str, num_kills: int, life: Life, tmp_path: Path) -> None:
    check_kills(kind, life, tmp_path, alone, num_kills)


@pytest.mark.parametrize("kind", nightly_unless_in(BESIDE))
def test_a_kill_loses_nothing_beside_another_run(kind: str, life: Life, tmp_path: Path) -> None:
    check_kills(kind, life, tmp_path, beside_another, FEW_KILLS)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else is in `folder`."""
    yield


@contextlib.contextmanager
def beside_another(folder: Path) -> Iterator[None]:
    """Another run is in `folder`, and comes to the same in every round; nothing that was killed there is left over when
    both are done."""
    paths = [Path(kills.__file__).parent, Path(holdfast.__file__).parent.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, kills.__file__, str(folder)]
    with (
        folder.with_suffix(".said").open("w+") as said,
        subprocess.Popen(command, env=environment, stderr=said, **pipes) as process,
    ):
        try:
            assert process.stdout
            assert process.stdout.readline() == "round\n"
            yield
            rest, _ = process.communicate(timeout=120)  # its input ends, and so does it after a round
            said.seek(0)
            assert process.returncode == 0, said.read()
            assert "round" in rest, "it was there all the time"
        finally:
            process.kill()
    with running(folder / "_reference"):
        pass
    assert not (folder / "_reference").exists()


def check_kills(kind: str, life: Life, tmp_path: Path, company: Company, num_kills: int) -> None:
    """Whole, killed at random and killed at places: the same result, bit for bit."""
    places = ["save"] + ["sync"] * ("synced" in kind) + ["window"] * ("windowed" in kind)
    whole = life(kind, tmp_path / "whole", ends={place: [0, None] for place in places})
    assert whole["events"].keys() == set(places)
    expected = whole["result"]
    assert [entry["step"] for entry in expected["log"] if "loss" in entry] == [*range(1, kills.NUM_STEPS + 1)]
    assert (expected["version"] > 0) == ("synced" in kind)
    finished = life(kind, tmp_path / "whole")  # nothing is left to do, so it lasts as long as a life's beginning
    assert finished["resumed"] == kills.NUM_STEPS
    assert finished["result"] == expected

    average = finished["seconds"] + whole["seconds"] / num_kills
    with company(tmp_path / "killed"):
        assert killed_at_random(kind, life, tmp_path / "killed", average, num_kills) == expected
        clear(tmp_path / "killed")
        assert killed_at_places(kind, life, tmp_path / "killed", whole["events"]) == expected


def killed_at_random(kind: str, life: Life, folder: Path, average: float, num_kills: int) -> dict[str, Any]:
    """What a run comes to that was killed and resumed so often, after `average` seconds on average. One that gets to
    its end before that begins anew, and must come to the same."""
    draw = random.Random(kind)
    results = []
    num_killed = num_resumed = 0
    while num_killed < num_kills or not num_resumed:
        answer = life(kind, folder, seconds=draw.uniform(0, 2 * average))
        num_killed += answer["killed"]
        num_resumed += answer["resumed"] > 0
        assert num_killed < MOST_KILLS, "no checkpoint was ever complete"
        if not answer["killed"]:
            results.append(answer["result"])
            clear(folder)
    results.append(life(kind, folder)["result"])
    assert all(result == results[0] for result in results)
    return results[0]


def clear(folder: Path) -> None:
    """Leaves nothing that a run could be taken up from."""
    for path in folder.iterdir():
        if path.name != "_reference":  # where others may have files
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def killed_at_places(kind: str, life: Life, folder: Path, events: dict[str, list[list[int]]]) -> dict[str, Any]:
    """What a run comes to that was killed and resumed at all `PLACES` that it has, one after the other; `events` are
    what an uninterrupted run counted there."""
    ends = [(place, fraction) for place in events for fraction in PLACES[place]]
    for index, (place, fraction) in enumerate(ends, 1):
        step = kills.NUM_STEPS * index // (len(ends) + 1)
        fewest = min(number for at, number in events[place] if at >= step)
        answer = life(kind, folder, ends={place: [step, max(1, int(fraction * fewest))]})
        assert answer["killed"], f"{place} after step {step}"
    answer = life(kind, folder)
    assert answer["resumed"] > 0
    return answer["result"]
