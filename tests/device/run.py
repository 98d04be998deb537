"""Runs a cell: a real trainer, made on the CPU, trains on the pretend device, and a whole step is watched.

The trainer is made with values, since that is when a model's log-probs are compared. Then its tensors are exchanged for
twins without values, and `train` runs as it is: loader, look-ahead, reference, loss, clipping, optimizer and callbacks.
The first step sets up what lasts; the steps after it are watched.
"""

import contextlib
import os
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainerCallback

import policies
from cells import Cell
from digests import of_no_values
from holdfast import DPOTrainer
from holdfast.scoring.score import score
from pretend.places import NOWHERE, Place, place_of_error
from pretend.stage import on_stage
from references import trainer_arguments
from routes import only_these_work
from shapes_of_models import Shaped
from twins import Twins, exchange_kept, modules_of
from watch import Watch


@dataclass(slots=True, kw_only=True)
class Result:
    """What a cell's watched steps did. `error` is what ended the run, with its place."""

    cell: Cell
    watch: Watch
    error: str | None = None
    place: Place = NOWHERE
    trace: str = ""
    tallies: set[str] = field(default_factory=set)
    """The kinds of devices on which metrics are added up."""


_EVALUATIONS = ("evaluation", "evaluation_by_source", "filling")
"""Variants in which an evaluation is watched; `filling` on rows whose log-probs are not stored yet."""


class _Watched(Exception):
    """All steps that are watched were made. What follows checks and writes values, which are not here."""


class _WatchSteps(TrainerCallback):
    """Watches from the end of the first step to the end of the last."""

    def __init__(self, watch: Watch, last: int, trainer: DPOTrainer, result: Result) -> None:
        self._watch, self._last, self._trainer, self._result = watch, last, trainer, result

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self._last:
            self._watch.is_on = False
            totals = self._trainer._tallies["train"]._totals.values()
            self._result.tallies = {tensor.device.type for tensor in totals}
            raise _Watched
        self._watch.is_on = True


def run(cell: Cell) -> Result:
    """The cell's result."""
    watch = Watch()
    result = Result(cell=cell, watch=watch)
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, HOLDFAST_HOME=folder):
        try:
            _run(cell, Path(folder), watch, result)
        except Exception as error:
            result.error = f"{type(error).__name__}: {str(error).strip()[:300]}"
            result.place = place_of_error(error)
            result.trace = traceback.format_exc()
    return result


def _run(cell: Cell, folder: Path, watch: Watch, result: Result) -> None:
    shaped = Shaped(cell)
    trainer = _trainer(cell, shaped, folder)
    _read_transforms(trainer)
    num_steps = 3 if cell.way == "window" else 2
    with only_these_work(cell.routes), of_no_values(), on_stage(watch) as device:
        twins = Twins(device)
        twins.exchange(trainer.model, shaped.larger(trainer.model))
        for module in modules_of(trainer.reference):
            twins.exchange(module, shaped.larger(module))
        exchange_kept(trainer.reference, twins)
        trainer.add_callback(_WatchSteps(watch, num_steps, trainer, result))
        if cell.variant in _EVALUATIONS:
            other = shaped.rows(cell.pairs * 2, seed=1) if cell.variant == "filling" else None
            watch.is_on = True
            trainer.evaluate(other)
            watch.is_on = False
            result.tallies = {"cuda"}
        else:
            with contextlib.suppress(_Watched):
                trainer.train()


def _read_transforms(trainer: DPOTrainer) -> None:
    """What a model does to its logits is read from values, in its first forward pass: here."""
    batch = trainer._collated(trainer._first_rows())
    for model in [trainer.model, *modules_of(trainer.reference)]:
        with torch.no_grad():
            score(model, batch)


def _trainer(cell: Cell, shaped: Shaped, folder: Path) -> DPOTrainer:
    options = {
        "per_device_train_batch_size": cell.pairs,
        "per_device_eval_batch_size": cell.pairs,
        "max_steps": 9,
        "logging_steps": 1000,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "reference_audit": False,
    }
    options |= cell.options()
    args = policies.config(folder / "run", **options)
    args.dataloader_pin_memory = args.accelerator_config.non_blocking = (
        True  # as where there is a GPU, see `holdfast.training_arguments`
    )
    dataset = shaped.rows(cell.pairs * 12)
    model = shaped.policy()
    if cell.precision == "bf16_weights":
        model = model.to(torch.bfloat16)
    evaluated = shaped.rows(cell.pairs * 2)
    if cell.variant == "evaluation_by_source":
        evaluated = evaluated.add_column("source", ["one", "two"] * cell.pairs)  # pyright: ignore
    more = trainer_arguments(cell, folder)
    return policies.trainer(model, args, train_dataset=dataset, eval_dataset=evaluated, **more)
