"""One run in every layout: the same losses, weights and metrics, whatever stands where in the rows; and who gets which.

The expectation is always the padded run, which the oracle and the common trainer hold to account elsewhere.
"""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

import holdfast.scoring.segments as row_segments
from families import CONFIGS, tiny_model
from holdfast import DataCollatorForPreference, DPOTrainer
from holdfast.data.layouts.completion_rows import row_per_completion
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.scoring.segments import SEGMENTS
from policies import POLICIES, config, logged, rows, trainer

WRONG = ("lfm2", "falcon_h1")
METRICS = (
    "loss", "grad_norm", "rewards/chosen", "rewards/accuracies", "logps/rejected", "entropy", "logits/chosen",
    "mean_token_accuracy", "num_tokens",
)  # fmt: skip
REFERENCES: dict[str, dict[str, Any]] = {
    "model": {},
    "snapshot": {"reference": "snapshot"},
    "precomputed": {"precompute_ref_log_probs": True},
    "ahead": {"reference_window": 2, "reference": "snapshot", "snapshot_device": "cpu"},
    "soft": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "hard": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0},
    "none": {"loss_type": "simpo"},
}


def tree() -> Dataset:
    """Pairs of few prompts, whose completions are in several of them."""
    table = rows(12).to_list()
    for index, row in enumerate(table):
        row["prompt_ids"] = table[index % 4]["prompt_ids"]
        row["rejected_ids"] = table[(index + 4) % 12]["chosen_ids"]
    return Dataset.from_list(table)


def trained(family: str, folder: Path, layout: str, **options: Any) -> DPOTrainer:
    ours = trainer(tiny_model(family), config(folder, layout=layout, **options), train_dataset=tree())
    ours.train()
    return ours


def assert_same_run(found: DPOTrainer, expected: DPOTrainer) -> None:
    for name in METRICS:
        assert logged(found, name) == pytest.approx(logged(expected, name), rel=1e-4, abs=2e-5), name
    for (name, ours), theirs in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.nightly if index % 3 else [])
        for index, family in enumerate(sorted(CONFIGS.keys() - set(WRONG)))
    ],
)
def test_every_family_trains_alike(family: str, layout: str, tmp_path: Path) -> None:
    found = trained(family, tmp_path, layout, max_steps=2, learning_rate=0.1)
    assert found.data_collator.name == layout
    assert_same_run(found, trained(family, tmp_path, "padded", max_steps=2, learning_rate=0.1))


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", ["full", "lora_sft", "dora"])
@pytest.mark.parametrize("way", REFERENCES)
def test_every_reference_trains_alike(way: str, policy: str, tmp_path: Path) -> None:
    """`num_tokens` among them: a prompt that is read once counts as often as there are sequences that begin with it."""
    runs = []
    for layout in ("auto", "packed", "padded"):
        args = config(tmp_path / layout, layout=layout, **REFERENCES[way])
        runs.append(trainer(POLICIES[policy](), args, train_dataset=tree()))
        runs[-1].train()
    assert [run.data_collator.name for run in runs] == ["prefix_shared", "packed", "padded"]
    assert_same_run(runs[0], runs[2])
    assert_same_run(runs[1], runs[2])


@pytest.mark.parametrize("row_tokens", [1, 30, 10_000])
def test_packing_changes_nothing(row_tokens: int, tmp_path: Path) -> None:
    """One segment a row, some, or all in one row."""
    layout = SharedLayout(0, max_length=1024, row_tokens=row_tokens)
    found = trainer(tiny_model(), config(tmp_path), train_dataset=tree(), data_collator=layout)
    found.train()
    assert_same_run(found, trained("llama", tmp_path, "padded"))


def test_load_balancing_loss_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    """A mean over tokens, in which a prompt of several completions counts several times."""
    options = {"router_aux_loss_coef": 0.5, "learning_rate": 0.1}
    found, expected = (trained("mixtral", tmp_path, layout, **options) for layout in ("prefix_shared", "padded"))
    assert logged(found, "aux_loss") == pytest.approx(logged(expected, "aux_loss"), abs=1e-5)
    assert_same_run(found, expected)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"activation_offloading": True}])
