"""`ResumableTrainer`: checkpoints that hold the reference, and nothing that is not complete or not finite.

`transformers.Trainer` saves the policy, the optimizer and its own state. Here the reference is saved beside them, and a
checkpoint counts only from then on: older ones are deleted, and this one is pushed, once it is complete.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from holdfast.card import write_card
from holdfast.checkpoint.folder import best_checkpoint, save_complete
from holdfast.checkpoint.policy_state import (
    check_loaded,
    load_adapters,
    load_converted,
    needs_conversion,
    policy_digest,
)
from holdfast.checkpoint.provenance import Provenance
from holdfast.checkpoint.reference_state import load_reference
from holdfast.checkpoint.template_date import date_to_print
from holdfast.internals.transformers import set_unlogged_loss, unlogged_loss
from holdfast.policy.adapters import is_adapted
from holdfast.scoring.causal_lm import unwrap
from holdfast.training.interruption import InterruptionCallback
from holdfast.training.pair_trainer import PairTrainer

logger = logging.getLogger(__name__)


class ResumableTrainer(PairTrainer):
    """Saves and loads the policy together with its reference."""

    _provenance: Provenance | None = None
    _uploading: Sequence[str] = ()
    _interruption: InterruptionCallback
    _unlogged: Sequence[dict[str, Any]] = ()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None, **metadata: Any,
    ) -> None:  # fmt: skip
        """Writes `README.md` into the output folder; `metadata` goes into its header (`language`, `license`, ...)."""
        if self.is_world_process_zero():
            write_card(
                self.args, self.model, self.reference, title=model_name, dataset=dataset_name, tags=tags,
                metadata=metadata,
            )  # fmt: skip

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        self._check_finite(self._tallies["train"].total("loss", self._sum_over_processes), folder)
        self.create_model_card(model_name=(self.args.hub_model_id or "").split("/")[-1] or None)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        loss, step = unlogged_loss(self)
        unlogged = {"loss": loss, "step": step, "metrics": self._tallies["train"].record()}
        self._unlogged = gather_object([unlogged])
        push = getattr(self, "push_in_progress", None)
        self._uploading = () if push is None or push.is_done() else self._uploading
        save_complete(
            self,
            checkpoint,
            partial(self._save_as_library, partial(super()._save_checkpoint, model, trial)),
            reference=self.reference,
            provenance=self._provenance,
            run_record=self._run_record,
            uploading=self._uploading,
        )
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(checkpoint))
            self._uploading = [*self._uploading, checkpoint.name]

    def _save_as_library(self, save: Callable[[], None]) -> None:
        """What transformers saves of a checkpoint. `self.args` is a copy meanwhile."""
        self.args.save_only_model = self.args.save_only_model and not self._interruption.is_ending
        save()

    def _run_record(self) -> dict[str, Any]:
        """What a checkpoint's manifest says besides the reference: where in the data the run is, the policy's digest,
        and the date that chat templates print."""
        return {
            "place": self._stream_position.record(),
            "policy": policy_digest(self.model, is_sharded=self._is_sharded),
            "template_date": self._preparation.template_date,
            "unlogged": self._unlogged,
            **self._interruption.record(),
        }

    def _restore_unlogged(self, of_processes: list[dict[str, Any]]) -> None:
        """What was computed since the last log goes into the next one, as in a run that was not resumed. `of_processes`
        is what a checkpoint records, of each process of the run that wrote it."""
        if not of_processes:
            return
        index, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        own = of_processes[index if len(of_processes) == num_processes else 0]
        mean = sum(part["loss"] for part in of_processes) / len(of_processes)
        loss, metrics = own["loss"], own["metrics"]
        if len(of_processes) != num_processes:  # the first process gets all of it: metrics are summed, losses averaged
            loss, parts = mean, of_processes if index == 0 else []
            metrics = {
                name: [sum((part["metrics"][name][i] for part in parts), 0.0) for i in (0, 1)] for name in metrics
            }
        set_unlogged_loss(self, loss, own["step"], mean)
        self._tallies["train"].restore(metrics, self.accelerator.device)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._interruption.evaluating():
            return super()._evaluate(*args, **kwargs)

    def _evaluate_after_step(self) -> None:
        """Evaluates, and saves a checkpoint if it is the best, as at the end of a step where that is due."""
        self.control.should_log, self.control.should_evaluate, self.control.should_save = False, True, False
        untyped: Any = self
        untyped._maybe_log_save_evaluate(None, None, self.model_wrapped, None, self.state.epoch, None, 0.0)

    def _load_rng_state(self, checkpoint: Any) -> None:
        super()._load_rng_state(checkpoint)
        self._interruption.evaluate_if_due()

    def _print_date_of(self, checkpoint: Path) -> None:
        """Chat templates print the date that they printed in the run that wrote `checkpoint`."""
        date = date_to_print(checkpoint, self._preparation.template_date, self.args.template_date)
        if date == self._preparation.template_date:
            return
        if self.is_world_process_zero():
            logger.warning("Chat templates print the date %s, as in the run that wrote %s.", date, checkpoint)
        self._preparation = replace(self._preparation, template_date=date)
        self.train_dataset, self.eval_dataset = self._prepared(self.args)
        self._provenance = None
        self._announce(self._datasets())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if is_adapted(self.model) and not self._is_sharded:
            load_adapters(self.model, checkpoint)
        elif not self._is_sharded and needs_conversion(self.model, checkpoint):
            load_converted(unwrap(self.model), checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_loaded(self.model, checkpoint, is_sharded=self._is_sharded)

    def _load_best_model(self) -> None:
        """The policy and its reference as they were at the best checkpoint. ValueError where they cannot be loaded."""
        best = best_checkpoint(self.state, Path(str(self.args.output_dir)))
        assert best is not None
        self.state.best_model_checkpoint = str(best)
        if self._is_sharded:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best))
        load_reference(best, self.reference, self._provenance)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does not push: transformers calls this in the middle of a save, and `_save_checkpoint` pushes at its end."""
