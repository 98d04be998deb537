"""The batches that a reference scores ahead: how large they are, and that nothing is left out."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from holdfast.batch import PairBatch
from holdfast.data.completions import CPU_TOKENS, Completions, pending
from holdfast.data.layouts import PaddedLayout
from holdfast.data.shared import SharedLayout

LAYOUTS = {"padded": PaddedLayout(0), "prefix_shared": SharedLayout(0)}


def dataset_of(num_rows: int, longest: int) -> Dataset:
    draw = torch.Generator().manual_seed(0)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (), generator=draw))
        return torch.randint(3, 100, (length,), generator=draw).tolist()

    sides = {"prompt_ids": longest // 2, "chosen_ids": longest // 4, "rejected_ids": longest // 4}
    return Dataset.from_list([{side: ids(most) for side, most in sides.items()} for _ in range(num_rows)])


def batches_of(completions: Any) -> list[PairBatch]:
    return list(completions.batches(lambda ids: [ids], lambda ids: ids))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("most_tokens", [1, 50, 200, 10_000, None])
def test_no_batch_is_larger_than_it_may_be(layout: PaddedLayout | SharedLayout, most_tokens: int | None) -> None:
    completions = Completions(dataset_of(60, 80), layout, PairBatch.from_tensors, 4, most_tokens)
    batches = batches_of(completions)
    content = [tuple(ids) for batch in batches for ids in batch.content.tolist()]
    assert len(content) == len(set(content)) == completions.num_completions()
    assert set(content) == set(completions.ids())
    most = min(2 * 4 * 80, most_tokens or 10_000)
    for batch in batches:
        assert batch.inputs["input_ids"].numel() <= most or batch.num_sequences == 1
    assert (len(batches) == len(content)) == (most_tokens == 1)


@pytest.mark.parametrize(("device", "most"), [("cpu", CPU_TOKENS), ("cuda", 10_000)])
def test_caches_bound_them_on_a_cpu_alone(device: str, most: int) -> None:
    """Where pairs of 1,000 tokens would make the training's batches 8,000."""
    accelerator = cast(Accelerator, SimpleNamespace(device=torch.device(device)))
    found = pending(dataset_of(60, 1_000), 4, SharedLayout(0), PairBatch.from_tensors, cast(Any, None), accelerator)
    sizes = [int((batch.inputs["attention_mask"] > 0).sum()) for batch in batches_of(found)]
    assert max(sizes) <= most
    assert (max(sizes) > CPU_TOKENS) == (device == "cuda")
