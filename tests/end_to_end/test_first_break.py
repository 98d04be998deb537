"""The step at which a number broke is named, with the last checkpoint before it, and nothing broken is on disk.

A table: where the number breaks, when the run saves and logs, and what the run is otherwise.
"""

import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from covering import covering
from families import tiny_model
from holdfast import DPOTrainer
from holdfast.record import read
from policies import POLICIES, config, logged, rows, trainer

pytestmark = pytest.mark.slow

BROKEN = 3
"""The optimizer step that breaks."""

# --- where ------------------------------------------------------------------------------------------------------------


def in_the_loss(ours: DPOTrainer, value: float, *, micro_batch: int = 0) -> None:
    """The loss of one micro-batch is `value`; gradients and weights stay finite, so that nothing else tells."""
    plain, seen = ours.compute_loss, itertools.count()

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss = plain(*args, **kwargs)
        if ours.model.training and ours.state.global_step == BROKEN - 1 and next(seen) == micro_batch:
            loss = loss + value
        return loss

    ours.compute_loss = broken


def in_the_loss_without_a_word(ours: DPOTrainer, value: float) -> None:
    """With transformers' filter, which would leave it out of the log; it is refused when options are made."""
    ours.args.logging_nan_inf_filter = True
    in_the_loss(ours, value)


def in_a_gradient(ours: DPOTrainer, value: float) -> None:
    plain = ours.training_step

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss = plain(*args, **kwargs)
        if ours.state.global_step == BROKEN - 1:
            [gradient, *_] = [p.grad for p in ours.model.parameters() if p.grad is not None]
            gradient.view(-1)[0] = value
        return loss

    ours.training_step = broken


class AfterTheStep(TrainerCallback):
    """Does something between the update and whatever follows it."""

    def __init__(self, what: Callable[[], Any]) -> None:
        self.what = what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == BROKEN:
            self.what()


def after_the_step(tensor: Callable[[DPOTrainer], Tensor], ours: DPOTrainer, value: float) -> None:
    ours.add_callback(AfterTheStep(lambda: tensor(ours).view(-1)[:1].fill_(value)))


def a_weight(ours: DPOTrainer) -> Tensor:
    return next(parameter.data for parameter in ours.model.parameters() if parameter.requires_grad)


def a_mean_of_the_optimizer(ours: DPOTrainer) -> Tensor:
    optimizer: Any = ours.optimizer
    return next(iter(optimizer.state.values()))["exp_avg"]


def a_weight_of_the_reference(ours: DPOTrainer) -> Tensor:
    assert ours.ref_model is not None
    return next(iter(ours.ref_model.parameters())).data


def in_a_mask(ours: DPOTrainer, value: float) -> None:
    """A buffer that is infinite from the first may stay so, but not become NaN."""
    ours.add_callback(AfterTheStep(lambda: ours.model.get_buffer("mask").fill_(math.nan)))


def in_an_evaluation(ours: DPOTrainer, value: float) -> None:
    plain = ours.compute_loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss = plain(*args, **kwargs)
        if not ours.model.training and ours.state.global_step == BROKEN:
            ours._tallies["eval"]._totals["loss"][0] = value
        return loss

    ours.compute_loss = broken


LOSS = r"The loss is (NaN|infinite) at step 3; it must be finite\."
WHERE: dict[str, tuple[Callable[[DPOTrainer, float], None], str]] = {
    "loss": (in_the_loss, LOSS),
    "middle micro-batch": (partial(in_the_loss, micro_batch=1), LOSS),
    "last micro-batch": (partial(in_the_loss, micro_batch=2), LOSS),
    "loss, filtered": (in_the_loss_without_a_word, LOSS),
    "gradient": (in_a_gradient, r"The gradient norm is (NaN|infinite) at step 3; it must be finite\."),
    "weight": (partial(after_the_step, a_weight), r"(The loss is NaN at step 4;|in the policy's `|eval_loss=nan)"),
    "mask": (in_a_mask, r"NaN or infinity is in the policy's buffer `mask`"),
    "optimizer": (
        partial(after_the_step, a_mean_of_the_optimizer),
        r"The loss is NaN at step 5;|optimizer's `exp_avg`",
    ),
    "moved reference": (
        partial(after_the_step, a_weight_of_the_reference),
        r"(The loss is NaN at step 4;|the moved reference's `|eval_.*=nan)",
    ),
    "evaluation": (in_an_evaluation, r"The evaluation has eval_loss=(nan|inf) at step 3; every number in it"),
}
"""By what is not finite: how it gets there, and what the message says."""

