"""`runs`: the numbers of every scenario from one process and from two, computed once for all tests and workers."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import holdfast

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 300
ENDING_SECONDS = 60
"""More than the 30 s after which torch's launcher kills those of its processes that have not ended."""


def launch(num_processes: int, folder: Path, *names: str, script: str = "main.py") -> subprocess.Popen[str]:
    """Starts a script with that many processes on the loopback device; its output goes to FOLDER/output.txt."""
    folder.mkdir(parents=True, exist_ok=script != "main.py")
    command = [sys.executable]
    if num_processes > 1:
        # --standalone has torch find a free port.
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += [f"--nproc_per_node={num_processes}"]
    paths = [HERE, HERE.parent, Path(holdfast.__file__).parent.parent]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [*command, str(HERE / script), str(folder), *names],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )


def end(process: subprocess.Popen[str]) -> None:
    """Ends a launch. The launcher ends its processes, which are in groups of their own."""
    process.terminate()
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def results(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """What the launched processes wrote; fails the test with what they said where they did not."""
    try:
        code: int | str = process.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        end(process)
        code = f"none within {TIMEOUT_SECONDS} s"
    if code != 0:
        said = (folder / "output.txt").read_text(errors="replace")
        start = said.find("--- scenario")  # the first process that failed; the others only miss it
        pytest.fail(
            f"{folder.name}: exit code {code}\n{said[start:][:6000] if start >= 0 else said[-6000:]}", pytrace=False
        )
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, Any]]]:
    """{number of processes: (folder with a folder per scenario, {scenario: numbers})}."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    folders = {1: root / "one process", 2: root / "two processes"}
    with open(root / "distributed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it, or have finished
        pending = {n: launch(n, folder) for n, folder in folders.items() if not folder.exists()}
        for n, process in pending.items():
            results(process, folders[n])
    return {n: (folder, _read(folder)) for n, folder in folders.items()}


def launch_engines(num_processes: int, folder: Path, names: Sequence[str]) -> None:
    """Runs what `engine_main` runs. Where processes part, the launch ends, and another follows for what is left."""
    files = [folder / f"{name.replace('/', '.')}.json" for name in names]
    for _ in names:
        if all(file.exists() for file in files):
            return
        process = launch(num_processes, folder, *names, script="engine_main.py")
        while process.poll() is None:
            num_outcomes = sum(file.exists() for file in files)
            try:
                process.wait(TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                if sum(file.exists() for file in files) == num_outcomes:
                    end(process)
    missing = [name for name, file in zip(names, files, strict=True) if not file.exists()]
    if missing:
        said = (folder / "output.txt").read_text(errors="replace")
        pytest.fail(f"no outcome of {missing}:\n{said[-6000:]}", pytrace=False)


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / "results.json").exists():
        pytest.fail(f"{folder.name} failed; the first test that needed it says how", pytrace=False)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def engine_outcome(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[int, str], dict[str, Any]]:
    """`engine_outcome(num_processes, run)`: what a run of `engine_main` came to.

    One launch for each number of processes runs all that tests ask for in their parameters `num_processes` and `run`;
    the runs of one process are those without the engine.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    parameters = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    asked = sorted({(each["num_processes"], each["run"]) for each in parameters if {"num_processes", "run"} <= {*each}})

    def find(num_processes: int, name: str) -> dict[str, Any]:
        folder = root / f"engines with {num_processes}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name.replace('/', '.')}.json"
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it, or have finished
            if not file.exists():
                rest = {f"one/{run.split('/', 1)[1]}" for _, run in asked if not re.search("/(mutated|from|full)", run)}
                own = rest if num_processes == 1 else {run for n, run in asked if n == num_processes}
                launch_engines(num_processes, folder, sorted(own | {name}))
        return json.loads(file.read_text())

    return find
