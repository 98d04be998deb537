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
        assert turn["num_gradients"][0] == turn["num_gradients"][1] > 0
        assert turn["gradient_size"] > 1
        assert turn["gradient_error"] < 1e-6 * turn["gradient_size"]


@pytest.mark.parametrize("kind", ["sharded_adapter", "sharded_adapter_kept", "sharded_adapter_resharded"])
def test_adapters_off_in_a_sharded_model(kind: str, runs: Runs) -> None:
    """After the adapter moved, its reference is still the base, and asking it changes no gradient of the policy."""
    found = runs[2][1][kind]
    for rank in (0, 1):
        expected = found["expected_values"][rank]
        assert found["values_of_each_process"][rank] == pytest.approx(expected, abs=1e-5)
        moved = [abs(a - b) for a, b in zip(found["policy_of_each_process"][rank], expected, strict=True)]
        assert max(moved) > 0.1
    assert found["gradient_error"] < 1e-6 * found["gradient_size"]


def test_frozen_values_in_a_sharded_model_are_refused(runs: Runs) -> None:
    for message in runs[2][1]["sharded_frozen_adapter"]["refused_by_each_process"]:
        assert "these are sharded (`base_model.model.model.layers.0.self_attn.q_proj.lora_A" in message
        assert "reference='precomputed'" in message
