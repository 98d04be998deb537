"""Log-probs, their gradients and the adapter reference over sharded weights (FSDP2), against whole ones."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Runs = dict[int, tuple[Path, dict[str, Any]]]

KINDS = [
    "sharded",
    "sharded_and_resharded",
    "sharded_and_kept",
    "sharded_and_recomputed",
    "sharded_head_apart",
    "sharded_tied_head",
    "sharded_capped_head",
    "sharded_lora",
]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_sharded_model(kind: str, runs: Runs) -> None:
    """Values and statistics per token on each process, and gradients averaged over both; the first time and again."""
    turns = runs[2][1][kind]
    assert len(turns) == 2
    for turn in turns:
        for rank in (0, 1):
            assert turn["values_of_each_process"][rank] == pytest.approx(turn["expected_values"][rank], abs=1e-5)
            assert turn["entropies_of_each_process"][rank] == pytest.approx(turn["expected_entropies"][rank], abs=1e-5)
        assert turn["projected_as_a_matrix_by_each_process"] == [True, True]
        assert turn["num_gradients"][0] == turn["num_gradients"][1] > 0
        assert turn["gradient_size"] > 1
        assert turn["gradient_error"] < 1e-6 * turn["gradient_size"]


ADAPTERS = [f"sharded_adapter{how}" for how in ("", "_kept", "_resharded")]
TRAINED_ADAPTERS = ["sharded_trained_adapter", "sharded_trained_adapter_resharded"]


@pytest.mark.parametrize("kind", [*ADAPTERS, *TRAINED_ADAPTERS])
def test_adapters_off_or_as_they_were_in_a_sharded_model(kind: str, runs: Runs) -> None:
    """After the adapter moved, its reference is still what it was, and asking it changes no gradient of the policy."""
    found = runs[2][1][kind]
    for rank in (0, 1):
        expected = found["expected_values"][rank]
        assert found["values_of_each_process"][rank] == pytest.approx(expected, abs=1e-5)
        moved = [abs(a - b) for a, b in zip(found["policy_of_each_process"][rank], expected, strict=True)]
        assert max(moved) > 0.1
    assert found["gradient_error"] < 1e-6 * found["gradient_size"]