# --- when -------------------------------------------------------------------------------------------------------------

RARELY = {"logging_steps": 100}
NEVER = {"logging_strategy": "no"}
STEPS = {"save_strategy": "steps", "save_total_limit": 1}
WHEN: dict[str, tuple[dict[str, Any], int | None]] = {
    "each step": (STEPS | {"save_steps": 1}, 2),
    "every second step": (STEPS | RARELY | {"save_steps": 2}, 2),
    "model only": (STEPS | NEVER | {"save_steps": 2, "save_only_model": True}, 2),
    "epochs": (NEVER | {"save_strategy": "epoch"}, 2),
    "last step": (STEPS | NEVER | {"save_steps": 2, "max_steps": BROKEN}, 2),
    "no checkpoint": (NEVER, None),
    "no checkpoint, last step": (RARELY | {"max_steps": BROKEN}, None),
}
"""By when the run saves and logs: options, and the last checkpoint before the step that breaks."""

# --- what -------------------------------------------------------------------------------------------------------------

WHAT: dict[str, dict[str, Any]] = {
    "full": {},
    "clipped": {"max_grad_norm": 1.0},
    "lora": {},
    "snapshot in windows": {"reference": "snapshot", "reference_window": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "parts": {"tokens_per_batch": 20},
    "no reference": {"loss_type": "simpo"},
    "mixture of losses": {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2, "reference": "model"}
HELD_APART = {"full", "clipped", "parts"}


def policy(what: str) -> nn.Module:
    model = POLICIES["lora_sft"]() if what == "lora" else tiny_model()
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)
    return model


def run(where: str, when: str, what: str, folder: Path, value: float) -> DPOTrainer:
    """A trainer of two steps per epoch, six pairs each, that will break."""
    accumulation = 3 if "micro-batch" in where else 1
    options: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.01, "optim": "adamw_torch"}
    options |= {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
    options |= WHAT[what] | WHEN[when][0] | (MOVING if where == "moved reference" else {})
    if where == "evaluation":
        options |= {"eval_strategy": "steps", "eval_steps": 1}
    ours = trainer(policy(what), config(folder, **options), eval_dataset=rows(4, seed=2))
    WHERE[where][0](ours, value)
    return ours


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def check_disk(folder: Path, checkpoint: int | None) -> None:
    """One complete checkpoint, or none; all that is written is finite, and no model of the run's end is there. The
    record, which is read, has no number that is not."""
    names = [path.name for path in folder.glob("checkpoint-*")]
    assert names == ([f"checkpoint-{checkpoint}"] if checkpoint else [])
    assert len(list(folder.glob("checkpoint-*/reference/manifest.json"))) == len(names)
    for file in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert list(folder.glob("*.safetensors")) == []
    for file in folder.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=no_constant)
    check_record(folder)


def check_record(folder: Path) -> None:
    """Each line is JSON without NaN, and the record is read."""
    for file in folder.rglob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=no_constant)
    assert read(folder).facts.outcome in ("finished", "failed")


TABLE = covering(
    [
        (where, when, what, value)
        for where in WHERE
        for when in WHEN
        for what in WHAT
        for value in (math.nan, math.inf)
        if where != "moved reference" or what in HELD_APART
    ],
    2,
)
"""Every two of the values together."""


@pytest.mark.covering(1)
@pytest.mark.parametrize(("where", "when", "what", "value"), TABLE)
def test_the_step_and_the_checkpoint_before_it_are_named(
    where: str, when: str, what: str, value: float, tmp_path: Path
) -> None:
    ours = run(where, when, what, tmp_path / "run", value)
    with pytest.raises(ValueError, match=WHERE[where][1]) as raised:
        ours.train()
    checkpoint = WHEN[when][1]
    last = f"resume_from_checkpoint='{tmp_path}/run/checkpoint-{checkpoint}'"
    assert (last if checkpoint else "there is no complete checkpoint in") in str(raised.value)
    check_disk(tmp_path / "run", checkpoint)
    for entry in ours.state.log_history:
        assert all(map(math.isfinite, entry.values()))


