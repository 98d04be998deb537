"""References inside a policy whose weights are spread over processes: snapshots, adapters, and what moves them.

Each process keeps and exchanges its own part, and every run has the numbers, the drift and the digest of one process.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_mutations import INSIDE_POLICY
from engine_scenarios import POLICY_KINDS
from engines import FSDP2_VARIANTS
from test_engines import faults

pytestmark = pytest.mark.slow

Outcome = Callable[[int, str], dict[str, Any]]

QUICK = (
    "fsdp2/full/device/fixed", "fsdp2/full/disk/hard", "fsdp2/full/cpu/soft", "fsdp2/lora_fresh/adapter/fixed",
    "fsdp2/lora_sft/adapter/fixed", "fsdp2/lora_sft/disk/soft", "fsdp2/dora/device/soft",
    "fsdp2/lora_embeddings/device/soft", "fsdp2/prompt_tuning/adapter/fixed", "fsdp2_kept/full/cpu/soft",
    "fsdp2_recomputed/lora_sft/adapter/fixed", "native/full/cpu/soft", "native/lora_sft/device/hard",
)  # fmt: skip
"""The runs that `make test` makes, on two processes. `make nightly` makes all of `runs`, also on four."""

MIXED_KINDS = (
    "lora_modules_to_save", "lora_head", "lora_embeddings", "lora_bias_all", "lora_unfrozen_norm",
    "lora_frozen_factor", "lora_random_init", "dora", "rslora", "pissa", "olora",
)  # fmt: skip
"""The kinds of adapters that a soft sync mixes."""
OTHER_KINDS = ("lora_sft_named_ref", "lora_fresh_over_sft", "prompt_tuning", "prefix_tuning")


def runs() -> Iterator[str]:
    """The runs of references inside the policy."""
    for engine, policy, motion in itertools.product(("fsdp2", "native"), POLICY_KINDS, ("fixed", "hard", "soft")):
        yield from (f"{engine}/{policy}/{holding}/{motion}" for holding in ("device", "cpu", "disk"))
        if policy != "full" and motion == "fixed":
            yield f"{engine}/{policy}/adapter/fixed"
    for kind in (*MIXED_KINDS, *OTHER_KINDS):
        yield f"fsdp2/{kind}/adapter/fixed"
    for kind in (*MIXED_KINDS, "partly_frozen", "llama_tied"):
        yield from (f"fsdp2/{kind}/device/soft", f"fsdp2/{kind}/disk/hard")
    for variant in FSDP2_VARIANTS:
        yield from (f"{variant}/full/device/fixed", f"{variant}/full/cpu/soft")
        yield from (f"{variant}/lora_sft/adapter/fixed", f"{variant}/lora_sft/device/soft")


@pytest.mark.parametrize(
    ("num_processes", "run"),
    [
        pytest.param(n, run, marks=() if run in QUICK and n == 2 else pytest.mark.nightly)
        for n in (2, 4)
        for run in runs()
    ],
)
def test_a_run_has_the_numbers_of_one_process(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    one = engine_outcome(1, f"one/{run.split('/', 1)[1]}")
    assert list(faults(one, engine_outcome(num_processes, run), run)) == []


@pytest.mark.parametrize(
    ("num_processes", "run"),
    [
        pytest.param(2, f"fsdp2/mutated/{name}", marks=() if "adapter" not in name else pytest.mark.nightly)
        for name in INSIDE_POLICY
    ],
)
def test_an_exchange_that_goes_wrong_is_found(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    name = INSIDE_POLICY[run.split("/")[2]]
    found = list(faults(engine_outcome(1, f"one/{name}"), engine_outcome(num_processes, run), f"fsdp2/{name}"))
    assert found
    assert not any("failed" in fault for fault in found), found


def test_the_quick_runs_are_among_all() -> None:
    assert set(QUICK) <= set(runs())
