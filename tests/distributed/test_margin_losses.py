"""Losses of the reference's margin over DDP and FSDP2: the numbers of one process, and what is resumed bit for bit.

`alpha_dpo` and `beta_dpo` are functions of the pairs of all processes and of the batches before. The last of three
batches has one pair, so other processes have none there. ZeRO is in `test_zero`, and the quick rows in
`test_batch_losses`.
"""

from collections.abc import Callable
from typing import Any

import pytest
from engine_scenarios import MARGIN_RUNS
from test_engines import faults
from test_resumes import resume_faults

pytestmark = pytest.mark.nightly

Outcome = Callable[[int, str], dict[str, Any]]

RUNS = [
    *((2, f"{engine}/{run}") for engine in ("ddp", "fsdp2") for run in MARGIN_RUNS),
    *((4, f"{engine}/{run}") for engine in ("ddp", "fsdp2") for run in MARGIN_RUNS if "accumulated" not in run),
]
RESUMES = [(2, f"{engine}/{run}/resume") for engine in ("ddp", "fsdp2") for run in MARGIN_RUNS]


@pytest.mark.parametrize(("num_processes", "run"), RUNS, ids=[f"{run} on {n}" for n, run in RUNS])
def test_several_processes_are_one(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    one = engine_outcome(1, f"one/{run.split('/', 1)[1]}")
    assert list(faults(one, engine_outcome(num_processes, run), run)) == []


@pytest.mark.parametrize(("num_processes", "run"), RESUMES, ids=[run for _, run in RESUMES])
def test_what_was_saved_is_taken_up(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    one = engine_outcome(1, f"one/{run.split('/', 1)[1]}")
    assert list(resume_faults(one, engine_outcome(num_processes, run), run)) == []
