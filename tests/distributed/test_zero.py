"""ZeRO-1, -2 and -3 of DeepSpeed give the numbers of one process, for every way to hold a reference (law L7).

DeepSpeed is an optional extra, and compiles a part of itself when it is first used. Where it is not installed, or
nothing compiles it, the tests are skipped.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from engine_scenarios import MARGIN_RUNS, names
from engines import HAS_DEEPSPEED
from test_engines import faults
from test_resumes import resume_faults

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed (pip install -e '.[deepspeed]')"),
]

Outcome = Callable[[int, str], dict[str, Any]]

ENGINES = ("zero1", "zero2", "zero3", "zero3born")
SAMPLE = (
    "full/model/soft", "full/device/fixed", "full/disk/hard", "full/precomputed/fixed", "full/chosen_path/fixed",
    "lora_fresh/adapter/fixed", "lora_sft/adapter/fixed", "lora_sft/cpu/soft",
)  # fmt: skip
RUNS = [
    *((2, run) for engine in ENGINES for run in names(engine)),
    *((2, f"{engine}/{run}") for engine in ("zero3kept", "zero3host") for run in SAMPLE),
    *((4, f"zero3/{run}") for run in SAMPLE),
    *((2, f"{engine}/{run}") for engine in ("zero2", "zero3") for run in MARGIN_RUNS),
    *((4, f"zero3/{run}") for run in MARGIN_RUNS if "accumulated" not in run),
]
RESUMES = [
    *(f"{engine}/full/device/soft/resume" for engine in ("zero1", "zero2", "zero3")),
    "zero3/full/model/hard/resume", "zero3/full/disk/fixed/resume", "zero3/full/chosen/soft/resume",
    *(f"{engine}/{run}/resume" for engine in ("zero2", "zero3") for run in MARGIN_RUNS),
    "zero3/full/precomputed/fixed/resume",
    "zero3/lora_sft/device/soft/resume", "zero3/lora_sft/adapter/fixed/resume", "zero2/lora_sft/adapter/fixed/resume",
]  # fmt: skip

_COMPILE = """
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
assert builder is not None and builder.is_compatible(), "its part for a CPU cannot be compiled here"
builder.load()
"""


@pytest.fixture(scope="module")
def compiled() -> None:
    """DeepSpeed as it runs on a CPU, with what it compiles at first use; skips where it cannot."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    if found.returncode != 0:
        pytest.skip(f"DeepSpeed cannot be used here: {(found.stderr.strip().splitlines() or ['?'])[-1]}")


@pytest.mark.parametrize(("num_processes", "run"), RUNS, ids=[f"{run} on {n}" for n, run in RUNS])
@pytest.mark.usefixtures("compiled")
def test_zero_is_one_process(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    one = engine_outcome(1, f"one/{run.split('/', 1)[1]}")
    assert list(faults(one, engine_outcome(num_processes, run), run)) == []


@pytest.mark.parametrize(("num_processes", "run"), [(2, run) for run in RESUMES], ids=RESUMES)
@pytest.mark.usefixtures("compiled")
def test_zero_is_taken_up(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    """Bit for bit the uninterrupted run; another base is refused, and the saved model is the trained one."""
    one = engine_outcome(1, f"one/{run.split('/', 1)[1]}")
    assert list(resume_faults(one, engine_outcome(num_processes, run), run)) == []
