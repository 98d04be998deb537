"""The batches that a reference scores ahead: how large they are, and that nothing is left out."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from holdfast.batch import PairBatch
from holdfast.data.completions import CPU_TOKENS, Batching, Completions, to_score
from holdfast.data.layouts.base import Layout
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout

LAYOUTS = {"padded": PaddedLayout(0), "packed": PackedLayout(0), "prefix_shared": SharedLayout(0)}


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
def test_no_batch_is_larger_than_it_may_be(layout: Layout, most_tokens: int | None) -> None:
    completions = Completions(dataset_of(60, 80), layout, PairBatch.from_tensors, 4, most_tokens)
    batches = batches_of(completions)
    content = [tuple(ids) for batch in batches for ids in batch.content.tolist()]
    assert len(content) == len(set(content)) == completions.num_completions()
    assert set(content) == set(completions.ids())
    most = min(2 * 4 * 80, most_tokens or 10_000)
    for batch in batches:
        assert batch.inputs["input_ids"].numel() <= most or batch.num_sequences == 1
    assert (len(batches) == len(content)) == (most_tokens == 1)


@pytest.mark.parametrize("most_tokens", [40, 60, 200])
def test_a_prompt_is_computed_once_unless_its_completions_are_too_many(most_tokens: int) -> None:
    """Three pairs to a prompt of 10 tokens, all completions of 5: 40 tokens a prompt."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 100, (9, 10), generator=draw).tolist()
    completions = iter(torch.randint(3, 100, (54, 5), generator=draw).tolist())
    rows = [
        {"prompt_ids": prompt, "chosen_ids": next(completions), "rejected_ids": next(completions)}
        for prompt in prompts
        for _ in range(3)
    ]
    data = Completions(Dataset.from_list(rows), SharedLayout(0), PairBatch.from_tensors, 100, most_tokens)
    batches = batches_of(data)
    sizes = [int((batch.inputs["attention_mask"] > 0).sum()) for batch in batches]
    assert sum(sizes) == 9 * 40
    assert max(sizes) <= most_tokens
    assert len(sizes) == {40: 9, 60: 9, 200: 2}[most_tokens]


def test_a_prompt_with_too_many_completions_is_computed_again_for_the_rest() -> None:
    """Six completions of 5 tokens and their prompt of 10, where 32 tokens hold four."""
    completions = iter(torch.arange(3, 33).view(6, 5).tolist())
    rows = [
        {"prompt_ids": [1] * 10, "chosen_ids": next(completions), "rejected_ids": next(completions)} for _ in range(3)
    ]
    data = Completions(Dataset.from_list(rows), SharedLayout(0), PairBatch.from_tensors, 100, 32)
    assert [batch.num_sequences for batch in batches_of(data)] == [4, 2]


@pytest.mark.parametrize(("device", "most"), [("cpu", CPU_TOKENS), ("cuda", 10_000)])
def test_there_is_a_bound_on_a_cpu_alone(device: str, most: int) -> None:
    """Where pairs of 1,000 tokens would make the training's batches 8,000."""
    accelerator = cast(Accelerator, SimpleNamespace(device=torch.device(device)))
    batching = Batching(
        collator=SharedLayout(0),
        pair_batch=PairBatch.from_tensors,
        collate=cast(Any, None),
        accelerator=accelerator,
    )
    found = to_score(dataset_of(60, 1_000), 4, batching)
    sizes = [int((batch.inputs["attention_mask"] > 0).sum()) for batch in batches_of(found)]
    assert max(sizes) <= most
    assert (max(sizes) > CPU_TOKENS) == (device == "cuda")
