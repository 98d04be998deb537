"""A process of a run that is lost ends the run on all: within a minute, by name, and so that it can be resumed.

Every row is a run of its own, made by `endings`. `make test` has rows with every way, place and number of launchers,
`make nightly` all of them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import holdfast

pytestmark = pytest.mark.slow

LIMIT_SECONDS = 60.0
HERE = Path(__file__).parent
ENGINE = "ddp"

FATES = {
    "kill": r"was killed, or ended without a word \(os\._exit\)",
    "raise": r"ended with (OS|Value)Error: .*the disk is on fire",
    "exit": r"was killed, or ended without a word \(os\._exit\)",
    "sys.exit": r"ended with sys\.exit\(0\)",
    "stop": r"was last seen \d+ s ago",
    "sleep": r"hangs",
    "naps": r"hangs",
}
"""By how a process ends: what the others say of it."""
PLACES = {
    "load": r"while loading the model",
    "data": r"while preparing the data",
    "fill": r"while scoring the reference's log-probs \(train\)",
    "step": r"in step 3 \(training\)",
    "sync": r"in step 3 \(syncing the reference\)",
    "save": r"in step 4 \(saving a checkpoint\)",
    "evaluate": r"in step 3 \(evaluating\)",
}
"""By where it ends: what they say that it did."""
HAS_CHECKPOINT = ("step", "sync", "save", "evaluate")
HANGS = ("stop", "sleep", "naps")
LAUNCHERS = ([2], [1, 1], [1, 2], [3])

Lived = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    """(where, how, launchers, folder, ...) -> how the run ended; see `endings`."""
    paths = [HERE, HERE.parent, Path(holdfast.__file__).parent.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(HERE / "endings.py")], env=environment, **pipes) as process:

        def ended(where: str, how: str, launchers: list[int], folder: Path, **more: Any) -> dict[str, Any]:
            asked = {"where": where, "how": how, "launchers": launchers, "folder": str(folder), "engine": ENGINE}
            asked |= {"rank": sum(launchers) - 1, "resume": None} | more
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ended
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(lived: Lived, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[int]], dict[str, str]]:
    """The weights, by rank, of a run that comes to that place and is not interrupted."""
    known: dict[Any, dict[str, str]] = {}

    def of(where: str, launchers: list[int]) -> dict[str, str]:
        key = where in ("evaluate", "fill") and where, sum(launchers)
        if key not in known:
            answer = lived(where, "", [sum(launchers)], tmp_path_factory.mktemp("whole") / "run")
            assert {*answer["codes"].values()} == {0}, answer["said"]
            known[key] = answer["weights"]
        return known[key]

    return of


def check_end(answer: dict[str, Any], where: str, how: str, rank: int, num_ranks: int) -> None:
    """All ended in time, and every other process's last line says who, where and what."""
    assert answer["seconds"] < LIMIT_SECONDS, answer
    survivors = [str(other) for other in range(num_ranks) if other != rank]
    who = rf"Rank {rank} of {num_ranks} \(host \S+, pid {answer['pids'][str(rank)]}\) "
    for other in survivors:
        last = answer["last"][other]
        assert re.match(who + FATES[how], last), answer["said"][other]
        assert re.search(PLACES[where], last), last
        assert f"Rank {other} cannot go on without it." in last
        assert answer["codes"][other] not in (0, None), answer["codes"]
        assert "Traceback" not in answer["said"][other], answer["said"][other]
        if where in HAS_CHECKPOINT:
            assert re.search(
                r"checkpoint-2 is complete\. To go on: trainer\.train\(resume_from_checkpoint=True\)", last
            )
    if how == "raise":
        assert "the disk is on fire" in answer["last"][str(rank)]
        assert "Traceback" in answer["said"][str(rank)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("launchers", LAUNCHERS, ids=str)
@pytest.mark.parametrize("how", FATES)
@pytest.mark.parametrize("where", PLACES)
def test_a_lost_process_ends_the_run_on_all(
    where: str, how: str, launchers: list[int], lived: Lived, whole: Any, tmp_path: Path
) -> None:
    options = ({"peer_timeout": 5} if how in HANGS else {}) | {"ddp_timeout": 321}
    answer = lived(where, how, launchers, tmp_path / "run", options=options)
    assert {*answer["timeouts"]} == {321.0}  # on a CPU too
    check_end(answer, where, how, sum(launchers) - 1, sum(launchers))
    if where in HAS_CHECKPOINT:
        resumed = lived(where, "", launchers, tmp_path / "run", resume=True)
        assert {*resumed["codes"].values()} == {0}, resumed["said"]
        assert resumed["weights"] == whole(where, launchers)


@pytest.mark.nightly
@pytest.mark.parametrize("how", HANGS)
@pytest.mark.parametrize("where", PLACES)
def test_a_hang_ends_within_a_minute_by_default(where: str, how: str, lived: Lived, tmp_path: Path) -> None:
    check_end(lived(where, how, [1, 1], tmp_path / "run"), where, how, 1, 2)


@pytest.mark.nightly
@pytest.mark.parametrize("launchers", [[2], [1, 1]], ids=str)
@pytest.mark.parametrize("how", FATES)
@pytest.mark.parametrize("where", ["load", "step", "save"])
def test_the_first_rank_is_lost(where: str, how: str, launchers: list[int], lived: Lived, tmp_path: Path) -> None:
    """Its process may keep torch's store, and writes the checkpoints."""
    check_end(lived(where, how, launchers, tmp_path / "run", rank=0), where, how, 0, 2)


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["kill", "raise", "stop"])
def test_hosts_without_a_shared_folder(how: str, lived: Lived, tmp_path: Path) -> None:
    """The second host's first process wrote a checkpoint into its own folder; the other one's folder, which is a third
    one here, has none. Each says what is in its own."""
    folder = tmp_path / "run"
    answer = lived("step", how, [1, 2], folder, own_folders=True, rank=0)
    for rank in ("1", "2"):
        assert re.match(rf"Rank 0 of 3 \(host \S+, pid \d+\) {FATES[how]}", answer["last"][rank])
    assert f"{folder}/out of 1/checkpoint-2 is complete. To go on: trainer.train(" in answer["last"]["1"]
    assert f"There is no complete checkpoint in {folder}/out of 2: run it again." in answer["last"]["2"]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("step", "computes"), ("step", "has a child compute"), ("save", "waits for the network"),
        ("load", "waits for the network"), ("evaluate", "computes"), ("fill", "computes"), ("sync", "computes"),
    ],
)  # fmt: skip
def test_a_process_that_takes_its_time_is_not_lost(
    where: str, how: str, lived: Lived, whole: Any, tmp_path: Path
) -> None:
    """For 20 s where the limit is 5."""
    answer = lived(where, how, [2], tmp_path / "run", options={"peer_timeout": 5})
    assert {*answer["codes"].values()} == {0}, answer["said"]
    assert answer["weights"] == whole(where, [2])


