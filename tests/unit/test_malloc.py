"""What glibc's malloc keeps; each case in a process of its own, since it is told once and for all."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from holdfast.policy.malloc import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def faults(num_blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_blocks):
        torch.ones(20_000_000)  # 76 MiB, one after another
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(40)
print(kept, faults(3))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")


def kept_and_faults(how: str, **environment: str) -> tuple[str, int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=plain | environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.slow
def test_freed_memory_is_taken_again() -> None:
    """Without a fault for each of its 58,000 pages, once the heap has found its size."""
    kept, faults = kept_and_faults("keep")
    assert kept == "True"
    assert faults < 100
    assert kept_and_faults("leave")[1] > 100 * max(1, faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        pytest.param({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}, marks=pytest.mark.nightly),
    ],
)
def test_who_has_said_otherwise_is_obeyed(environment: dict[str, str]) -> None:
    kept, faults = kept_and_faults("keep", **environment)
    assert kept == "False"
    assert faults > 1_000
