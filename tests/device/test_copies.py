"""Copies between host and device in a step on the pretend accelerator: which there are, and that none is waited for.

It runs in a process of its own, since what pretends to be a device must be there before torch is.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STORED, OFFLOADED = "holdfast/reference/sources/stored.py", "holdfast/training/offloading.py"
PLAN = "holdfast/scoring/row_plan.py"
SNAPSHOT, LOADER = "holdfast/reference/scorers/snapshot.py", "accelerate/utils/operations.py"

CELLS: dict[str, set[tuple[str, str]]] = {
    "full/padded/precomputed/bf16": {("cpu->cuda", STORED)},
    "lora_sft/packed/precomputed/bf16": {("cpu->cuda", STORED), ("cpu->cuda", PLAN)},
    "full/padded/snapshot_cpu/bf16": {("cpu->cuda", SNAPSHOT)},
    "full/padded/model/offloading/shape=0.5b/pairs=1": {("cpu->cuda", OFFLOADED), ("cuda->cpu", OFFLOADED)},
    "lora_fresh/padded/adapter/bf16/offloading/shape=0.5b/pairs=1": {
        ("cpu->cuda", OFFLOADED),
        ("cuda->cpu", OFFLOADED),
    },
}
"""By cell: its copies beside those of the data loader, as (direction, file)."""

COPY = re.compile(r"copy (\d+)x (\w+->\w+) \S+( BLOCKING)? at ([^:]+):")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the pretend device is compiled")
def test_copies_are_those_and_nobody_waits() -> None:
    """The routes of attention are left out: with SDPA alone, padded rows need no copies of their own, and filled rows
    one, of their plan, which goes with the batch."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here), *CELLS, "--routes", "pieces"], capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [part for part in re.split(r"^(?=\S)", done.stdout, flags=re.M) if "attention kernels" in part]
    assert len(parts) == len(CELLS), done.stdout
    for cell, part in zip(CELLS, parts, strict=True):
        copies = COPY.findall(part)
        assert "read" not in re.sub(r"read \d+x \S+ at transformers.*", "", part), part
        assert {(direction, file) for _, direction, _, file in copies if file != LOADER} == CELLS[cell], part
        assert not any(blocking for _, _, blocking, _ in copies), part
        if "offloading" in cell:
            out, back = (
                sum(int(n) for n, found, _, file in copies if (found, file) == (direction, OFFLOADED))
                for direction in ("cuda->cpu", "cpu->cuda")
            )
            assert out == back > 20, part
