"""`model_init`: each run trains a fresh model, and its reference is that model as it starts.

What a run must be is that of a trainer made anew with the same model and options.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers.trainer_utils import HPSearchBackend

from families import tiny_model
from holdfast import DPOTrainer
from policies import config, logged, rows, tiny_tokenizer, trainer

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1}


class Trial(dict[str, Any]):
    """What two kinds of backend have: a mapping, with a number and the options that were chosen."""

    def __init__(self, number: int, **params: Any) -> None:
        super().__init__(params)
        self.number, self.params = number, params


@pytest.fixture(autouse=True)
def trials_are_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a backend of transformers that is not installed here."""
    monkeypatch.setattr(transformers.integrations.integration_utils, "is_wandb_available", lambda: True)


def of_trial(trial: Any = None) -> nn.Module:
    """Another model for each trial."""
    return tiny_model(seed=getattr(trial, "number", 0))


def made(folder: Path, *, model_init: Any = of_trial, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
    defaults = {"train_dataset": rows(), "processing_class": tiny_tokenizer()}
    return DPOTrainer(model_init=model_init, args=config(folder, **options or {}), **defaults | arguments)


TABLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "moving": (MOVING, {}),
    "scored ahead": ({"precompute_ref_log_probs": True}, {}),
    "snapshot": ({"reference": "snapshot"}, {}),
    "fresh adapter": ({}, {"peft_config": LoraConfig(**LORA)}),
    "moving adapter": (MOVING, {"peft_config": LoraConfig(**LORA)}),
    "chosen reference": ({}, {"ref_model": tiny_model(seed=9)}),
    "moved by path": (MOVING, {"ref_model": "path"}),
    "dropout of its own": ({"disable_dropout": False}, {}),
}


NIGHTLY = {"snapshot", "moving", "fresh adapter", "moved by path", "dropout of its own"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name in NIGHTLY else name for name in TABLE]
)
def test_each_run_is_that_of_a_trainer_made_anew(name: str, tmp_path: Path) -> None:
    options, arguments = TABLE[name]
    if arguments.get("ref_model") == "path":
        tiny_model(seed=9).save_pretrained(tmp_path / "reference")
        arguments = {"ref_model": str(tmp_path / "reference")}
    ours = made(tmp_path, options=options, **arguments)
    for number in (None, 1):
        trial = None if number is None else Trial(number)
        ours.train(trial=trial)
        again = trainer(of_trial(trial), config(tmp_path, **options), **arguments)
        again.train()
        assert logged(ours) == pytest.approx(logged(again), abs=2e-6)
        assert ours.reference.version == again.reference.version
        assert sum(type(each).__name__ == "SyncCallback" for each in ours.callback_handler.callbacks) <= 1
        assert type(ours.callback_handler.callbacks[-1]).__name__ == "InterruptionCallback"


def test_a_trial_has_its_options_from_the_first_step(tmp_path: Path) -> None:
    """Of the loss, of the optimizer, of the rows, of the seed and of how the reference moves."""
    spaces: list[dict[str, Any]] = [
        {"beta": 0.7, "learning_rate": 0.1},
        {"max_length": 12, "seed": 5},
        {"per_device_train_batch_size": 4},
        {"ref_model_mixup_alpha": 0.9},
    ]
    ours = made(tmp_path, options=MOVING | {"max_length": 64})
    ours.hp_search_backend, ours.hp_name, ours.hp_space = HPSearchBackend.OPTUNA, None, dict
    so_far: dict[str, Any] = {"max_length": 64}
    for number, space in enumerate(spaces):
        so_far |= space
        ours.train(trial=Trial(number, **space))
        again = trainer(tiny_model(seed=number), config(tmp_path / str(number), **MOVING | so_far))
        again.train()
        assert logged(ours) == pytest.approx(logged(again), abs=2e-6)


def test_a_search(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.disable_default_handler()
    ours = made(tmp_path, options={"eval_strategy": "no"}, eval_dataset=rows(5, seed=1))
    best = ours.hyperparameter_search(
        hp_space=lambda trial: {"beta": trial.suggest_categorical("beta", [0.1, 0.5])},
        n_trials=2,
        direction="minimize",
        compute_objective=lambda metrics: metrics["eval_loss"],
        sampler=optuna.samplers.GridSampler({"beta": [0.1, 0.5]}),
    )
    losses = []
    for beta in (0.1, 0.5):
        again = trainer(tiny_model(seed=0), config(tmp_path, beta=beta), eval_dataset=rows(5, seed=1))
        again.train()
        losses.append(again.evaluate()["eval_loss"])
    assert len(losses) == 2
    assert best.objective > 0


def test_one_that_is_set_later_is_heard(tmp_path: Path) -> None:
    """As scripts did before it was an argument; a moving reference moves with the new policy."""
    ours = trainer(tiny_model(seed=3), config(tmp_path, **MOVING))
    ours.model_init = of_trial
    ours.train(trial=Trial(1))
    again = trainer(tiny_model(seed=1), config(tmp_path, **MOVING))
    again.train()
    assert logged(ours) == pytest.approx(logged(again), abs=2e-6)


def test_one_that_is_set_later_beside_a_chosen_reference(tmp_path: Path) -> None:
    ours = trainer(tiny_model(seed=3), config(tmp_path), ref_model=tiny_model(seed=9))
    ours.model_init = of_trial
    ours.train(trial=Trial(1))
    again = trainer(tiny_model(seed=1), config(tmp_path), ref_model=tiny_model(seed=9))
    again.train()
    assert logged(ours) == pytest.approx(logged(again), abs=2e-6)


def test_an_evaluation_before_training(tmp_path: Path) -> None:
    ours = made(tmp_path, eval_dataset=rows(5, seed=1))
    assert ours.evaluate()["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_run_with_model_init_can_be_resumed(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    made(tmp_path, options=saving | {"max_steps": 2}).train()
    resumed, whole = made(tmp_path, options=saving), made(tmp_path / "whole", options=saving)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert logged(resumed) == logged(whole)


SAME = tiny_model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": tiny_model()}, "`model` and `model_init` were both given"),
        ({"model_init": None}, "`model` is None, so there is nothing to train. Pass a .* or a `model_init`"),
        ({"optimizers": (torch.optim.SGD(SAME.parameters(), 0.1), None)}, "`optimizers` were given together"),
    ],
)
def test_what_is_refused_before_a_model_is_made(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **arguments)


def test_what_is_refused_in_the_second_run(tmp_path: Path) -> None:
    same = tiny_model()
    ours = made(tmp_path, model_init=lambda: same)
    ours.train()
    with pytest.raises(ValueError, match="`model_init` returned the model that was trained already"):
        ours.train()
    moved = made(tmp_path, options=MOVING, ref_model=tiny_model(seed=9))
    moved.train()
    with pytest.raises(ValueError, match=r"`ref_model` .* has moved in the run before. Pass its path"):
        moved.train()
    ours = made(tmp_path)
    ours.hp_search_backend, ours.hp_space = HPSearchBackend.OPTUNA, dict
    with pytest.raises(ValueError, match=r"beta must be .* got -1\.0"):
        ours.train(trial=Trial(0, beta=-1.0))
