"""No checkpoint and no trained model is NaN or infinite, and none that is finite is deleted for one that is not."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from families import tiny_model
from holdfast.checkpoint.finite import check_finite, not_finite
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, trainer

pytestmark = pytest.mark.slow

OPTIONS = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 5, "logging_steps": 10}
OPTIONS |= {"optim": "adamw_torch", "learning_rate": 0.01}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1}
SNAPSHOT = MOVING | {"reference": "snapshot", "snapshot_device": "disk"}
NAME = "model.layers.1.mlp.up_proj.weight"


class Plant(TrainerCallback):
    """Does something to the trainer once: after the gradients of step `step`, or after its update."""

    def __init__(self, what: Callable[[Any, float], None], value: float, step: int, *, before_update: bool) -> None:
        self.what, self.value, self.step, self.before_update = what, value, step, before_update
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before_update and state.global_step == self.step - 1:
            self.what(self.trainer, self.value)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.before_update and state.global_step == self.step:
            self.what(self.trainer, self.value)


@torch.no_grad()
def in_a_weight(ours: Any, value: float) -> None:
    ours.model.get_parameter(NAME)[3, 2] = value


def in_a_gradient(ours: Any, value: float) -> None:
    ours.model.get_parameter(NAME).grad[3, 2] = value


def in_a_buffer(ours: Any, value: float) -> None:
    ours.model.get_buffer("scale")[0] = value


def in_the_optimizer(ours: Any, value: float) -> None:
    ours.optimizer.state[ours.model.get_parameter(NAME)]["exp_avg_sq"][3, 2] = value


def in_the_reference(ours: Any, value: float) -> None:
    if ours.ref_model is not None:
        ours.ref_model.get_parameter(NAME).data[3, 2] = value
    else:
        ours.reference.scorer._plain.change(
            lambda name, tensor: tensor.view(-1)[0].fill_(value) if name == NAME else None
        )


def in_the_loss(ours: Any, value: float) -> None:
    """As a forward pass that overflows in one batch would leave it, weights as they are."""
    ours._tallies["train"]._totals["loss"][0] = value


KINDS: dict[str, tuple[Callable[[Any, float], None], dict[str, Any], str]] = {
    "weight": (in_a_weight, {}, f"the policy's `{NAME}`"),
    "gradient": (in_a_gradient, {}, f"the policy's `{NAME}`"),
    "buffer": (in_a_buffer, {}, "the policy's buffer `scale`"),
    "optimizer": (in_the_optimizer, {}, f"the optimizer's `exp_avg_sq` of `{NAME}`"),
    "reference": (in_the_reference, MOVING, f"the moved reference's `{NAME}`"),
    "reference on disk": (in_the_reference, SNAPSHOT, f"the moved reference's `{NAME}`"),
    "loss": (in_the_loss, {}, "the loss"),
}
"""By what is not finite: how it gets there, options, and what the message names first."""


def policy() -> nn.Module:
    model = tiny_model()
    model.register_buffer("scale", torch.ones(2), persistent=False)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)  # infinite as it is
    return model


def planted(kind: str, value: float, step: int, folder: Path, **options: Any) -> Any:
    what, more, _ = KINDS[kind]
    callback = Plant(what, value, step, before_update=kind == "gradient")
    ours = trainer(policy(), config(folder, **OPTIONS | more | options), callbacks=[callback])
    callback.trainer = ours
    return ours


def complete(folder: Path) -> list[str]:
    return sorted(path.parent.parent.name for path in folder.glob("checkpoint-*/reference/manifest.json"))


@pytest.mark.covering(1)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_finite_checkpoint_remains_and_is_named(kind: str, value: float, tmp_path: Path) -> None:
    step = int(torch.randint(2, 6, ()))
    _, more, name = KINDS[kind]
    last = tmp_path / "run" / f"checkpoint-{step - 1}"
    message = (
        rf"at step {step}, NaN or infinity is in .*{re.escape(name)}.*resume from {re.escape(str(last))}, the last"
    )
    with pytest.raises(ValueError, match=message):
        planted(kind, value, step, tmp_path / "run").train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [last.name] == complete(tmp_path / "run")
    for file in last.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    whole = trainer(policy(), config(tmp_path / "whole", **OPTIONS | more))
    whole.train()
    resumed = trainer(policy(), config(tmp_path / "run", **OPTIONS | more))
    resumed.train(resume_from_checkpoint=str(last))
    assert digest(resumed.model.named_parameters()) == digest(whole.model.named_parameters())
    assert resumed.reference is not None
    assert whole.reference is not None
    assert digest(resumed.reference.state_dict().items()) == digest(whole.reference.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_there_may_be_no_checkpoint(kind: str, tmp_path: Path) -> None:
    """At the first step, and in a run without checkpoints at the end, before the model counts as trained."""
    with pytest.raises(ValueError, match=r"at step 1, NaN.*start again: there is no complete checkpoint in"):
        planted(kind, float("nan"), 1, tmp_path).train()
    assert list(tmp_path.glob("checkpoint-*")) == []
    with pytest.raises(ValueError, match=r"(at step 5, NaN|loss is NaN at step 5).*there is no complete checkpoint in"):
        planted(kind, float("nan"), 5, tmp_path, save_strategy="no").train()


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_a_logged_loss_names_the_checkpoint(value: float, word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"The loss is {word} at step 4; .*resume from .*checkpoint-3, the last"):
        planted("loss", value, 4, tmp_path, logging_steps=1).train()


@pytest.mark.parametrize("kind", ["lora_sft", "lora_fresh_over_sft", "pissa", "partly_frozen"])
def test_what_is_finite_is_saved(kind: str, tmp_path: Path) -> None:
    trainer(POLICIES[kind](), config(tmp_path, **OPTIONS | {"max_steps": 2})).train()
    assert complete(tmp_path) == ["checkpoint-2"]


DTYPES = ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read(dtype: str) -> None:
    """The largest number of each is finite; NaN is not, wherever it stands."""
    kind = getattr(torch, dtype)
    finite = torch.tensor([1.0, torch.finfo(kind).max, torch.finfo(kind).min], dtype=torch.float64).to(kind)
    wrong = torch.tensor([1.0, float("nan"), 2.0]).to(kind)
    empty, packed = torch.zeros(0, dtype=kind), torch.tensor([255], dtype=torch.uint8)
    tensors = [("a", finite), ("b", wrong), ("c", empty), ("d", packed), ("e", finite.to("meta"))]
    assert not_finite(tensors) == ["b"]


def test_what_another_process_finds_stops_this_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All processes raise together: one that went on alone would wait for the others for ever."""
    found = "the policy's `model.norm.weight`"
    monkeypatch.setattr("holdfast.checkpoint.finite.gather_object", lambda names: [*names, found])
    with pytest.raises(ValueError, match=rf"at step 7, NaN or infinity is in {found}\. .*no complete checkpoint in"):
        check_finite(policy=tiny_model(), optimizer=None, reference=None, loss=0.5, masks={}, step=7, folder=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e38, "weight_decay": 1e10},
        {"weight_decay": 1e38, "learning_rate": 1e30, "optim": "adamw_torch"},
    ],
)
def test_a_run_whose_last_step_breaks_the_model_is_no_success(options: dict[str, Any], tmp_path: Path) -> None:
    """The loss of the last step is finite, and nobody computes another."""
    for strategy in ("no", "steps"):
        with pytest.raises(ValueError, match=r"at step 1, NaN or infinity is in the policy's `.*`"):
            trainer(tiny_model(), config(tmp_path, max_steps=1, save_strategy=strategy, **options)).train()
    assert complete(tmp_path) == []
