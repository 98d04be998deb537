"""Ordinary runs by the flex route: graphs, counted from the trial of the layout to the last step, and numbers."""

from pathlib import Path
from typing import Any

import pytest

from families import tiny_model
from flex_on_cpu import flex_on_cpu, num_graphs
from holdfast import DPOTrainer
from policies import POLICIES, config, logged, rows, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch"),
]

RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "full": ("full", {}, 2),
    "checkpointing": ("full", {"activation_checkpointing": True}, 2),
    "lora": ("lora_sft", {}, 2),
    "partly frozen": ("partly_frozen", {}, 3),  # in the first layer none do
}
"""Policy, options, and the number of graphs."""


def trained(policy: str, folder: Path, **options: Any) -> tuple[DPOTrainer, list[int]]:
    """The trainer after its run, and how many graphs there were after each step."""
    found: list[int] = []
    ours = trainer(POLICIES[policy](), config(folder, **options), train_dataset=rows(2 * options["max_steps"]))
    training_step = ours.training_step

    def counted(*given: Any, **more: Any) -> Any:
        loss = training_step(*given, **more)
        found.append(num_graphs())
        return loss

    ours.training_step = counted
    ours.train()
    return ours, found


@pytest.mark.parametrize(
    ("run", "num_steps"),
    [("full", 6), *(pytest.param(run, 50, marks=pytest.mark.nightly) for run in RUNS)],
)
def test_graphs_and_numbers_of_a_run(run: str, num_steps: int, tmp_path: Path) -> None:
    """The trial compiles the reference's graph, the first step the policy's, and no later step one."""
    policy, options, expected_graphs = RUNS[run]
    options = options | {"max_steps": num_steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    with flex_on_cpu():
        ours, found = trained(policy, tmp_path, **options)
        assert found == [expected_graphs] * num_steps
        evaluated = ours.evaluate(rows(8))["eval_loss"]
        assert num_graphs() == expected_graphs
    theirs, _ = trained(policy, tmp_path, **options)
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4, abs=1e-5), name
    assert evaluated == pytest.approx(theirs.evaluate(rows(8))["eval_loss"], abs=1e-5)


@pytest.mark.nightly
def test_models_of_several_kinds_share_no_graph(tmp_path: Path) -> None:
    """A policy with windows and soft-capping and a reference of another kind: two graphs and one."""
    with flex_on_cpu():
        ours = trainer(
            tiny_model("gemma2"),
            config(tmp_path, max_steps=4, reference="model"),
            ref_model=tiny_model("llama"),
            train_dataset=rows(12),
        )
        ours.train()
        assert num_graphs() == 3
