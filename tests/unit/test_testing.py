"""The reference for tests: numbers of its table wherever a layout puts a completion, and losses worked out by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.data.tokenize import content_id
from holdfast.reference.reference import Reference, Roles
from holdfast.testing import TableReference
from naive import BETA, logp
from policies import config, rows, trainer

TABLE = rows(4).to_list()
SIDES = ("chosen_ids", "rejected_ids")
LAYOUTS = {"padded": PaddedLayout(0), "packed": PackedLayout(0), "prefix_shared": SharedLayout(0)}


def entries() -> dict[tuple[int, int], list[float]]:
    """Token t of a completion whose last id is i has log-prob -(i + t / 8)."""
    return {
        content_id(row["prompt_ids"], row[side]): [-(row[side][-1] + t / 8) for t in range(len(row[side]))]
        for row in TABLE
        for side in SIDES
    }


def expected_sum(row: dict[str, Any], side: str) -> float:
    """-(n i + (0 + 1 + ... + n - 1) / 8) for n tokens."""
    length = len(row[side])
    return -(length * row[side][-1] + length * (length - 1) / 16)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_finds_the_same(layout: Any) -> None:
    batch = PairBatch.from_tensors(layout(TABLE))
    sums = Reference(Roles(scorer=TableReference(entries()))).logps(batch).sums()
    for place, side in ((batch.chosen, "chosen_ids"), (batch.rejected, "rejected_ids")):
        assert sums[place].tolist() == pytest.approx([expected_sum(row, side) for row in TABLE])


def test_a_loss_by_hand(tmp_path: Path) -> None:
    """The mean of -log sigmoid(beta * (policy's margin - table's margin)), the policy scored row by row."""
    policy = tiny_model()
    losses = []
    for row in TABLE:
        with torch.no_grad():
            policy_margin = float(logp(policy, row, "chosen_ids") - logp(policy, row, "rejected_ids"))
        margin = policy_margin - (expected_sum(row, "chosen_ids") - expected_sum(row, "rejected_ids"))
        losses.append(math.log1p(math.exp(-abs(BETA * margin))) + max(0.0, -BETA * margin))
    ours = trainer(policy, config(tmp_path, beta=BETA), eval_dataset=rows(4))
    ours.reference = Reference(Roles(scorer=TableReference(entries())))
    assert ours.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_what_is_missing_is_named() -> None:
    key = content_id(TABLE[2]["prompt_ids"], TABLE[2]["rejected_ids"])
    known = {other: values for other, values in entries().items() if other != key}
    batch = PairBatch.from_tensors(PaddedLayout(0)(TABLE))
    num = len(TABLE[2]["rejected_ids"])
    with pytest.raises(ValueError, match=rf"content id is \({key[0]}, {key[1]}\), and it has {num} completion tokens"):
        TableReference(known).logps(batch)


def test_another_number_of_tokens_is_refused() -> None:
    key = content_id(TABLE[3]["prompt_ids"], TABLE[3]["chosen_ids"])
    num = len(TABLE[3]["chosen_ids"])
    batch = PairBatch.from_tensors(PaddedLayout(0)(TABLE))
    with pytest.raises(ValueError, match=rf"of {num} tokens were asked for.*The table has {num + 1} for it"):
        TableReference(entries() | {key: [-1.0] * (num + 1)}).logps(batch)


def test_other_numbers_are_another_reference() -> None:
    first, again = TableReference(entries()).identity(), TableReference(entries()).identity()
    other = TableReference({key: [-1.0] for key in entries()}).identity()
    assert not first.differing_from(again)
    assert first.differing_from(other)
    assert f"{len(entries())} completions, asked per batch" in TableReference(entries()).describe("asked per batch")
