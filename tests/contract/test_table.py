"""One contract for every reference: a run of each cell of the table follows a naive loop with a second fp32 model.

However the reference is held, whenever it is asked, whether it moves and where the data come from, losses and trained
weights agree to 1e-5 step by step, also across an epoch, a short last batch, two syncs, and windows that a sync, the
end of an epoch and the end of the run cut short. A cell without a meaning is refused, and the refusal is its test.

`make test` runs the covering cells, in which any three values meet; `make nightly` runs every cell.

The oracle's batches are the dataset's rows in their order, which every run is told to keep.
"""

import copy
import functools
import math
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from covering import covering
from holdfast import DPOTrainer
from naive import Row, naive_loss, naive_run
from policies import POLICIES, config, logged, rows, trainer
from table import CELLS, COVERING, KINDS, MOTIONS, SYNC_STEPS, WAYS, Cell, block, written

MAX_STEPS, BATCH_SIZE = 7, 2
NUM_PAIRS = {1: 9, 2: 11}
"""By the number of batches that a step accumulates: an epoch ends after 5 steps or 3, with a batch of one pair."""

FAST_KINDS = ("full", "lora_sft")
HELD_OUT = rows(3, seed=3)


class Trajectory(NamedTuple):
    """What a run leaves behind: the loss of each step, the trained weights, the loss on `HELD_OUT` after it."""

    losses: list[float]
    weights: dict[str, Tensor]
    held_out_loss: float


def batches(accumulated: int) -> list[list[Row]]:
    """Those of all steps, in the order of the rows."""
    table: list[Row] = rows(NUM_PAIRS[accumulated]).to_list()
    epoch = [table[first : first + BATCH_SIZE] for first in range(0, len(table), BATCH_SIZE)]
    return (epoch * MAX_STEPS)[: MAX_STEPS * accumulated]


@functools.cache
def expected(kind: str, alpha: float, accumulated: int = 1) -> Trajectory:
    """The naive loop's."""
    policy = POLICIES[kind]()
    losses, reference = naive_run(policy, batches(accumulated), alpha=alpha, every=SYNC_STEPS, accumulated=accumulated)
    assert max(losses) - min(losses) > 1e-3, "the run must move for a comparison to mean anything"
    at_zero_margin = [0, *range(SYNC_STEPS, MAX_STEPS, SYNC_STEPS)] if alpha == 1 else [0]
    assert [losses[step] for step in at_zero_margin] == pytest.approx([math.log(2)] * len(at_zero_margin), abs=1e-5)
    return Trajectory(losses, trained(policy), naive_loss(policy, reference, HELD_OUT.to_list()).item())


def trained(policy: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def run_of(kind: str, folder: Path, data: str = "map", accumulated: int = 1, **options: Any) -> DPOTrainer:
    """A trainer of the table's run, not yet trained."""
    pairs: Any = rows(NUM_PAIRS[accumulated])
    args = config(
        folder,
        max_steps=MAX_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=accumulated,
        train_sampling_strategy="sequential",
        **options,
    )
    return trainer(POLICIES[kind](), args, train_dataset=pairs.to_iterable_dataset() if data == "stream" else pairs)


def assert_follows(ours: DPOTrainer, theirs: Trajectory, num_syncs: int) -> None:
    """Trains, and compares every loss, every trained weight and the loss on data that nobody announced."""
    ours.train()
    assert logged(ours) == pytest.approx(theirs.losses, abs=1e-5)
    found = trained(ours.model)
    assert found.keys() == theirs.weights.keys()
    for name, weight in found.items():
        torch.testing.assert_close(
            weight, theirs.weights[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert ours.reference.version == num_syncs
    assert ours.evaluate(HELD_OUT)["eval_loss"] == pytest.approx(theirs.held_out_loss, abs=1e-5)


def marked(cell: Cell) -> Any:
    """The cell as a parameter. Of the covering ones, those of the fast kinds go into every check."""
    marks = [] if cell in COVERING else [pytest.mark.nightly]
    if cell.kind not in FAST_KINDS:
        marks.append(pytest.mark.slow)
    return pytest.param(cell, id=str(cell), marks=marks)


@pytest.mark.parametrize("cell", [marked(cell) for cell in CELLS])
def test_every_cell(cell: Cell, tmp_path: Path) -> None:
    if cell.refusal is not None:
        with pytest.raises(ValueError, match=cell.refusal.match):
            run_of(cell.kind, tmp_path, cell.data, **cell.options)
        return
    alpha = MOTIONS[cell.motion]
    ours = run_of(cell.kind, tmp_path, cell.data, **cell.options)
    assert_follows(ours, expected(cell.kind, alpha), num_syncs=MAX_STEPS // SYNC_STEPS if alpha else 0)


ACCUMULATED = [c for c in CELLS if c.kind in FAST_KINDS and c.way in ("model", "snapshot_disk", "precomputed")]
ACCUMULATED_COVERING = set(covering([astuple(cell) for cell in ACCUMULATED], strength=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=str(cell), marks=[] if astuple(cell) in ACCUMULATED_COVERING else pytest.mark.nightly)
        for cell in ACCUMULATED
    ],
)
def test_cells_with_accumulated_gradients(cell: Cell, tmp_path: Path) -> None:
    """Two batches per step, of which the last of an epoch has one pair: the mean of two means."""
    alpha = MOTIONS[cell.motion]
    ours = run_of(cell.kind, tmp_path, cell.data, accumulated=2, **cell.options)
    assert_follows(ours, expected(cell.kind, alpha, accumulated=2), num_syncs=MAX_STEPS // SYNC_STEPS if alpha else 0)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", sorted(POLICIES.keys() - KINDS.keys()))
@pytest.mark.parametrize("motion", ["hard", "soft"])
def test_every_other_adapter_moves(kind: str, motion: str, tmp_path: Path) -> None:
    """In effective weights where they can be merged, else (tuned prompts and prefixes) in what trains."""
    cell = Cell(kind=kind, way="auto", motion=motion, data="map", window="online")
    ours = run_of(kind, tmp_path, **cell.options)
    assert_follows(ours, expected(kind, MOTIONS[motion]), num_syncs=2)


def test_the_oracle_tells_a_mix_of_products_from_one_of_factors() -> None:
    """What passes the table is no mix of the factors A and B apart: that one is off by more than ten times the
    tolerance."""
    policy = POLICIES["lora_sft"]()
    losses = expected("lora_sft", MOTIONS["soft"]).losses
    apart, _ = naive_run(policy, batches(1), alpha=MOTIONS["soft"], every=SYNC_STEPS, merging=copy.deepcopy)
    assert apart[:SYNC_STEPS] == pytest.approx(losses[:SYNC_STEPS], abs=1e-6)
    assert max(abs(a - b) for a, b in zip(apart, losses, strict=True)) > 1e-4


def test_the_table_is_whole() -> None:
    """7 kinds x 3 motions x 2 kinds of data x 2 times to ask = 84 cells for each way, each once; 24 are refused."""
    assert WAYS.keys() >= {"model", "adapter", "snapshot", "snapshot_cpu", "snapshot_disk", "precomputed"}
    assert len(set(CELLS)) == len(CELLS) == 7 * 3 * 2 * 2 * len(WAYS) == 84 * len(WAYS)
    assert sum(cell.refusal is not None for cell in CELLS) == 2 * 3 * 2 * 2 == 24


def test_the_page_of_references_shows_the_table() -> None:
    """Else write it anew: `python tests/table.py`."""
    assert written() == block()
