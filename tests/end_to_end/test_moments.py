"""Moments of earlier batches (`alpha_dpo`, `beta_dpo`) over a whole run: resumed, evaluated meanwhile, begun afresh."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from families import tiny_model
from holdfast.checkpoint.manifest import read_manifest
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, rows, trainer

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "optim": "adamw_torch", "learning_rate": 0.01}
BOTH = {"loss_type": ["beta_dpo", "alpha_dpo", "hypo"], "loss_weights": [1.0, 0.5, 0.2], "beta_dpo_share": 0.6}
STEP_BY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": ACCUMULATED,
    "evaluated": STEP_BY_STEP,
    "precomputed": {"reference": "precomputed"},
    "moving": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2},
    "weighted": {"use_weighting": True, "weight_column": "w", "margin_column": "m"},
    "stream": {"max_steps": 5},
}


def held_out() -> dict[str, Dataset]:
    """Two sets, one of them by source."""
    return {"a": rows(5, seed=1).add_column("source", ["x", "y", "x", "x", "y"]), "b": rows(3, seed=2)}


def made(folder: Path, run: str, kind: str = "full", **changed: Any) -> Any:
    data: Any = rows(11).add_column("w", [1.0, 0.0, 2.5, 0.5] * 2 + [1.0] * 3).add_column("m", [0.5, -0.2] * 5 + [0.0])
    data = data.to_iterable_dataset() if run == "stream" else data
    args = config(folder, **SAVING | BOTH | RUNS[run] | changed)
    return trainer(POLICIES[kind](), args, train_dataset=data, eval_dataset=held_out())


def numbers(ours: Any) -> list[dict[str, float]]:
    """All that a run logs, without what measures time, memory or this part of it alone."""
    unlike = ("time", "per_second", "memory", "flos", "train_loss", "train_s")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in unlike)} for entry in ours.state.log_history
    ]


@pytest.mark.parametrize("step", [1, *(pytest.param(step, marks=pytest.mark.nightly) for step in (2, 3, 4))])
@pytest.mark.parametrize(
    "run", [run if run == "evaluated" else pytest.param(run, marks=pytest.mark.nightly) for run in RUNS]
)
def test_resumed_at_any_step_is_uninterrupted(run: str, step: int, tmp_path: Path) -> None:
    """Bit for bit: logs, evaluations, weights, and the moments of the last checkpoint."""
    whole = made(tmp_path / "whole", run)
    whole.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "parts" / f"checkpoint-{step}")
    resumed = made(tmp_path / "parts", run)
    resumed.train(resume_from_checkpoint=True)
    assert numbers(resumed) == numbers(whole)
    assert digest(resumed.model.named_parameters()) == digest(whole.model.named_parameters())
    last = [read_manifest(tmp_path / part / "checkpoint-5")["moments"] for part in ("whole", "parts")]
    assert last[0] == last[1]
    num_batches = 10 if run == "accumulated" else 5
    assert {name: moments["num_updates"] for name, moments in last[0].items()} == {
        "beta_dpo": num_batches,
        "alpha_dpo": num_batches,
    }


@pytest.mark.nightly
def test_evaluations_in_between_change_nothing(tmp_path: Path) -> None:
    """Neither the moments nor the draws: the losses, weights and moments of training are those without evaluations."""
    without, evaluated = made(tmp_path / "a", "plain"), made(tmp_path / "b", "evaluated")
    without.train()
    evaluated.train()
    assert logged(without) == logged(evaluated)
    assert digest(without.model.named_parameters()) == digest(evaluated.model.named_parameters())
    records = [read_manifest(tmp_path / part / "checkpoint-5")["moments"] for part in ("a", "b")]
    assert records[0] == records[1]


def test_a_second_training_begins_without_moments(tmp_path: Path) -> None:
    """What `train` of the same trainer does again, it does with the moments of its own batches."""
    ours = made(tmp_path, "plain", save_strategy="no")
    ours.train()
    first = ours._global_batch.moments_record()
    ours.train()
    assert {name: moments["num_updates"] for name, moments in ours._global_batch.moments_record().items()} == {
        name: moments["num_updates"] for name, moments in first.items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two steps, by their loss."""
    folder = tmp_path_factory.mktemp("saved")
    for loss in ("sigmoid", "beta_dpo"):
        args = config(folder / loss, **SAVING | {"max_steps": 2, "loss_type": loss})
        trainer(tiny_model(), args, eval_dataset=rows(3, seed=1)).train()
    return {loss: folder / loss for loss in ("sigmoid", "beta_dpo")}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("sigmoid", ["beta_dpo"], "for no loss, not for beta_dpo, with which loss_type=beta_dpo"),
        ("beta_dpo", ["alpha_dpo", "beta_dpo"], "for beta_dpo, not for alpha_dpo, with which loss_type=alpha_dpo,beta"),
        ("beta_dpo", ["beta_dpo"], None),
        pytest.param("beta_dpo", ["hypo"], None, marks=pytest.mark.nightly),
        pytest.param("sigmoid", ["dpop"], None, marks=pytest.mark.nightly),
    ],
)
def test_moments_that_begin_afresh_are_said(
    before: str, now: list[str], said: str | None, saved: dict[str, Path], tmp_path: Path, caplog: Any
) -> None:
    """Once, in one line, where the run trains and where it only evaluates."""
    shutil.copytree(saved[before], tmp_path / "run")
    args = config(tmp_path / "run", **SAVING | {"max_steps": 3, "loss_type": now})
    for act in ("restore", "train"):
        caplog.clear()
        ours = trainer(tiny_model(), args, eval_dataset=rows(3, seed=1))
        with caplog.at_level(logging.WARNING, logger="holdfast"):
            ours.restore() if act == "restore" else ours.train(resume_from_checkpoint=True)
        lines = [line for line in caplog.messages if "margins so far" in line]
        assert len(lines) == (said is not None), act
        if said is not None:
            assert said in lines[0]
            assert "checkpoint-2 holds" in lines[0]
            assert "begin afresh with the next batch" in lines[0]


@pytest.mark.nightly
def test_another_number_of_pairs_in_a_batch_keeps_the_moments(saved: dict[str, Path], tmp_path: Path) -> None:
    """They are those of one batch, whatever its size: the third batch is the third."""
    shutil.copytree(saved["beta_dpo"], tmp_path / "run")
    args = config(tmp_path / "run", **SAVING | {"max_steps": 3, "loss_type": "beta_dpo"}, per_device_train_batch_size=2)
    trainer(tiny_model(), args).train(resume_from_checkpoint=True)
    two, three = (read_manifest(tmp_path / "run" / f"checkpoint-{step}")["moments"]["beta_dpo"] for step in (2, 3))
    assert three["num_updates"] == two["num_updates"] + 1 == 3
    assert three["deviation"] >= 0.9 * two["deviation"] > 0


def test_a_batch_of_one_pair_has_no_others_to_compare_with(tmp_path: Path) -> None:
    """Its deviation would be 0 in every step. What `gradient_accumulation_steps` adds up is no batch; `beta_dpo` needs
    no deviation there."""
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    message = (
        r"alpha_dpo compares the pairs of a batch, of which it needs at least 2; per_device_train_batch_size=1 on 1"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), config(tmp_path, loss_type=["sigmoid", "alpha_dpo"], **options))
    trainer(tiny_model(), config(tmp_path, loss_type="beta_dpo", **options))
