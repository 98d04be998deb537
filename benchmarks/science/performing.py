"""Performs all runs of the experiments, on several processes, and keeps each as it finishes.

A run's file is named by a digest of everything that defines it: seed, scale, function, options, versions, and the
source of holdfast, of the frame and of the function. So an interrupted command goes on where it was, two experiments
share equal runs, and nothing of an older source is taken for new.
"""

import functools
import hashlib
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import holdfast
from holdfast.store.files import write_durably
from science.records import Run, rounded
from science.settings import Scale, setting
from science.training import fill_store, train

PACKAGES = ("torch", "transformers", "accelerate", "datasets")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run of one seed."""

    run: Run
    seed: int
    scale: Scale
    work: Path

    @property
    def definition(self) -> dict[str, Any]:
        perform = self.run.perform
        return {
            "seed": self.seed,
            "scale": asdict(self.scale),
            "perform": f"{perform.__module__}.{perform.__qualname__}",
            "options": dict(self.run.options),
            "versions": versions(),
            "sources": _digest_of_sources(inspect.getfile(Scale), inspect.getfile(train), inspect.getfile(perform)),
        }

    @property
    def path(self) -> Path:
        return self.work / "runs" / f"{_digest(self.definition)}.json"

    @property
    def setting_folder(self) -> Path:
        definition = {key: self.definition[key] for key in ("seed", "scale", "versions")}
        return self.work / "settings" / _digest(definition | {"sources": _digest_of_sources(inspect.getfile(Scale))})


def perform_all(tasks: Sequence[Task], *, num_workers: int) -> None:
    """Performs what is not yet kept, seed by seed; settings come first. Prints a line for each run."""
    tasks = sorted({task.path: task for task in tasks}.values(), key=lambda task: task.seed)
    missing = [task for task in tasks if not task.path.exists()]
    print(f"{len(tasks)} runs, {len(tasks) - len(missing)} of them kept from before", flush=True)
    if not missing:
        return
    started = time.monotonic()
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tasks[0].work,)
    ) as pool:
        of_seeds = list({task.setting_folder: task for task in missing}.values())
        for count, _ in enumerate(_finished([pool.submit(make_setting, task) for task in of_seeds]), start=1):
            print(f"setting {count} of {len(of_seeds)}: {time.monotonic() - started:.0f} s", flush=True)
        begun = time.monotonic()
        for count, (task, seconds) in enumerate(_finished([pool.submit(perform, task) for task in missing]), start=1):
            left = (time.monotonic() - begun) / count * (len(missing) - count)
            print(
                f"[{count}/{len(missing)}] {task.run.name}, seed {task.seed}: {seconds:.1f} s; "
                f"about {left / 60:.0f} min left",
                flush=True,
            )


def numbers(task: Task) -> dict[str, float]:
    """What is kept of a run."""
    return json.loads(task.path.read_text(encoding="utf-8"))["numbers"]


def cpu_seconds(tasks: Sequence[Task]) -> float:
    """The processor's seconds of these runs and of their settings."""
    runs = {task.path: json.loads(task.path.read_text(encoding="utf-8"))["cpu_seconds"] for task in tasks}
    folders = {task.setting_folder for task in tasks}
    of_settings = [json.loads((each / "numbers.json").read_text(encoding="utf-8"))["cpu_seconds"] for each in folders]
    return round(sum(runs.values()) + sum(of_settings))


def perform(task: Task) -> tuple[Task, float]:
    """Performs a run, keeps its numbers, and returns the processor's seconds that it took. A run that another command
    has kept in the meantime is not performed again."""
    if task.path.exists():
        return task, 0.0
    started = time.process_time()
    found = task.run.perform(setting(task.seed, task.scale, task.setting_folder), task.run.options)
    seconds = round(time.process_time() - started, 1)
    kept = {"definition": task.definition, "numbers": rounded(found), "cpu_seconds": seconds}
    task.path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(task.path, f"{json.dumps(kept, indent=1)}\n".encode())
    return task, seconds


def make_setting(task: Task) -> None:
    """Makes and keeps the setting of a run, with the reference's log-probs of its pairs."""
    fill_store(setting(task.seed, task.scale, task.setting_folder))


@functools.cache
def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """What a result file says of the machine."""
    return {"versions": {"python": platform.python_version(), **versions()}, "cpu": _cpu_name()}


def _finished(futures: Sequence["Future[Any]"]) -> Iterator[Any]:
    """The results as they come. The first error ends everything that has not begun."""
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _start_worker(work: Path) -> None:
    """Gives a process of the pool one thread, and a file for what the trainer prints of each run."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    log = os.open(work / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())


def _digest(definition: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:24]


@functools.cache
def _digest_of_sources(*files: str) -> str:
    """Of holdfast, and of these files."""
    found = hashlib.sha256()
    for path in sorted(Path(holdfast.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    for file in sorted({*files}):
        found.update(Path(file).read_bytes())
    return found.hexdigest()[:16]


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