def test_memory_savers_compose(options: dict[str, Any], tmp_path: Path) -> None:
    assert_same_run(trained("llama", tmp_path, "auto", **options), trained("llama", tmp_path, "padded"))


def test_bf16_autocast(tmp_path: Path) -> None:
    """Policy and reference take the same way, so the first margins are 0 to the bit."""
    ours = trained("llama", tmp_path, "auto", bf16=True, max_steps=1)
    assert ours.data_collator.name == "prefix_shared"
    assert logged(ours, "rewards/margins") == [0.0]


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_metrics_of_a_user_see_a_row_a_completion(tmp_path: Path) -> None:
    """Logits and ids of the padded layout, whichever the run has."""
    seen: dict[str, list[Any]] = {}
    found = {}
    for layout in ("prefix_shared", "packed", "padded"):

        def spy(prediction: Any, layout: str = layout) -> dict[str, float]:
            seen.setdefault(layout, []).extend([prediction.predictions, prediction.label_ids])
            return {"mean": float(np.mean(prediction.predictions))}

        args = config(tmp_path, layout=layout, per_device_eval_batch_size=5)
        ours = trainer(tiny_model(), args, train_dataset=tree(), compute_metrics=spy)
        found[layout] = ours.evaluate(tree())
    for layout in ("prefix_shared", "packed"):
        np.testing.assert_allclose(seen[layout][0], seen["padded"][0], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(seen[layout][1], seen["padded"][1])
        for name in ("eval_loss", "eval_entropy", "eval_mean", "eval_logps/chosen"):
            assert found[layout][name] == pytest.approx(found["padded"][name], abs=1e-5), name
    assert seen["padded"][0].shape[0] == 2 * 12


@pytest.mark.parametrize("layout", [SharedLayout, PackedLayout])
def test_a_row_per_completion_is_the_padded_layout(layout: type[SharedLayout | PackedLayout]) -> None:
    """Also of a pair without a prompt, and of completions of one token."""
    features = [*tree().to_list(), {"prompt_ids": [], "chosen_ids": [5, 6], "rejected_ids": [5, 7, 8]}]
    features += [{"prompt_ids": [9, 10], "chosen_ids": [11], "rejected_ids": [12]}]
    batch = layout(0, row_tokens=40)(features)
    found, expected = row_per_completion(batch, 0), PaddedLayout(0)(features)
    for name in ("input_ids", "attention_mask", "source", "target", "sequence", "chosen", "rejected"):
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(row_per_completion(expected, 0)["input_ids"], expected["input_ids"])


# --- who gets which ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WRONG)
def test_models_that_carry_state_get_padded_rows(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours = trainer(tiny_model(family), config(tmp_path))
    assert isinstance(ours.data_collator, PaddedLayout)
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("layout: padded, because")]
    for layout in ("prefix_shared", "packed"):
        with pytest.raises(ValueError, match=rf"layout='{layout}' was asked for, but .*not attention.*layout='auto'"):
            trainer(tiny_model(family), config(tmp_path, layout=layout))
    with pytest.raises(ValueError, match="padding_free=True was asked for, but"):
        trainer(tiny_model(family), config(tmp_path, padding_free=True))


def test_a_right_layout_is_taken_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours = trainer(tiny_model(), config(tmp_path, padding_free=True))
    assert ours.data_collator.name == "prefix_shared"
    assert not [r for r in caplog.records if "layout" in r.getMessage()]
    assert SEGMENTS in ours.data_collator(rows().to_list()[:2])


def test_the_reference_is_tried_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reference that carries state puts its policy into padded rows, too: both are always scored alike."""
    with caplog.at_level(logging.WARNING):
        ours = trainer(tiny_model(), config(tmp_path), ref_model=tiny_model("lfm2"))
    assert isinstance(ours.data_collator, PaddedLayout)
    assert any("layout: padded, because Lfm2ForCausalLM" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_get_padded_rows(kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = get_peft_model(tiny_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with caplog.at_level(logging.WARNING):
        ours = trainer(policy, config(tmp_path))
    assert isinstance(ours.data_collator, PaddedLayout)
    assert any("virtual tokens before each row" in record.getMessage() for record in caplog.records)


def test_a_broken_mask_is_found_before_anything_is_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions of a prompt that see each other: rows without shared prompts are still right."""
    monkeypatch.setattr(row_segments, "_group_mask", lambda visible, prompt, group, device, is_joined: (
        torch.ones(prompt + sum(group), prompt + sum(group), dtype=torch.bool).tril()[0 if is_joined else prompt :]
    ))  # fmt: skip
    with caplog.at_level(logging.WARNING):
        ours = trainer(tiny_model(), config(tmp_path))
    assert ours.data_collator.name == "packed"
    assert any(re.match("layout: packed, because .* nats per token", r.getMessage()) for r in caplog.records)
    with pytest.raises(ValueError, match=r"layout='prefix_shared' was asked for, but .* nats per token"):
        trainer(tiny_model(), config(tmp_path, layout="prefix_shared"))


def test_a_collator_of_the_user_lays_the_rows_out(tmp_path: Path) -> None:
    collator = DataCollatorForPreference(pad_token_id=0)
    assert trainer(tiny_model(), config(tmp_path), data_collator=collator).data_collator is collator
    for options in ({"layout": "packed"}, {"padding_free": True}):
        with pytest.raises(ValueError, match=r"was asked for together with a `data_collator`.*Drop one"):
            trainer(tiny_model(), config(tmp_path, **options), data_collator=collator)
    wrong = trainer(tiny_model("lfm2"), config(tmp_path), data_collator=SharedLayout(0, max_length=20))
    assert wrong.data_collator == PaddedLayout(0, max_length=20)


# --- in parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
@pytest.mark.parametrize("policy", ["full", "lora_sft"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_batch_in_parts_gives_the_same_run(tokens: int, policy: str, layout: str, tmp_path: Path) -> None:
    """A row at a time, or two; also under a loss that compares all pairs of a batch."""
    runs = []
    for limit in (tokens, None):
        args = config(tmp_path, layout=layout, tokens_per_batch=limit, loss_type=["sigmoid", "aot"])
        runs.append(trainer(POLICIES[policy](), args, train_dataset=tree()))
        runs[-1].train()
    assert_same_run(*runs)


def test_a_batch_in_parts_keeps_one_part_s_activations(tmp_path: Path) -> None:
    """Bytes kept for the backward pass, at the end of the forward pass: of one row a part next to none."""
    num_bytes = {}
    for limit in (None, 1):
        ours = trainer(tiny_model(), config(tmp_path, layout="padded", tokens_per_batch=limit), train_dataset=tree())
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours.compute_loss(ours.model.train(), ours.data_collator(tree().to_list()))
        num_bytes[limit] = sum(sizes)
    assert num_bytes[1] < 0.02 * num_bytes[None]


def test_parts_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokens_per_batch=50 was asked for, but the load-balancing loss of Mixtral"):
        trainer(tiny_model("mixtral", router_aux_loss_coef=0.1), config(tmp_path, tokens_per_batch=50))
    with pytest.raises(ValueError, match="tokens_per_batch=0 was asked for; it counts from 1"):
        config(tmp_path, tokens_per_batch=0)


# --- batches of like length -------------------------------------------------------------------------------------------


def test_grouped_by_length_is_deterministic_and_resumes(tmp_path: Path) -> None:
    """The same run twice, and once in two halves, over three epochs; not the run of another order."""
    args = {"train_sampling_strategy": "group_by_length", "max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    runs = []
    for name in ("one", "two"):
        runs.append(trainer(tiny_model(), config(tmp_path / name, **args)))
        runs[-1].train()
    assert logged(runs[0]) == logged(runs[1])
    resumed = trainer(tiny_model(), config(tmp_path / "one", **args))
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-5"))
    assert logged(resumed) == logged(runs[0])
    plain = trainer(tiny_model(), config(tmp_path / "plain", max_steps=10))
    plain.train()
    assert logged(plain) != logged(runs[0])