SIGNALS = {"SIGTERM": 143, "SIGINT": 130}


@pytest.mark.parametrize(
    ("where", "name", "launchers"),
    [
        ("step", "SIGTERM", [1, 2]),
        ("fill", "SIGINT", [2]),
        *(
            pytest.param(where, name, launchers, marks=pytest.mark.nightly)
            for where in PLACES
            for name in SIGNALS
            for launchers in ([2], [1, 2])
            if (where, name, launchers) not in (("step", "SIGTERM", [1, 2]), ("fill", "SIGINT", [2]))
        ),
    ],
    ids=str,
)
def test_a_signal_for_one_process_ends_all(
    where: str, name: str, launchers: list[int], lived: Lived, whole: Any, tmp_path: Path
) -> None:
    """With that signal's exit code on all, one complete checkpoint where there were steps, and what goes on from it."""
    answer = lived(where, name, launchers, tmp_path / "run")
    assert {*answer["codes"].values()} == {SIGNALS[name]}, answer["said"]
    assert answer["seconds"] < LIMIT_SECONDS
    for last in answer["last"].values():
        assert f"Stopped by {name}." in last
    if where in HAS_CHECKPOINT:
        (kept,) = {re.search(r"(checkpoint-\d) is complete", last).group(1) for last in answer["last"].values()}  # type: ignore[union-attr]
        assert kept in ("checkpoint-3", "checkpoint-4")
        resumed = lived(where, "", launchers, tmp_path / "run", resume=True)
        assert resumed["weights"] == whole(where, launchers)
    if where == "fill":
        assert all("completions (train) are kept" in last for last in answer["last"].values())
