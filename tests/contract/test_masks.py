"""Completions of which some tokens are only seen: losses, gradients and metrics are those of the scored tokens.

Every number is compared with the naive oracle's, which reads each sequence whole and unpadded, takes full logits and
picks the scored tokens in a loop. A run's weights after its last step show that its gradients are the oracle's.
"""

import copy
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import nn

from covering import covering
from families import tiny_model
from holdfast import DataCollatorForPreference, DPOTrainer
from masked_rows import SIDES, masked_data, masked_rows, oracle_losses, scored_logps
from policies import POLICIES, config, logged, trainer

BATCH, NUM_STEPS = 3, 4
LAYOUTS = ("padded", "packed", "prefix_shared")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("full", {"reference": "model"}),
    "adapter": ("lora_sft", {"reference": "adapter"}),
    "snapshot": ("full", {"reference": "snapshot"}),
    "precomputed": ("full", {"reference": "precomputed"}),
    "windowed": ("full", {"reference": "snapshot", "reference_window": 3}),
    "two_batches_a_step": ("full", {"reference": "model", "tokens_per_batch": 30}),
}
"""Kind of policy and options."""
LOSSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ("sigmoid", {}, {}),
    "ipo": ("ipo", {}, {}),
    "sigmoid_norm": ("sigmoid_norm", {"beta": 2.0}, {}),
    "simpo": ("simpo", {"beta": 2.0}, {}),
    "orpo": ("orpo", {}, {}),
    "sft": ("sft", {}, {}),
    "ld": ("sigmoid", {"ld_alpha": 0.4}, {}),
    "wpo": ("sigmoid", {}, {"use_weighting": True}),
}
"""The oracle's loss, options of both, options of the run alone."""
NO_REFERENCE = {"simpo", "orpo", "sft"}
CELLS = [cell for cell in itertools.product(LAYOUTS, WAYS, LOSSES) if cell[2] not in NO_REFERENCE or cell[1] == "model"]
COVERING = set(covering(CELLS, strength=2))


class Trajectory(NamedTuple):
    losses: list[float]
    weights: dict[str, torch.Tensor]


def batches() -> list[list[dict[str, Any]]]:
    table = masked_rows()
    epoch = [table[first : first + BATCH] for first in range(0, len(table), BATCH)]
    return (epoch * NUM_STEPS)[:NUM_STEPS]


@functools.cache
def expected(kind: str, name: str) -> Trajectory:
    """The naive loop's."""
    loss, options, own = LOSSES[name]
    policy = POLICIES[kind]().eval()
    reference = copy.deepcopy(policy)
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    losses = []
    for batch in batches():
        of_pairs = oracle_losses(
            loss, policy, reference, batch, {"beta": 0.2} | options, is_weighted="use_weighting" in own
        )
        losses.append(of_pairs.mean().item())
        gradients = torch.autograd.grad(of_pairs.mean(), list(trainable.values()), allow_unused=True)
        for parameter, gradient in zip(trainable.values(), gradients, strict=True):
            if gradient is not None:
                parameter.data -= 0.1 * gradient
    return Trajectory(losses, {name: p.detach() for name, p in trainable.items()})


def run_of(kind: str, folder: Path, data: Any = None, **options: Any) -> DPOTrainer:
    parts = {part: options.pop(part) for part in ("data_collator", "eval_dataset") if part in options}
    args = config(
        folder,
        **{
            "per_device_train_batch_size": BATCH, "max_steps": NUM_STEPS, "learning_rate": 0.1,
            "train_sampling_strategy": "sequential", "beta": 0.2,
        } | options,
    )  # fmt: skip
    return trainer(POLICIES[kind](), args, train_dataset=masked_data() if data is None else data, **parts)


def assert_follows(ours: DPOTrainer, theirs: Trajectory) -> None:
    ours.train()
    assert logged(ours) == pytest.approx(theirs.losses, abs=1e-5)
    found = dict(ours.model.named_parameters())
    for name, weight in theirs.weights.items():
        torch.testing.assert_close(
            found[name].detach(), weight, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("layout", "way", "name"),
    [pytest.param(*cell, marks=[] if cell in COVERING else pytest.mark.nightly) for cell in CELLS],
)
def test_a_run_follows_the_oracle(layout: str, way: str, name: str, tmp_path: Path) -> None:
    kind, options = WAYS[way]
    loss, of_both, own = LOSSES[name]
    ours = run_of(kind, tmp_path, layout=layout, loss_type=loss, **options, **of_both, **own)
    assert ours.data_collator.name == layout
    assert_follows(ours, expected(kind, name))
