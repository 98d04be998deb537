"""CHES against the paper's definition, on hidden states that hooks take from each completion alone, in fp64.

    CHES(x, y+, y-) = <sum_k h(x, y+_<k), sum_k h(x, y-_<k)> - ||sum_k h(x, y+_<k)||^2

(Razin et al. 2024, Definition 2, arXiv:2410.08847), where h is what the output embeddings get; its length-normalised
form divides the first sum by |y+| and the second by |y-|.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from families import CONFIGS, tiny_model
from holdfast import DataCollatorForPreference
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data import completions
from holdfast.data.completions import CPU_TOKENS, Completions
from holdfast.data.layouts.base import Layout
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.inspect.run_numbers import ches_of, pair_numbers_of
from holdfast.reference.sources import pairing, stored
from holdfast.reference.sources.stored import PrecomputedReference
from holdfast.scoring.causal_lm import output_embeddings, unwrap
from holdfast.scoring.frozen import frozen_logps
from holdfast.scoring.score import score
from holdfast.store.pair_table import PairTable
from holdfast.store.shard import shard_paths
from masked_rows import SIDES, masked_data
from policies import POLICIES, config, rows, trainer

LAYOUTS: dict[str, Layout] = {"padded": PaddedLayout(0), "packed": PackedLayout(0), "shared": SharedLayout(0)}
AHEAD = {"precompute_ref_log_probs": True, "reference_window": 1}
PADDED_ONLY = {"falcon_h1", "lfm2"}


def state_sum(model: nn.Module, prompt: Sequence[int], completion: Sequence[int], mask: Sequence[int] | None) -> Tensor:
    """The sum of the hidden states that predict the scored tokens of a completion, which the model reads alone."""
    states: list[Tensor] = []
    head = output_embeddings(unwrap(model))
    hook = head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].detach()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False)
    hook.remove()
    first = states[0].shape[1] - len(completion) - 1  # virtual tokens stand before the row
    predicting = states[0][0, first:-1].double()
    return predicting if mask is None else predicting[torch.tensor(mask).bool()]


def expected(model: nn.Module, table: Dataset) -> tuple[list[float], list[float]]:
    """CHES of each row by the definition, and its length-normalised form."""
    found: tuple[list[float], list[float]] = ([], [])
    for row in table.to_list():
        chosen, rejected = (
            state_sum(model, row["prompt_ids"], row[side], row.get(mask) or None) for side, mask in SIDES.items()
        )
        for values, (s, r) in zip(
            found, ((chosen.sum(0), rejected.sum(0)), (chosen.mean(0), rejected.mean(0))), strict=True
        ):
            values.append(float(s @ r - s @ s))
    return found


def collected(model: nn.Module, data: Completions) -> tuple[np.ndarray, np.ndarray]:
    """CHES of each pair, from batches that are scored one after the other."""

    class Table:
        def __init__(self) -> None:
            self.found: dict[Any, tuple[float, float, float]] = {}

        def add(self, products: Mapping[Any, tuple[float, float, float]]) -> None:
            self.found |= products

    table: Any = Table()
    collect = pairing.Pairing(table, data.pairs())
    with torch.no_grad():
        for batch in data.batches(lambda ids: [ids], lambda ids: ids):
            sums = score(model, replace(batch, sums_states=True)).logps.state_sums
            assert sums is not None
            collect.add(pairing.Summed.of(batch, sums))
    by_pair = {pair: values for (pair, _), values in table.found.items()}
    products = [by_pair[a, b] if (a, b) in by_pair else np.array(by_pair[b, a])[[0, 2, 1]] for a, b in data.pairs()]
    return ches_of(np.array(products), data.content())


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(family: str) -> None:
    """In the layout that the family allows, pairs in batches of their own or apart."""
    model, table = tiny_model(family), rows(6)
    layout = LAYOUTS["padded" if family in PADDED_ONLY else "shared"]
    found = collected(model, Completions(table, layout, PairBatch.from_tensors, 2, 60))
    for ours, theirs in zip(found, expected(model, table), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("most_tokens", [1, 40, CPU_TOKENS])
def test_every_layout_with_masks(layout: Layout, most_tokens: int) -> None:
    """Only scored tokens count, and a pair's completions may come in different batches (one in each, at 1 token)."""
    model, table = tiny_model(), masked_data()
    found = collected(model, Completions(table, layout, PairBatch.from_tensors, 2, most_tokens))
    for ours, theirs in zip(found, expected(model, table), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["lora_sft", "lora_head", "lora_modules_to_save", "prompt_tuning", "dora"])
