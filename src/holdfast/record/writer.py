"""`RecordWriter`: writes a run's record while it trains.

`facts.json` is written whole under another name and moved into its place; entries are appended. So whatever instant a
kill comes at, the record is read. A disk that is full, or a folder that cannot be written to, does not end a run:
it is said once, and what could not be written is missing from the record. Nor does a number that is not finite, of
which the run itself says where it came from: it is null in the record.
"""

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from holdfast.checkpoint.files import flush
from holdfast.record.entries import EVENTS, LOGS, SAMPLES, Event, Log, Sample, append, read_entries, whole_lines
from holdfast.record.facts import Facts, Resumption
from holdfast.record.reading import FACTS, FOLDER, read_facts
from holdfast.record.typed_json import to_json

logger = logging.getLogger(__name__)

FILES = (LOGS, EVENTS, SAMPLES)


@final
class RecordWriter:
    """The record of the run whose output folder is `output_dir`. Constructing it writes nothing."""

    def __init__(self, output_dir: Path | str) -> None:
        self.folder = Path(output_dir) / FOLDER
        self._facts: Facts | None = None
        self._since, self._seconds_before = time.monotonic(), 0.0
        self._has_failed = False

    @property
    def seconds(self) -> float:
        """Seconds since the run began, without those between an interruption and the resumption."""
        return self._seconds_before + time.monotonic() - self._since

    def begin(self, facts: Facts) -> None:
        """Begins a record. One that is there already is of another run, and is removed."""
        self._since, self._seconds_before = time.monotonic(), 0.0
        with self._written():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                (self.folder / name).unlink(missing_ok=True)
        self._write(facts)

    def resume(self, facts: Facts, step: int, num_lines: Mapping[str, int] | None = None) -> None:
        """Goes on in the record that is there, from the checkpoint of `step`.

        Entries after that step are removed, and with `num_lines`, which `num_lines()` gave when the checkpoint was
        written, those after as many lines of each file. `facts` are the resumed run's; the beginning is that of the
        first. A record that is damaged is begun anew.
        """
        now = _now()
        try:
            before = read_facts(self.folder / FACTS)
            kept = self._cut(step, num_lines or {})
        except (ValueError, OSError):
            self.begin(replace(facts, resumed=(Resumption(step=step, time=now),)))
        else:
            self._since, self._seconds_before = time.monotonic(), kept
            resumed = (*before.resumed, Resumption(step=step, time=now))
            self._write(replace(facts, started=before.started, resumed=resumed))
        self.event(step, "resumed", f"Resumed from the checkpoint of step {step}.")

    def num_lines(self) -> dict[str, int]:
        """How many entries each file has, by its name."""
        return {name: len(whole_lines(self.folder / name)) for name in FILES}

    def update(self, **changes: Any) -> None:
        """Writes facts that have changed, by the name of the field of `Facts`."""
        if self._facts is not None:
            self._write(replace(self._facts, **changes))

    def end(self, outcome: str) -> None:
        """Writes how the run ended: one of `facts.OUTCOMES`."""
        self.update(outcome=outcome, finished=_now())

    def log(self, step: int, epoch: float | None, numbers: Mapping[str, Any]) -> None:
        """Appends a log. What is no number is left out."""
        entry = {"step": step, "epoch": epoch, "seconds": round(self.seconds, 3)}
        self._append(LOGS, {**entry, **_numbers_in(numbers), **entry})

    def event(self, step: int, kind: str, text: str, **numbers: Any) -> None:
        """Appends an event. What is no number is left out."""
        entry = {"step": step, "kind": kind, "text": text, "seconds": round(self.seconds, 3)}
        self._append(EVENTS, {**entry, **_numbers_in(numbers), **entry})

    def sample(self, sample: Sample) -> None:
        """Appends a sample."""
        self._append(SAMPLES, to_json(sample))

    def samples(self) -> tuple[Sample, ...]:
        """The samples so far; none of a record that is damaged."""
        try:
            return read_entries(self.folder / SAMPLES, Sample.of_line)
        except (ValueError, OSError):
            return ()

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        with self._written():
            append(self.folder / name, entry)

    def _write(self, facts: Facts) -> None:
        self._facts = facts
        with self._written():
            staged = self.folder / f"{FACTS}.partial"
            staged.write_text(json.dumps(to_json(facts), indent=2, default=str) + "\n", encoding="utf-8")
            flush(staged)
            os.replace(staged, self.folder / FACTS)

    def _cut(self, step: int, num_lines: Mapping[str, int]) -> float:
        """Leaves the entries up to a checkpoint of `step`; returns the seconds of the last of them."""
        seconds = [0.0]
        for name, of_line in ((LOGS, Log.of_line), (EVENTS, Event.of_line), (SAMPLES, Sample.of_line)):
            file = self.folder / name
            entries: Iterable[Any] = read_entries(file, of_line)
            lines = whole_lines(file)[: num_lines.get(name)]
            kept = [line for line, entry in zip(lines, entries, strict=False) if entry.step <= step]
            seconds += [json.loads(line).get("seconds") or 0.0 for line in kept]
            if file.is_file():
                staged = self.folder / f"{name}.partial"
                staged.write_bytes(b"".join(line + b"\n" for line in kept))
                flush(staged)
                os.replace(staged, file)
        return max(seconds)

    @contextmanager
    def _written(self) -> Any:
        """A context for writing. An error of the disk is said once."""
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                logger.warning(
                    "The run's record in %s cannot be written (%s). The run goes on, and its report will lack what "
                    "comes now.", self.folder, error.strerror or error,
                )  # fmt: skip
            self._has_failed = True


def _numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among these values, and scalars of numpy and torch as numbers; truth is 1 or 0."""
    return {name: number for name, value in values.items() if (number := _number(value)) is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return value
    if callable(item := getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return _number(item())
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
