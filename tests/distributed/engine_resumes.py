"""Runs over an engine that are saved and taken up again, by name: `<engine>/<policy>/<reference>/<motion>/<action>`.

`resume` takes a run up from its second step, in the same launch, and does everything else that a checkpoint is for.
`from-N-ENGINE` takes up what the launch of N processes has saved with `resume`. `full-RANK` finds no room in one
process. `full_apart` has an output folder of its own for each process. `mutated-WHAT` is `resume` with a step left out.
`best` ends with the best model and two checkpoints, `only_model` goes on without an optimizer, and `stopped` goes on
after the last process was asked to end.
"""

import errno
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import gather_object
from engine_scenarios import made, outcome
from engines import forget_deepspeed
from peft import PeftModel
from safetensors.torch import load_file
from scenarios import GLOBAL_BATCH, RANK, WORLD, evaluated
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from families import tiny_model
from holdfast import DPOTrainer
from holdfast import trainer as trainer_module
from holdfast.checkpoint import parts
from holdfast.checkpoint.manifest import complete_checkpoints
from holdfast.checkpoint.whole import cut_optimizer
from holdfast.training import engine_checkpoints

SAVING: dict[str, Any] = {
    "optim": "adamw_torch",
    "adam_epsilon": 0.1,  # at small gradients AdamW's steps would be all rounding
    "learning_rate": 0.1,
    "lr_scheduler_type": "linear",
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """What the action of the run `name` came to."""
    action = name.split("/")[4]
    if action.startswith("from-"):
        _, launch, engine = action.split("-")
        launch = f"engines with {launch}" if launch.isdigit() else launch
        _, *rest = name.split("/")[:4]
        saved = folder.parents[4].parent / launch / "/".join([engine, *rest, "resume"]) / "run" / "checkpoint-2"
        return _taken_up(name, saved, folder)
    if action == "full_apart":
        return {"said": gather_object([_refused(made(name, folder / f"host{RANK}", **SAVING), None)])}
    if action.startswith("full-"):
        return _full_disk(name, folder, int(action.removeprefix("full-")))
    if action in ("best", "only_model", "stopped"):
        return {"best": _best, "only_model": _only_model, "stopped": _stopped}[action](name, folder)
    with MUTATIONS[action.removeprefix("mutated-")]() if action.startswith("mutated-") else nullcontext():
        return _resume(name, folder)


MUTATIONS: dict[str, Callable[[], Any]] = {
    "optimizer_of_another": lambda: mock.patch.object(engine_checkpoints, "cut_optimizer", _cut_from_another),
    "optimizer_left_out": lambda: mock.patch.object(parts, "load_optimizer"),
    "policy_left_out": lambda: mock.patch.object(engine_checkpoints, "load_whole_policy"),
    "reference_left_out": lambda: mock.patch.object(trainer_module, "load_reference"),
}


def _cut_from_another(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The first process gets the part of the last one, and so on."""

    def rolled(value: Any) -> Any:
        return value.roll(-(-len(value) // WORLD), 0) if isinstance(value, torch.Tensor) and value.dim() else value

    turned = {index: {key: rolled(value) for key, value in own.items()} for index, own in state["state"].items()}
    return cut_optimizer({**state, "state": turned}, optimizer)


def _resume(name: str, folder: Path) -> dict[str, Any]:
    """The numbers of a run that was taken up from its second step, those of the uninterrupted one, and the rest."""
    ours = made(name, folder / "run", **SAVING)
    ours.train()
    uninterrupted = outcome(ours, folder / "run")
    ours.save_model(str(folder / "final"))
    checkpoint = folder / "run" / "checkpoint-2"
    second = next(entry for entry in uninterrupted["logs"] if entry["step"] == 2 and "eval_loss" in entry)
    restored = made(name, folder / "restored", **SAVING)
    restored.restore(str(checkpoint))
    found = evaluated(restored.evaluate())
    measured = {key: value for key, value in second.items() if key not in ("epoch", "step", "eval_num_tokens")}
    facts = {
        "files": sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()),
        "final model": _loaded_equals(folder / "final", uninterrupted["weights"], name) if RANK == 0 else True,
        "restored": gather_object([{key: value for key, value in measured.items() if found.get(key) != value}]),
        "other base": gather_object([_refused(made(name, folder / "other", change=_other_base, **SAVING), checkpoint)]),
    }
    taken_up = _taken_up(name, checkpoint, folder)
    taken_up["facts of each_process"] |= {"uninterrupted": uninterrupted, **facts}
    return taken_up


def _best(name: str, folder: Path) -> dict[str, Any]:
    """The numbers of a run that ends with its best model, which is of the first evaluations, and what it leaves."""
    changed: dict[str, Any] = {
        "max_steps": 6,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_logps/rejected",
    }
    changed |= {"save_total_limit": 2, "greater_is_better": True}
    ours = made(name, folder / "run", **SAVING | changed)
    ours.train()
    left = sorted(path.name for path in complete_checkpoints(folder / "run"))
    best = str(ours.state.best_model_checkpoint).rpartition("/")[2]
    return outcome(ours, folder / "run") | {"left": left, "best": best}


def _only_model(name: str, folder: Path) -> dict[str, Any]:
    """The numbers of a run that was taken up without an optimizer's state."""
    options: dict[str, Any] = SAVING | {"save_only_model": True}
    made(name, folder / "run", **options).train()
    return _taken_up(name, folder / "run" / "checkpoint-2", folder)


def _stopped(name: str, folder: Path) -> dict[str, Any]:
    """The numbers of a run that goes on after the last process got SIGTERM within the third step."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and RANK == WORLD - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    options = SAVING | {"save_strategy": "no", "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": max(GLOBAL_BATCH // WORLD // 2, 1)}
    ours = made(name, folder / "run", **options)
    ours.add_callback(Stop())
    code: Any = None
    try:
        ours.train()
    except SystemExit as end:
        code = end.code
    again = made(name, folder / "run", **options)
    again.train(resume_from_checkpoint=True)
    codes = gather_object([code])
    left = [path.name for path in complete_checkpoints(folder / "run")]
    return outcome(again, folder / "run") | {
        "left": left,
        "codes": sorted(set(codes)),
    }


def _full_disk(name: str, folder: Path, rank: int) -> dict[str, Any]:
    """What all processes say where torch finds no room in one of them after the third step, and what is left."""
    plain = torch.save

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == RANK and state.global_step == 3:
                torch.save = full

    ours = made(name, folder / "run", **SAVING)
    ours.add_callback(Full())
    try:
        said = _refused(ours, None)
    finally:
        torch.save = plain
    left = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
    return {"said": gather_object([said]), "left": left, "complete": len(complete_checkpoints(folder / "run"))}


def _taken_up(name: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    ours = made(name, folder / "again", **SAVING)
    ours.train(resume_from_checkpoint=str(checkpoint))
    return outcome(ours, folder / "again")


def _other_base(policy: nn.Module, parts: dict[str, Any]) -> None:
    """Another reference than that of the run: another base of it, or another model."""
    changed = parts.get("ref_model", policy)
    with torch.no_grad():
        next(parameter for name, parameter in changed.named_parameters() if "embed_tokens" in name).add_(0.01)


def _refused(ours: DPOTrainer, checkpoint: Path | None) -> str:
    """The ValueError of a run, taken up from `checkpoint` if there is one; empty where there is none."""
    try:
        ours.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except ValueError as error:
        return str(error)
    return ""


def _loaded_equals(folder: Path, weights: str, name: str) -> bool:
    """Whether a plain folder holds the trained weights, as a single process would load them."""
    model: nn.Module
    forget_deepspeed()
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(tiny_model(), folder, is_trainable=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    loaded = dict(model.named_parameters())
    return all(torch.equal(loaded[key], tensor) for key, tensor in load_file(weights).items())