def test_every_kind_of_head_and_adapter(kind: str, tmp_path: Path) -> None:
    """Through a run's own reference and store."""
    policy, table = POLICIES[kind](), rows(6)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    ours = trainer(policy, config(tmp_path, reference_store=str(tmp_path / "s"), **AHEAD), train_dataset=table)
    numbers = pair_numbers_of(ours)["train"]
    ches, normalised = expected(policy.eval(), table)
    assert numbers.ches == pytest.approx(ches, rel=1e-3, abs=1e-3)
    assert numbers.normalised_ches == pytest.approx(normalised, rel=1e-3, abs=1e-4)


def test_half_precision_is_summed_in_fp32(tmp_path: Path) -> None:
    """bf16 states, of which 400 are summed: a sum in bf16 would be off by percents."""
    model = tiny_model(max_position_embeddings=512).to(torch.bfloat16)
    ids = torch.randint(3, 97, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    table = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": ids, "rejected_ids": ids[::-1]}])
    batch = replace(PairBatch.from_tensors(PaddedLayout(0)(table.to_list())), sums_states=True)
    sums = frozen_logps(model, batch, torch.no_grad).state_sums
    assert sums is not None
    assert sums.dtype == torch.float32
    states = state_sum(model, [5, 6], ids, None).sum(0)
    assert float((sums[0] - states).norm() / states.norm()) < 2e-3


def test_scoring_has_no_sums_unless_it_is_asked() -> None:
    batch = PairBatch.from_tensors(PaddedLayout(0)(rows(3).to_list()))
    model = tiny_model()
    plain, asked = score(model, batch).logps, score(model, replace(batch, sums_states=True)).logps
    assert plain.state_sums is None
    assert torch.equal(plain.per_token, asked.per_token)
    assert asked.state_sums is not None
    assert not asked.state_sums.requires_grad


# --- what a filling pass leaves --------------------------------------------------------------------------------------


def ours_in(folder: Path, layout: str = "padded", table: Dataset | None = None, **options: Any) -> Any:
    options = {"reference_store": str(folder / "store"), "layout": layout} | options
    return trainer(tiny_model(), config(folder, **options), train_dataset=rows(12) if table is None else table)


def known(ours: Any) -> int:
    """The number of the run's pairs whose products are in the store."""
    data = ours.completions_to_score({"train": ours.train_dataset})["train"]
    content = data.content()
    table = PairTable.open(ours.reference.stored.store)
    return int(np.isfinite(table.find(content.content, content.lengths)[:, 0]).sum())


@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
def test_a_run_that_scores_ahead_leaves_all_products(layout: str, tmp_path: Path, monkeypatch: Any) -> None:
    """So nothing is scored for them afterwards."""
    ours = ours_in(tmp_path, layout, precompute_ref_log_probs=True)
    assert known(ours) == 12
    inspected = ours_in(tmp_path, layout, **AHEAD)
    monkeypatch.setattr(PrecomputedReference, "fill", None)
    monkeypatch.setattr(stored, "filled_pairs", None)
    assert pair_numbers_of(inspected)["train"].ches == pytest.approx(expected(tiny_model(), rows(12))[0], rel=1e-4)


def too_little_memory(folder: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sum waits for the next batch, and each completion has a batch of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(pairing.Pairing.__init__, "__defaults__", (1,))
        patch.setattr(completions, "CPU_TOKENS", 1)
        ours_in(folder, layout, precompute_ref_log_probs=True)


def an_older_version(folder: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has stored no products."""
    ours = ours_in(folder, layout, precompute_ref_log_probs=True)
    for path in ours.reference.stored.store.folder.glob("*.pairs"):
        path.unlink()


def another_run(folder: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had the same chosen completions and other rejected ones."""
    others = rows(12, seed=1)["rejected_ids"]
    table = [row | {"rejected_ids": other} for row, other in zip(rows(12).to_list(), others, strict=True)]
    ours_in(folder, layout, table=Dataset.from_list(table), precompute_ref_log_probs=True)
    ours_in(folder, layout, precompute_ref_log_probs=True)


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
@pytest.mark.parametrize("leave", [too_little_memory, an_older_version, another_run])
def test_pairs_that_were_left_open_are_scored_again(
    layout: str, leave: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored log-probs stay bit for bit."""
    leave(tmp_path, layout, monkeypatch)
    (folder,) = (tmp_path / "store").iterdir()
    before = {path.name: path.read_bytes() for path in shard_paths(folder)}
    inspected = ours_in(tmp_path, layout, **AHEAD)
    inspected.reference.stored.open(inspected.reference.scorer.identity(), None)
    assert known(inspected) < 12
    numbers = pair_numbers_of(inspected)["train"]
    assert numbers.ches == pytest.approx(expected(tiny_model(), rows(12))[0], rel=1e-4)
    assert known(inspected) == 12
    assert {path.name: path.read_bytes() for path in shard_paths(folder)} == before


def test_a_data_collator_of_the_user_says_its_own_pairs(tmp_path: Path) -> None:
    options = config(tmp_path, reference_store=str(tmp_path / "store"), precompute_ref_log_probs=True)
    collator = DataCollatorForPreference(pad_token_id=0)
    ours = trainer(tiny_model(), options, train_dataset=rows(12), data_collator=collator)
    padded = ours_in(tmp_path, **AHEAD)
    padded.reference.stored.open(padded.reference.scorer.identity(), None)
    assert padded.reference.stored.store.folder == ours.reference.stored.store.folder
    assert known(padded) == 12


def test_a_mixture_has_no_hidden_states(tmp_path: Path) -> None:
    """Its log-probs are known, and CHES is not."""
    options = config(tmp_path, reference_store=str(tmp_path / "store"), **AHEAD)
    mixed = [tiny_model(seed=1), tiny_model(seed=2)]
    ours = trainer(tiny_model(), options, train_dataset=rows(4), ref_model=mixed)
    numbers = pair_numbers_of(ours)["train"]
    assert np.isfinite(numbers.chosen_logps).all()
    assert np.isnan(numbers.ches).all()
    assert np.isnan(numbers.normalised_ches).all()


def test_a_full_disk_ends_a_filling_pass_in_words(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("holdfast.store.pair_table.write_pair_shard", full)
    with pytest.raises(ValueError, match=r"products of 12 pairs were to be written.*no room for them"):
        ours_in(tmp_path, precompute_ref_log_probs=True)


def test_an_interrupted_pass_keeps_what_it_has_paired(tmp_path: Path, monkeypatch: Any) -> None:
    scored: list[int] = []

    def failing(module: Any, batch: PairBatch, autocast: Any) -> SequenceLogps:
        scored.append(batch.num_sequences)
        if len(scored) > 4:
            raise RuntimeError("out of memory")
        return frozen_logps(module, batch, autocast)

    inspected = ours_in(tmp_path, "prefix_shared", per_device_train_batch_size=1, **AHEAD)
    monkeypatch.setattr("holdfast.reference.base.frozen_logps", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        pair_numbers_of(inspected)
    monkeypatch.undo()
    again = ours_in(tmp_path, "prefix_shared", **AHEAD)
    again.reference.stored.open(again.reference.scorer.identity(), None)
    assert known(again) > 0
    assert np.isfinite(pair_numbers_of(again)["train"].ches).all()
