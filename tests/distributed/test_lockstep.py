"""Whatever one process knows, finds, measures or meets: all go on together, to the numbers of one process.

The scenarios are those of `lockstep_scenarios`; a hang is a failure, since the groups of processes have time limits.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from differences import differences

pytestmark = pytest.mark.slow

OF_EACH = ("weights", "messages", "seconds")


def faults(one: dict[str, Any], several: dict[str, Any]) -> Iterator[str]:
    """What differs between a scenario of one process and the same over an engine, except for messages."""
    for found in (one, several):
        if "errors" in found:
            yield f"it failed: {found['errors']}"
            return
    ours, theirs = (
        {key: value for key, value in found.items() if key not in OF_EACH and not key.endswith("each_process")}
        for found in (several, one)
    )
    yield from differences(theirs, ours)
    if "weights" in one:
        for tensor, value in load_file(one["weights"]).items():
            found = load_file(several["weights"])[tensor]
            if not torch.allclose(found, value, rtol=0, atol=1e-5):
                yield f"{tensor} differs by {float((found - value).abs().max())}"


SAMPLE = (
    "agreement_itself",
    "transform_known_to_one",
    "store_of_each_process",
    "missed_by_one",
    "nan_of_one",
    "audit_of_one",
)
"""The scenarios that `make test` runs, over FSDP2 on two processes; `make nightly` runs all of them, also on four."""

Outcomes = dict[str, dict[str, Any]]


def launched(folder: Path, engine: str, num_processes: int, names: Collection[str]) -> Outcomes:
    """What the scenarios came to. A launch in which processes parted is followed by another for what is left."""
    runs = [f"{engine}/lockstep/{name}" for name in names]
    files = {name: folder / f"{run.replace('/', '.')}.json" for name, run in zip(names, runs, strict=True)}
    for attempt in range(len(names)):
        if all(file.exists() for file in files.values()):
            break
        wait(launch(num_processes, folder, *runs, script="engine_main.py"), folder, is_last=attempt == len(names) - 1)
    return {name: json.loads(file.read_text()) for name, file in files.items()}
