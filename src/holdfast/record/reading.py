"""A run's record, read back as frozen records."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import final

from holdfast.record.entries import EVENTS, LOGS, SAMPLES, Event, Log, Sample, read_entries
from holdfast.record.facts import FORMAT, Facts
from holdfast.record.typed_json import from_json

FOLDER, FACTS = "record", "facts.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a run was made of, and its logs, events and samples in the order in which they were written."""

    facts: Facts
    logs: tuple[Log, ...]
    events: tuple[Event, ...]
    samples: tuple[Sample, ...]


def has_record(output_dir: Path | str) -> bool:
    """Whether the output folder of a run has a record."""
    return (Path(output_dir) / FOLDER / FACTS).is_file()


def read(output_dir: Path | str) -> Record:
    """The record in the output folder of a run, which may be still training.

    ValueError where there is none, or where it is damaged: it names the file, and the line or the field. A last line
    that is cut is no damage: it is being written, or a kill ended it.
    """
    folder = Path(output_dir) / FOLDER
    return Record(
        facts=read_facts(folder / FACTS),
        logs=read_entries(folder / LOGS, Log.of_line),
        events=read_entries(folder / EVENTS, Event.of_line),
        samples=read_entries(folder / SAMPLES, Sample.of_line),
    )


def read_facts(file: Path) -> Facts:
    """The facts in `facts.json`; ValueError as `read` has it."""
    try:
        found = json.loads(file.read_bytes())
        if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
            raise ValueError(f"its format is {found['format']}, and this version of holdfast reads up to {FORMAT}")
        return from_json(Facts, found)
    except OSError as error:
        raise ValueError(
            f"The record of a run was to be read from {file}, which cannot be read ({error.strerror}). Name the "
            "output folder of a run that DPOTrainer has trained with run_record=True."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} was read as the facts of a run's record and is damaged: {error}. Remove the folder of the record, "
            "or read it with the version of holdfast that wrote it."
        ) from error
