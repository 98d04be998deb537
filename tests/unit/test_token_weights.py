"""How often each token counts where some pairs of a batch are fillers, against rows of the real pairs alone."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.data.loader.token_weights import token_weights
from policies import rows

LAYOUTS = {
    "padded": PaddedLayout(0),
    "packed": PackedLayout(0, row_tokens=30),
    "prefix_shared": SharedLayout(0),
    "prefix_shared_short": SharedLayout(0, row_tokens=20),
}


def table() -> list[dict[str, Any]]:
    """6 pairs: rows 0 and 1 share prompt and chosen completion, row 4 is row 2 again, row 5 is row 3 turned round. A
    completion of one token is predicted by its prompt alone, and of another one the first tokens are not scored."""
    found = rows(6).to_list()
    found[4] = dict(found[2])
    found[5] = found[3] | {"chosen_ids": found[3]["rejected_ids"], "rejected_ids": found[3]["chosen_ids"]}
    found[0]["rejected_ids"] = found[0]["rejected_ids"][:1]
    for row in found:
        row |= {"chosen_mask": None, "rejected_mask": None}
    length = len(found[1]["rejected_ids"])
    found[1]["rejected_mask"] = [0] * (length - 1) + [1]
    return found


def occurrences(batch: PairBatch, weights: Tensor) -> Counter[tuple[int, int]]:
    """How often each token stands at each position of the sequences that are counted."""
    ids = batch.inputs["input_ids"]
    positions = batch.inputs.get("position_ids", torch.arange(ids.shape[1]).expand(ids.shape))
    entries = zip(positions.flatten().tolist(), ids.flatten().tolist(), weights.flatten().tolist(), strict=True)
    found: Counter[tuple[int, int]] = Counter()
    for position, token, weight in entries:
        found[position, token] += weight
    return +found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5], [0], [1], [1, 2], [3, 4], [0, 2, 5], []])
def test_weights_are_those_of_the_real_pairs(layout: str, kept: list[int]) -> None:
    batch = PairBatch.from_tensors(LAYOUTS[layout](table()))
    keep = torch.zeros(6, dtype=torch.bool)
    keep[kept] = True
    found = occurrences(batch, token_weights(batch, batch.of_pairs(keep)))
    if not kept:
        assert not found
        return
    alone = PairBatch.from_tensors(PaddedLayout(0)([table()[index] for index in kept]))
    assert found == occurrences(alone, alone.inputs["attention_mask"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_all_pairs_are_the_layouts_own(layout: str) -> None:
    """Also where they are worked out anew, from a batch of which one more pair is left out: none."""
    batch = PairBatch.from_tensors(LAYOUTS[layout](table()))
    mask = batch.inputs["attention_mask"]
    assert torch.equal(token_weights(batch, batch), mask)
    longer = batch.of_pairs(torch.tensor([0, 1, 2, 3, 4, 5, 5]))
    assert torch.equal(token_weights(longer, batch), mask)
