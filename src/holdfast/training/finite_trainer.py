"""`FiniteTrainer`: nothing that is not finite leaves a run: no log, no metric, no model, no state.

`checkpoint.finite` has the checks, `step_record` finds the first step whose loss or gradient norm broke. Given up: the
pair that broke it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from holdfast.checkpoint.finite import (
    Break,
    Masks,
    check_finite,
    check_model,
    check_numbers,
    check_state,
    infinite_buffers,
)
from holdfast.config import DPOConfig
from holdfast.metrics import Tally
from holdfast.reference.reference import Reference
from holdfast.training.engine_checkpoints import EngineCheckpoints
from holdfast.training.margins import Margins
from holdfast.training.step_record import StepRecord, still_line

logger = logging.getLogger(__name__)


class FiniteTrainer(EngineCheckpoints):
    """Checks the numbers of a run where they are read anyway, and before anything is saved."""

    args: DPOConfig
    model: nn.Module
    reference: Reference | None = None
    """pi_ref; None where no loss compares with one."""

    _tallies: dict[str, Tally]
    _margins: dict[str, Margins]
    _step_record: StepRecord = StepRecord()
    _has_said_still: bool = False
    _infinite_masks: Masks | None = None

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _begin_numbers(self) -> None:
        """Forgets what was recorded of earlier steps, before training or after a checkpoint was restored."""
        is_fp16 = self.is_deepspeed_enabled and self.accelerator.mixed_precision == "fp16"
        self._step_record = StepRecord(skips_steps=is_fp16 or self.accelerator.scaler is not None)
        self._tallies["train"], self._margins["train"] = Tally(), Margins()
        self._masks()

    def _masks(self) -> Masks:
        """The buffers that were infinite when the trainer first looked."""
        if self._infinite_masks is None:
            self._infinite_masks = infinite_buffers(self.model)
        return self._infinite_masks

    def _first_break(self, *, ends_period: bool = False) -> Break | None:
        """The first step that was not finite, on any process. With `ends_period`, it is said, once, where no gradient
        has moved anything in the period that ends."""
        gather: Any = self.accelerator.gather
        reading = self._step_record.read(gather, self.accelerator.device, ends_period=ends_period)
        line = still_line(reading, self.args.optim, skips_steps=self._step_record.skips_steps)
        if ends_period and line is not None and not self._has_said_still and not self.is_deepspeed_enabled:
            self._has_said_still = True
            if self.is_world_process_zero():
                logger.warning(line)
        return reading.first

    def _check_numbers(self, numbers: Mapping[str, Any], where: str) -> None:
        check_numbers(
            numbers,
            where,
            step=self.state.global_step,
            folder=self._folder,
            policy=self.model,
            masks=self._masks(),
        )

    def _check_finite(self, loss: float, folder: Path, first: Break | None) -> None:
        check_finite(
            policy=self.model,
            optimizer=self.optimizer,
            reference=self.reference if self.args.should_save or self._is_sharded else None,
            loss=loss,
            masks=self._masks(),
            step=self.state.global_step,
            folder=folder,
            first=first,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `transformers.Trainer.save_model`. ValueError where a tensor of the policy is not finite."""
        self._check_model()
        super().save_model(output_dir, _internal_call)

    def _check_model(self) -> None:
        check_model(
            self.model,
            masks=self._masks(),
            step=self.state.global_step,
            folder=self._folder,
            is_sharded=self._is_sharded,
        )

    def save_state(self) -> None:
        """See `transformers.Trainer.save_state`. ValueError where a number in it is not finite."""
        check_state(self.state, folder=self._folder)
        super().save_state()

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """See `transformers.Trainer.save_metrics`. ValueError where a metric is not finite."""
        self._check_numbers(metrics, f"What is to be saved as {split}_results.json")
        super().save_metrics(split, metrics, combined)
