"""`ResumableTrainer`: checkpoints that hold the reference, and nothing that is not complete or not finite.

`transformers.Trainer` saves the policy, the optimizer and its own state. Here the reference is saved beside them, and a
checkpoint counts only from then on: older ones are deleted, and this one is pushed, once it is complete.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from holdfast.agreement import raised_together
from holdfast.card import write_card
from holdfast.checkpoint.adoption import adopt, is_to_be_adopted
from holdfast.checkpoint.disk_error import writing
from holdfast.checkpoint.engine import Engine, check_engine
from holdfast.checkpoint.finite import check_state
from holdfast.checkpoint.folder import (
    best_checkpoint,
    keeping_checkpoints,
    leave_only,
    save_complete,
)
from holdfast.checkpoint.hosts import agreed_checkpoint
from holdfast.checkpoint.manifest import read_manifest, recorded
from holdfast.checkpoint.placed import remove_cut_copies
from holdfast.checkpoint.policy_base import PolicyBase, check_adapters
from holdfast.checkpoint.policy_state import (
    check_loaded,
    load_adapters,
    load_converted,
    needs_conversion,
    policy_digest,
)
from holdfast.checkpoint.provenance import Provenance, dataset_digest
from holdfast.checkpoint.reference_state import load_reference
from holdfast.checkpoint.sound import check_together, last_complete, resuming
from holdfast.checkpoint.template_date import date_to_print
from holdfast.checkpoint.training_state import (
    check_same_optimizer,
    loading,
    optimizer_record,
    saved_names,
    starting_afresh,
)
from holdfast.data.pair_values import pair_value_columns
from holdfast.internals.transformers import set_unlogged_loss, unlogged_loss
from holdfast.peers.phase import doing
from holdfast.policy.adapters import is_adapted
from holdfast.record.entries import Sample
from holdfast.scoring.causal_lm import unwrap
from holdfast.secrets import without_secrets_on_disk
from holdfast.training.interruption import InterruptionCallback
from holdfast.training.saving_trainer import SavingTrainer

logger = logging.getLogger(__name__)


class ResumableTrainer(SavingTrainer):
    """Saves and loads the policy together with its reference."""

    _provenance: Provenance | None = None
    _base: PolicyBase | None = None
    _is_reference_chosen: bool
    _uploading: Sequence[str] = ()
    _interruption: InterruptionCallback
    _unlogged: Sequence[dict[str, Any]] = ()
    _last_samples: Sequence[Sample] = ()
    """What was generated at the last evaluation."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None, **metadata: Any,
    ) -> None:  # fmt: skip
        """Writes `README.md` into the output folder; `metadata` goes into its header (`language`, `license`, `tasks`,
        `finetuned_from`, `dataset_tags`, ...). See `holdfast.card.write_card`."""
        if self.is_world_process_zero():
            write_card(
                self.args, self.model, self.reference, train_dataset=self.train_dataset, title=model_name,
                dataset=dataset_name, tags=tags, metadata=metadata, log_history=self.state.log_history,
                samples=self._last_samples,
            )  # fmt: skip

    @doing("saving a checkpoint", is_long=True)
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        loss = self._tallies["train"].total("loss", self._sum_over_processes)
        self._check_finite(loss, folder, self._first_break())
        check_state(self.state, folder=folder)
        with raised_together():
            self.create_model_card(model_name=(self.args.hub_model_id or "").split("/")[-1] or None)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        loss, step = unlogged_loss(self)
        margins = self._margins["train"].record()
        unlogged = {"loss": loss, "step": step, "metrics": self._tallies["train"].record(), "margins": margins}
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
            is_sharded=self._is_sharded,
            uploading=self._uploading,
        )
        if self.args.push_to_hub:
            with self._pushing(checkpoint), without_secrets_on_disk(self.args):
                super()._push_from_checkpoint(str(checkpoint))
            self._uploading = [*self._uploading, checkpoint.name]

    @contextlib.contextmanager
    def _pushing(self, checkpoint: Path) -> Iterator[None]:
        """A context in which transformers copies a checkpoint's model into the output folder to push it. A copy that a
        full disk cut is removed."""
        folder = Path(str(self.args.output_dir))
        none = f"start again: there is no complete checkpoint in {folder}"
        try:
            with writing("the model that was to be pushed", folder, lambda: last_complete(folder, none=none)):
                yield
        except ValueError:
            remove_cut_copies(checkpoint, folder)
            raise

    def _save_as_library(self, save: Callable[[], None]) -> None:
        """What transformers saves of a checkpoint. `self.args` is a copy meanwhile."""
        self.args.save_only_model = self.args.save_only_model and not self._interruption.is_ending
        save()

    def _run_record(self) -> dict[str, Any]:
        """What a checkpoint's manifest says besides the reference: where in the data the run is, the policy's digest,
        and the date that chat templates print."""
        has_optimizer = self._interruption.is_ending or not self.args.save_only_model
        return {
            "place": self._stream_position.record(),
            "policy": policy_digest(self.model),
            "policy_base": None if self._base is None else self._base.record(),
            "engine": self._engine().record(),
            "template_date": self._preparation.template_date,
            "optimizer": optimizer_record(self.optimizer) if has_optimizer else None,
            "unlogged": self._unlogged,
            **self._interruption.record(),
        }

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with keeping_checkpoints(self):  # transformers would delete the last one here so that a kill could halve it
            output = super()._finalize_training(*args, **kwargs)
        best = self.state.best_model_checkpoint
        if best is None and self.args.load_best_model_at_end and self.state.best_global_step:
            logger.warning(
                "load_best_model_at_end=True was asked for, but no checkpoint was saved at the best step, %d: the "
                "model stays that of the last step. Save wherever you evaluate (save_steps=eval_steps, or "
                "save_strategy='best').", self.state.best_global_step,
            )  # fmt: skip
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            leave_only(Path(best))
        return output

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._interruption.evaluating():
            return super()._evaluate(*args, **kwargs)

    def _evaluate_after_step(self) -> None:
        """Evaluates, and saves a checkpoint if it is the best, as at the end of a step where that is due."""
        self.control.should_log, self.control.should_evaluate, self.control.should_save = False, True, False
        untyped: Any = self
        untyped._maybe_log_save_evaluate(None, None, self.model_wrapped, None, self.state.epoch, None, 0.0)

    # --- what is read again -------------------------------------------------------------------------------------------

    def _restore_unlogged(self, of_processes: list[dict[str, Any]]) -> None:
        """What was computed since the last log goes into the next one, as in a run that was not resumed. `of_processes`
        is what a checkpoint records, of each process of the run that wrote it."""
        if not of_processes:
            return
        index, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        own = of_processes[index if len(of_processes) == num_processes else 0]
        mean = sum(part["loss"] for part in of_processes) / len(of_processes)
        loss, metrics, margins = own["loss"], own["metrics"], [own.get("margins", "")]
        if len(of_processes) != num_processes:  # the first process gets all of it: metrics are summed, losses averaged
            loss, parts = mean, of_processes if index == 0 else []
            margins = [part.get("margins", "") for part in parts]
            metrics = {
                name: [sum((part["metrics"][name][i] for part in parts), 0.0) for i in (0, 1)] for name in metrics
            }
        set_unlogged_loss(self, loss, own["step"], mean)
        self._tallies["train"].restore(metrics, self.accelerator.device)
        self._margins["train"].restore(margins)

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

    def _to_resume(self, resume_from_checkpoint: Any) -> Path | None:
        """The checkpoint to resume or to restore, or None. ValueError where it is not as it was saved."""
        checkpoint = agreed_checkpoint(resume_from_checkpoint, self.args.output_dir)
        adopts = self.args.adopt_checkpoint
        if checkpoint is not None:
            check_together(checkpoint, resuming(checkpoint), reads_all=self.is_local_process_zero(), adopts=adopts)
            manifest = recorded(checkpoint)
            names = saved_names(checkpoint, manifest)
            check_engine(checkpoint, Engine.recorded_in(manifest, names), self._engine())
        elif adopts:
            raise ValueError(
                "adopt_checkpoint=True was asked for, but no checkpoint is resumed. Name one in "
                "`train(resume_from_checkpoint=...)`, or drop it."
            )
        return checkpoint

    def _adopt(self, checkpoint: Path) -> None:
        """Records this run's reference in a checkpoint that has no record of its own, where that is asked for. All
        processes raise the ValueError of the one that writes it."""
        if not self.args.adopt_checkpoint or not is_to_be_adopted(checkpoint):
            return
        if self._is_sharded:
            raise ValueError(
                f"{resuming(checkpoint)} with adopt_checkpoint=True, but the weights are sharded, so they cannot be "
                "compared with those in it. Adopt it in a single process."
            )
        message: str | None = None
        steps = self.args.gradient_accumulation_steps
        if self.is_world_process_zero():
            try:
                logger.warning(adopt(checkpoint, self.model, self.reference, self._provenance, batches_per_step=steps))
            except ValueError as error:
                message = str(error)
        message = next(filter(None, gather_object([message])), None)
        if message is not None:
            raise ValueError(message)

    def _record_base(self) -> None:
        """Notes what the policy computes with besides what checkpoints hold. A captured reference has it already."""
        if self._base is None:
            is_recorded = self.reference is not None and not self._is_reference_chosen
            columns = pair_value_columns(self.args)
            data = dataset_digest(self.train_dataset, columns) if self.reference is None else None
            reads_weights = not (is_recorded or self._is_sharded)
            self._base = PolicyBase.of_run(self.model, reads_weights=reads_weights, data=data)

    def _check_base(self, checkpoint: Path) -> None:
        """ValueError where `checkpoint` was written by a run of another base, other adapters or other data."""
        assert self._base is not None
        check_adapters(self.model, checkpoint)
        self._base.check(checkpoint, read_manifest(checkpoint).get("policy_base"))

    def _say_what_starts_afresh(self, checkpoint: Path) -> None:
        """Warns of what the checkpoint lacks for the resumed run to be the uninterrupted one."""
        afresh = starting_afresh(
            saved_names(checkpoint, read_manifest(checkpoint)),
            num_processes=self.args.world_size,
            process=self.args.process_index,
            has_scaler=getattr(self.accelerator, "scaler", None) is not None,
        )
        afresh = list(dict.fromkeys(gather_object(afresh)))
        if afresh and self.is_world_process_zero():
            logger.warning(
                "%s holds no more than the run that wrote it saved (`save_only_model`, other processes). What starts "
                "afresh: %s. So the resumed run is not what the uninterrupted one would be.",
                checkpoint, "; ".join(afresh),
            )  # fmt: skip

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:  # its engine has just loaded the policy
            check_loaded(self.model, Path(checkpoint))
        else:
            check_same_optimizer(Path(checkpoint), read_manifest(Path(checkpoint)).get("optimizer"), self.optimizer)
        content = "the state of the optimizer and of the learning rate's schedule"
        with loading(Path(checkpoint), content, "optimizer.pt and scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with loading(Path(checkpoint), "the scale of fp16's gradients", "scaler.pt"):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with loading(Path(checkpoint), "the random state", "rng_state*.pth"):
                super()._load_rng_state(checkpoint)
        self._interruption.evaluate_if_due()

    @doing("loading a checkpoint", is_long=True)
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        with loading(checkpoint, "the policy", "model or adapter files"):
            if self._load_policy(checkpoint):
                pass
            elif is_adapted(self.model) and not self._is_sharded:
                load_adapters(self.model, checkpoint)
            elif not self._is_sharded and needs_conversion(self.model, checkpoint):
                load_converted(unwrap(self.model), checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_loaded(self.model, checkpoint)

    def _load_best_model(self) -> None:
        """The policy and its reference as they were at the best checkpoint. ValueError where they cannot be loaded."""
        best = best_checkpoint(self.state, Path(str(self.args.output_dir)))
        assert best is not None
        self.state.best_model_checkpoint = str(best)
        request = f"load_best_model_at_end=True was asked for (False ends the run without), and the best one is {best}"
        check_together(best, request, reads_all=self.is_local_process_zero())
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best))
        load_reference(best, self.reference, self._provenance)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does not push: transformers calls this in the middle of a save, and `_save_checkpoint` pushes at its end."""
