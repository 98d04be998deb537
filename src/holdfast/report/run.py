"""A run as its report reads it: the record in its output folder, or `trainer_state.json` where there is none, and what
its checkpoints say of the reference."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from holdfast.checkpoint.files import DamagedError
from holdfast.checkpoint.manifest import complete_checkpoints, is_complete, read_manifest, step_of
from holdfast.record.entries import Event, Log, Sample
from holdfast.record.facts import Facts
from holdfast.record.reading import has_record, read

STATE = "trainer_state.json"
_CHOOSES = "rewards/margins"
"""A metric that every evaluation has: what stands before it in a name is the evaluation's prefix."""
_SUMMARIES = ("train_", "total_flos")
"""How names begin that transformers logs once, at the end of training."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The last complete checkpoint: where it is, its step, and its manifest, which is empty where it is damaged."""

    folder: Path
    step: int
    manifest: Mapping[str, Any]
    damage: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run. `facts` is None where it left no record; then events and samples are empty, and logs are those of
    `trainer_state.json`. What is logged once, at the end of training, is left out. `columns` are steps and values of
    each metric, in the order of their first log."""

    name: str
    folder: Path
    facts: Facts | None
    logs: tuple[Log, ...]
    events: tuple[Event, ...]
    samples: tuple[Sample, ...]
    checkpoint: Checkpoint | None
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((log.step for log in self.logs), default=0)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all logged numbers, in the order of their first log."""
        return tuple(self.columns)

    @property
    def evaluations(self) -> tuple[str, ...]:
        """What the names of metrics begin with, for each evaluation set: `eval_`, or `eval_<name>_`."""
        found = [name.removesuffix(_CHOOSES) for name in self.metrics if name.endswith(_CHOOSES)]
        return tuple(name for name in found if name.startswith("eval_"))

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, however it did. One without a record has."""
        return self.facts is None or self.facts.outcome != "running"

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which a metric was logged, and its values."""
        return self.columns.get(metric, (np.empty(0), np.empty(0)))

    def last(self, metric: str) -> float | None:
        """The last finite value of a metric, None where it was never logged."""
        _, values = self.series(metric)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else None

    def syncs(self) -> list[tuple[int, str]]:
        """The steps at which a moving reference was synced, each with a text. Without events they are those that
        `reference/version` and `reference/age` tell: the last one before each log."""
        found = [(event.step, event.text) for event in self.events if event.kind == "sync"]
        if found:
            return found
        steps, versions = self.series("reference/version")
        ages = self.series("reference/age")[1]
        told: dict[int, str] = {}
        for step, version, age in zip(steps, versions, ages, strict=False):
            if version >= 1:
                told.setdefault(int(step - age), f"sync {int(version)}")
        return sorted(told.items())


def read_runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    """The runs in these output folders, each with a name of its own: the last part of its path, or as many as tell it
    from the others. ValueError where a folder holds none, or is named twice."""
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise ValueError(
                f"a report of several runs was asked for, and {folders[place]} is named twice. Name it once."
            )
    runs = [read_run(folder) for folder in folders]
    return tuple(replace(run, name=name) for run, name in zip(runs, _names(resolved), strict=True))


def read_run(folder: Path) -> Run:
    """The run in an output folder, or in one of its checkpoints. ValueError where there is none, or where what it left
    is damaged."""
    if not folder.is_dir():
        found = "that is a file" if folder.exists() else "there is no such folder"
        raise ValueError(f"a report was asked for of {str(folder)!r}, but {found}. Name the output folder of a run.")
    checkpoint = _checkpoint(folder)
    name = folder.resolve().name
    if has_record(folder):
        record = read(folder)
        logs = _without_summaries(record.logs)
        return Run(
            name=name, folder=folder, facts=record.facts, logs=logs, events=record.events, samples=record.samples,
            checkpoint=checkpoint, columns=_columns(logs),
        )  # fmt: skip
    states = [folder / STATE, *([checkpoint.folder / STATE] if checkpoint is not None else [])]
    state = next((path for path in states if path.is_file()), None)
    if state is None:
        raise ValueError(
            f"a report was asked for of {str(folder)!r}, which has neither a run's record (record/facts.json) nor a "
            f"{STATE}. Name the output folder of a run that has logged something."
        )
    logs = _without_summaries(_logged(state))
    return Run(
        name=name, folder=folder, facts=None, logs=logs, events=(), samples=(), checkpoint=checkpoint,
        columns=_columns(logs),
    )  # fmt: skip


def _columns(logs: Sequence[Log]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    points: dict[str, tuple[list[float], list[float]]] = {}
    for log in logs:
        for name, value in log.numbers.items():
            steps, values = points.setdefault(name, ([], []))
            steps.append(log.step)
            values.append(value)
    return {name: (np.array(steps, dtype=np.float64), np.array(values)) for name, (steps, values) in points.items()}


def _checkpoint(folder: Path) -> Checkpoint | None:
    """The last complete checkpoint in a folder, or the folder itself where it is one."""
    found = [folder] if is_complete(folder) else complete_checkpoints(folder)
    if not found:
        return None
    step = step_of(found[-1]) or 0
    try:
        return Checkpoint(folder=found[-1], step=step, manifest=read_manifest(found[-1]))
    except (DamagedError, ValueError) as error:
        return Checkpoint(folder=found[-1], step=step, manifest={}, damage=str(error))


def _logged(file: Path) -> tuple[Log, ...]:
    try:
        history = json.loads(file.read_bytes())["log_history"]
        return tuple(
            Log(step=int(entry["step"]), epoch=entry.get("epoch"), seconds=None, numbers=_numbers(entry))
            for entry in history
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(
            f"{file} was read as the logs of a run and is damaged ({type(error).__name__}: {error}). Name a run whose "
            "logs are whole, or remove the file."
        ) from error


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in entry.items()
        if name not in ("step", "epoch") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _without_summaries(logs: Sequence[Log]) -> tuple[Log, ...]:
    """The logs without what is logged once at the end, and without times of evaluations."""
    kept = []
    for log in logs:
        numbers = {
            name: value
            for name, value in log.numbers.items()
            if not name.startswith(_SUMMARIES) and not _is_speed_of_evaluation(name) and math.isfinite(value)
        }
        if numbers:
            kept.append(replace(log, numbers=numbers))
    return tuple(kept)


def _is_speed_of_evaluation(name: str) -> bool:
    return name.startswith("eval_") and name.endswith(("_runtime", "_per_second", "_model_preparation_time"))


def _names(folders: Sequence[Path]) -> list[str]:
    num_parts = 1
    longest = max(len(folder.parts) for folder in folders)
    while True:
        names = ["/".join(folder.parts[-num_parts:]) for folder in folders]
        if len(set(names)) == len(names) or num_parts >= longest:
            return names
        num_parts += 1