@pytest.mark.parametrize("step", [1, 3])
def test_an_update_beyond_fp32_is_no_defect(step: int, tmp_path: Path) -> None:
    """torch's optimizers raise a RuntimeError there."""

    class Faster(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if state.global_step == step - 1:
                optimizer.param_groups[0]["lr"] = 1e38

    options = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1}
    ours = trainer(tiny_model(), config(tmp_path, **options), callbacks=[Faster()])
    remedy = "resume from .*/checkpoint-2, the last" if step == 3 else "no complete checkpoint"
    message = rf"update overflows at step {step}, where the learning rate is 1e\+38\. Lower .*{remedy}"
    with pytest.raises(ValueError, match=message):
        ours.train()


def test_a_model_that_is_saved_is_finite(tmp_path: Path) -> None:
    """After training, by any door; nothing is written."""
    ours = trainer(tiny_model(), config(tmp_path / "run", max_steps=1))
    ours.train()
    a_weight(ours).view(-1)[0] = math.inf
    for save in (ours.save_model, partial(ours.save_model, str(tmp_path / "other")), ours.push_to_hub):
        ours.hub_model_id = "somebody/model"
        with pytest.raises(ValueError, match=r"saved must be finite; after step 1, NaN or .*embed_tokens.*not|Nothing"):
            save()
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_mask_may_be_saved_before_training(tmp_path: Path) -> None:
    ours = trainer(policy("full"), config(tmp_path / "run"))
    ours.save_model()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_of_callbacks_are_json(value: float, tmp_path: Path) -> None:
    """A log, a metric, the state: what a callback or `compute_metrics` adds is refused, or nothing is written."""
    ours = trainer(tiny_model(), config(tmp_path / "run", max_steps=2), eval_dataset=rows(4, seed=2))
    ours.train()
    with pytest.raises(ValueError, match=r"The log has mine=.*at step 2.*of your own.* must be left out"):
        ours.log({"mine": value})
    with pytest.raises(ValueError, match=r"saved as train_results.json has mine="):
        ours.save_metrics("train", {"mine": value})
    ours.compute_metrics = lambda prediction: {"mine": value}
    with pytest.raises(ValueError, match=r"The evaluation has eval_mine=.*`compute_metrics`"):
        ours.evaluate()
    ours.state.log_history.append({"mine": value, "step": 1})
    with pytest.raises(ValueError, match=r"entry of the trainer's log_history has mine=.*at step 1"):
        ours.save_state()
    facts = tmp_path / "run" / "record" / "facts.json"  # of the training before
    assert list((tmp_path / "run").rglob("*.json")) == [facts]
    json.loads(facts.read_text(encoding="utf-8"), parse_constant=no_constant)
    check_record(tmp_path / "run")
    assert all("mine" not in file.read_text(encoding="utf-8") for file in facts.parent.iterdir())


def test_a_metric_that_overflows_is_an_error(tmp_path: Path) -> None:
    """beta * nats is beyond fp32 while the loss is finite: rewards would be wrong in the log."""
    options = {"loss_type": "hinge", "learning_rate": 0.5}
    ours = trainer(tiny_model(), config(tmp_path, **options))
    plain = ours.compute_loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss = plain(*args, **kwargs)
        ours._tallies["train"]._totals["rewards/margins"][0] = math.inf
        return loss

    ours.compute_loss = broken
    with pytest.raises(ValueError, match=r"The log has rewards/margins=inf at step 1; every number"):
        ours.train()


def test_a_best_metric_is_never_nan(tmp_path: Path) -> None:
    """Also where a callback makes it NaN after the evaluation."""

    class Spoiler(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            metrics["eval_mine"] = math.nan if state.global_step == 2 else 1.0

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "mine", "greater_is_better": True}
    ours = trainer(tiny_model(), config(tmp_path, **options), eval_dataset=rows(4), callbacks=[Spoiler()])
    with pytest.raises(ValueError, match=r"The evaluation has eval_mine=nan at step 2"):
        ours.train()
    assert ours.state.best_global_step == 1
    check_disk(tmp_path, 1)


