"""How the benchmarks measure: a process for each measurement, clocks and peaks of training steps, the machine.

A measurement runs in a fresh process that prints one line of JSON. A step is timed from the end of the one before, so
everything between two steps counts.

The peak of a step is the growth of the kernel's own mark (VmHWM, reset before each step). It starts from what was
resident when the step before had ended, its gradients were freed and the allocator was trimmed. So it has gradients and
activations in it, but no weights, references or optimizer state. The steps whose peak is measured are not timed: freed
blocks of 64 KiB and more go back to the system at once, so that the peak holds no unused memory. On a GPU both come
from torch's own counters. Needs Linux.

Given up: peaks and times of the same steps, since handing memory back costs time.
"""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_BLOCK_BYTES = 65_536
_QUIET = 0.9


# --- processes --------------------------------------------------------------------------------------------------------


def in_a_process(script: str, work: Mapping[str, Any], *, threads: int, folder: Path) -> dict[str, Any]:
    """What `script --one <work as JSON>` prints as its last line, run in a fresh process with caches of its own; and
    `idle_before`, how much of the processors' time nobody used just before."""
    before = idle_share()
    if before < _QUIET:
        say(f"the processors are {before:.0%} idle: others use them, and the figures will be theirs as well")
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HOLDFAST_HOME": str(folder / "holdfast"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script, "--one", json.dumps({**work, "folder": str(folder), "threads": threads})]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{work}: exit code {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"idle_before": round(before, 2)}


def choose_device(name: str) -> None:
    """From here on, this process and those that it starts measure on this device; `auto` is a GPU where there is one.

    To be called before torch is asked for devices. Exits where `cuda` is asked for and there is none.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit(
                f"device cuda was asked for, but torch {torch.__version__} finds no GPU here. Use --device cpu, or a "
                "machine with a GPU and a CUDA build of torch."
            )


def idle_share(seconds: float = 0.5) -> float:
    """The share of the processors' time that went unused during so many seconds."""

    def ticks() -> list[int]:
        return [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]

    before = ticks()
    time.sleep(seconds)
    spent = [now - then for now, then in zip(ticks(), before, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent[:8]))  # idle and waiting for disks; guests are in the others


def say(line: str) -> None:
    """Writes a line of progress."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {line}\n")
    sys.stderr.flush()


# --- memory and time --------------------------------------------------------------------------------------------------


def resident(name: str) -> float:
    """A field of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def hand_freed_memory_back() -> None:
    """From here on, the allocator keeps no freed block of 64 KiB or more."""
    libc = ctypes.CDLL(None)
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        assert libc.mallopt(option, _BLOCK_BYTES) == 1, "glibc's allocator"


class Peak:
    """The growth of this process's memory, or of the GPU's, between `begin` and `end`."""

    def __init__(self) -> None:
        self._before = 0.0

    def begin(self) -> None:
        """Starts from the memory that is in use now."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = resident("VmRSS")

    def end(self) -> float:
        """MiB at the peak since `begin`, above the memory that was in use then."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 2**20 - self._before
        return resident("VmHWM") - self._before


def clock() -> float:
    """The time in seconds, once the device has done everything."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(warmup: int, timed: int) -> Any:
    """A `TrainerCallback` with `seconds` of the `timed` steps after the first `warmup` (at least 1), the most MiB that
    were `resident` until then, weights, libraries and free blocks included, and `peaks` in MiB of the steps that
    follow."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.peaks: list[float] = []
            self.resident = 0.0
            self._start = 0.0
            self._peak = Peak()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = clock()
            if warmup < state.global_step <= warmup + timed:
                self.seconds.append(now - self._start)
            if state.global_step > warmup + timed:
                self.peaks.append(self._peak.end())
            if state.global_step == warmup + timed:
                self.resident = resident("VmHWM")
                hand_freed_memory_back()
            if state.global_step >= warmup + timed:
                self._peak.begin()
            self._start = clock()

    return Watch()


# --- results ----------------------------------------------------------------------------------------------------------


def environment(threads: int) -> dict[str, Any]:
    """The machine, threads and versions that the numbers depend on."""
    import importlib.metadata as metadata

    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor(),
        "num_cpus": os.cpu_count(),
        "num_threads": threads,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class Results:
    """A file of results by name, all of one environment, to which a benchmark adds. Without a path none is written."""

    def __init__(self, path: Path | None, benchmark: str, threads: int) -> None:
        self._path = path
        self._document: dict[str, Any] = {"benchmark": benchmark, "environment": environment(threads), "results": {}}
        if path is not None and path.is_file():
            self._document["results"] = self._found(json.loads(path.read_text(encoding="utf-8")))

    def _found(self, document: dict[str, Any]) -> dict[str, Any]:
        """The results in the file. ValueError where they were measured in another environment."""
        ours = self._document["environment"]
        theirs = document.get("environment", {})
        differing = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} - {"date"}
        if differing or document.get("benchmark") != self._document["benchmark"]:
            found = ", ".join(f"{name} {theirs.get(name)!r}, now {ours.get(name)!r}" for name in sorted(differing))
            raise ValueError(
                f"results were to be added to {self._path}, which holds those of another environment or benchmark "
                f"({found or document.get('benchmark')!r}). Remove the file, or name another with --output."
            )
        return document["results"]

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Writes the file with this result in it, in place of an earlier one of the same name."""
        self._document["results"][name] = result
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._document, indent=2) + "\n", encoding="utf-8")
