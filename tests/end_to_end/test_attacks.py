"""Generated attacks on the command line (`dev/attacks`): each ends in success or in one message, with nothing lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ATTACKS = Path(__file__).parents[2] / "dev" / "attacks"


def attack(folder: Path, *options: str) -> str:
    """What `python dev/attacks` says, which must have found no failure."""
    command = [sys.executable, str(ATTACKS), "--failures", str(folder / "failures.jsonl"), *options]
    environment = os.environ | {"HOLDFAST_HOME": str(folder), "TMPDIR": str(folder)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-3000:]}"
    return ended.stdout


@pytest.mark.slow
def test_a_sample_of_every_kind(tmp_path):
    assert "30 attacks" in attack(tmp_path, "--number", "30", "--seed", "7")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["values", "yaml", "data", "models", "checkpoints", "stores", "disks", "signals"])
def test_every_kind(tmp_path, kind):
    number = "40" if kind in ("disks", "signals") else "250"
    assert f"{number} attacks" in attack(tmp_path, "--number", number, "--seed", "11", "--kinds", kind)
