"""Steps of training on a pretend accelerator: no mix of devices, no wait for it, and no more operations than budgeted.

The accelerator is loaded before torch, so each test is a process of its own: `python tests/device`, which says by
itself which law a cell breaks, and where (see `laws`). CONTRIBUTING.md says when to write the budget anew.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from pretend import build  # noqa: E402

sys.path.remove(str(HERE))

NIGHTLY = ("core", "around the core", "policies", "ways", "variants", "losses", "families", "routes", "shapes")
"""The names of the tables in `cell_tables`, which only that process can import."""


@pytest.fixture(scope="module", autouse=True)
def _needs_a_compiler() -> None:
    if (reason := build.why_not()) is not None:
        pytest.skip(f"no pretend accelerator: {reason}")


def device(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    command = [sys.executable, str(HERE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_cells_that_stand_for_the_rest_hold_the_laws() -> None:
    assert device("--table", "fast", "--check").splitlines()[-1].startswith("18 cells in ")


@pytest.mark.slow
def test_planted_faults_are_found_at_their_lines() -> None:
    assert "13 of 13 faults found" in device("--faults")


@pytest.mark.nightly
@pytest.mark.parametrize("table", NIGHTLY)
def test_all_cells_hold_the_laws(table: str) -> None:
    device("--table", table, "--check")


@pytest.mark.nightly
def test_every_table_is_run() -> None:
    said = subprocess.run([sys.executable, str(HERE), "--table", "none"], capture_output=True, text=True).stderr
    names = said.partition("choose from ")[2].strip().rstrip(")").replace("'", "").split(", ")
    assert sorted(names) == sorted([*NIGHTLY, "fast"])