# --- fp16 -------------------------------------------------------------------------------------------------------------


def scaled(folder: Path, scale: float) -> DPOTrainer:
    """A trainer whose loss is scaled as fp16 does, on a CPU: at a scale near the end of fp32, gradients overflow."""
    ours = trainer(tiny_model(), config(folder, max_steps=6, save_strategy="steps", save_steps=1))
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-4)

    def unscale(optimizer: Any = None) -> None:  # as accelerate does in fp16
        optimizer = ours.optimizer
        scaler.unscale_(optimizer.optimizer)

    ours.accelerator.scaler = scaler
    ours.accelerator.unscale_gradients = unscale
    return ours


def test_a_skipped_step_is_no_error(tmp_path: Path) -> None:
    ours = scaled(tmp_path, 2.0**127)
    ours.train()
    norms = logged(ours, "grad_norm")
    assert 0 < len(norms) < 6  # those of skipped steps are left out
    assert all(map(math.isfinite, norms))
    check = [json.loads(file.read_text(), parse_constant=no_constant) for file in tmp_path.rglob("trainer_state.json")]
    assert len(check) == 6


def test_a_loss_that_is_infinite_is_an_error_there_too(tmp_path: Path) -> None:
    ours = scaled(tmp_path, 1.0)
    in_the_loss(ours, math.inf)
    with pytest.raises(ValueError, match=r"The loss is infinite at step 3; .*checkpoint-2, the last"):
        ours.train()


# --- nothing trains ---------------------------------------------------------------------------------------------------

STILL: dict[str, tuple[dict[str, Any], int]] = {
    "vanished": ({"beta": 1e-30}, 1),
    "saturated": ({"loss_type": "hinge", "beta": 1e3, "learning_rate": 1e-6}, 1),  # from the second step on
    "learning": ({}, 0),
    "warming up": ({"warmup_steps": 3, "lr_scheduler_type": "linear"}, 0),
}


@pytest.mark.parametrize("logging_steps", [1, 2, 100])
@pytest.mark.parametrize("kind", STILL)
def test_a_run_that_does_not_move_says_so_once(
    kind: str, logging_steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, num_expected = STILL[kind]
    args = config(tmp_path, **{"logging_steps": logging_steps} | options)
    trainer(tiny_model(), args, train_dataset=rows(2).select([0])).train()
    found = [record.message for record in caplog.records if "nothing trains" in record.message]
    is_seen = kind != "saturated" or logging_steps < 100  # the first step moves
    assert len(found) == (num_expected if is_seen else 0)


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    ["linear", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("constant", "cosine"))],
)
def test_a_lower_learning_rate_is_heeded_when_resuming(schedule: str, tmp_path: Path) -> None:
    """What the message advises: from the checkpoint on, each step's rate is the one of a run at the lower rate."""
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": schedule, "optim": "adamw_torch"}
    trainer(tiny_model(), config(tmp_path / "run", learning_rate=0.01, **options)).train()
    low = trainer(tiny_model(), config(tmp_path / "low", learning_rate=1e-4, **options))
    low.train()
    resumed = trainer(tiny_model(), config(tmp_path / "run", learning_rate=1e-4, **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    rates = logged(resumed, "learning_rate")
    assert rates[:2] == pytest.approx([100 * rate for rate in logged(low, "learning_rate")[:2]])
    assert rates[2:] == pytest.approx(logged(low, "learning_rate")[2:])


def test_a_trainer_may_go_on_after_a_break(tmp_path: Path) -> None:
    """The same object, resumed where the message says, without what broke it."""
    options = {"save_strategy": "steps", "save_steps": 1}
    ours = trainer(tiny_model(), config(tmp_path / "run", **options))
    plain = ours.compute_loss
    in_the_loss(ours, math.nan)
    with pytest.raises(ValueError, match="The loss is NaN at step 3"):
        ours.train()
    ours.compute_loss = plain
    ours.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    whole = trainer(tiny_model(), config(tmp_path / "whole", **options))
    whole.train()
    assert logged(ours) == logged(whole)
