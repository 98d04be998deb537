"""`PairTrainer`: the loops of `transformers.Trainer` over batches of pairs.

A batch of pairs has no first dimension that counts: rows, sequences, tokens and pairs are unlike numbers. So the order
of the data, the fillers of last batches, the windows read ahead, the gathering of predictions and the means of the
logs are done here, where transformers would do them by rows.
"""

import contextlib
import logging
import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from holdfast.batch import PairBatch
from holdfast.checkpoint.finite import (
    check_loss,
    check_steps,
    update_overflows,
)
from holdfast.checkpoint.folder import best_checkpoint
from holdfast.checkpoint.learning_rate import heed_learning_rate
from holdfast.config import DPOConfig
from holdfast.data.collator_check import pair_of_each_row
from holdfast.data.columns import MASK_COLUMNS, SOURCE, TOKENIZED_COLUMNS
from holdfast.data.completions import datasets_by_name
from holdfast.data.layouts.completion_rows import row_per_completion
from holdfast.data.loader.fillers import gather_rows, real_pairs, rows_of_pairs, with_fillers
from holdfast.data.loader.order import order_by_length
from holdfast.data.loader.stream_position import StreamPosition
from holdfast.data.mixing.source_column import WithSources
from holdfast.data.pair_values import pair_value_columns, with_pair_values
from holdfast.data.prepare import Preparation
from holdfast.metrics import Tally, means, motion, tokens_logged
from holdfast.options.rehearsal import rehearse
from holdfast.peers.guard import guarded
from holdfast.peers.phase import doing
from holdfast.policy.full_eval import FullEval
from holdfast.reference.look_ahead import LookAhead
from holdfast.training.by_source import BySource
from holdfast.training.finite_trainer import FiniteTrainer
from holdfast.training.handed_batches import HandedBatch, in_host_memory
from holdfast.training.margins import Margins
from holdfast.training.offloading import offloaded
from holdfast.training_arguments import check_optimizer

logger = logging.getLogger(__name__)


class PairTrainer(FiniteTrainer):
    """Trains, evaluates and logs over batches of pairs. `DPOTrainer` makes the attributes and says what the loss is."""

    args: DPOConfig
    model: nn.Module

    _rows: tuple[Any, Any]
    """The datasets for training and evaluation as they were handed in."""
    _preparation: Preparation
    _pad_token_id: int
    _tallies: dict[str, Tally]
    _by_source: BySource
    _full_eval: FullEval
    _look_ahead: LookAhead
    _stream_position: StreamPosition
    _resumed: Path | None = None
    """The checkpoint that the run was taken up from."""
    _num_pairs_logged: float = 0.0
    """The pairs of all processes that the last log of training was about."""
    _makes_optimizer: bool = False
    """Whether the optimizer is made here, not handed over by the user."""
    _is_real_row: Tensor | None = None
    _handed: HandedBatch | None = None
    """What a subclass's `compute_loss` has; None where the loss is that of `DPOTrainer`."""

    @abstractmethod
    def _pair_batch(self, tensors: Mapping[str, Tensor]) -> PairBatch:
        """The batch that a data collator's tensors stand for, on the device."""

    @abstractmethod
    def _announce(self, datasets: Mapping[str, Any]) -> None:
        """Tells the reference of datasets that it will be asked about."""

    @abstractmethod
    def _heed_hooks(self) -> None:
        """Refuses or says what a script has assigned to the trainer that would not get what it reads."""

    @abstractmethod
    def _handed_out(self, inputs: Any) -> Any:
        """The batch that `compute_loss` gets."""

    def _datasets(self) -> dict[str, Any]:
        return {"train": self.train_dataset} | datasets_by_name(self.eval_dataset)

    def _prepared(self, args: DPOConfig) -> tuple[Any, Any]:
        train_dataset, eval_dataset = self._rows
        with doing("preparing the data", is_long=True), args.main_process_first(desc="preparing the datasets"):
            assert train_dataset is not None  # `checked_arguments` refuses that
            return self._preparation.of(train_dataset, "train"), self._preparation.of_eval(eval_dataset)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        is_by_source = isinstance(self.data_collator, WithSources)
        names = [*TOKENIZED_COLUMNS, *MASK_COLUMNS, *pair_value_columns(self.args), *([SOURCE] if is_by_source else [])]
        self._signature_columns = list(dict.fromkeys(names))

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **kwargs: Any) -> Any:
        self._heed_hooks()
        filled = with_fillers(dataset, batch_size, self.accelerator)
        collator = self.data_collator
        complete = in_host_memory(self, pair_of_each_row(collator, self.args.world_size))
        is_training = bool(kwargs.get("is_training"))
        self.data_collator = with_pair_values(complete, self.args, is_training=is_training)
        if not is_training:
            keeps = not self.args.remove_unused_columns
            self.data_collator = self._by_source.collator(self.data_collator, dataset, description, keeps_column=keeps)
        try:
            return super()._get_dataloader(filled, description, batch_size, **kwargs)
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy == "group_by_length":
            return order_by_length(self.train_dataset if train_dataset is None else train_dataset, self.args)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy == "group_by_length":  # of training; transformers would want `input_ids`
            return SequentialSampler(eval_dataset) if isinstance(eval_dataset, Dataset) else None
        return super()._get_eval_sampler(eval_dataset)

    def _real_pairs(self, batch: PairBatch) -> tuple[PairBatch, bool]:
        drops_last = self.args.dataloader_drop_last
        return real_pairs(batch, self.accelerator, is_training=self.model.training, drops_last=drops_last)

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`. ValueError where the update of a step is beyond fp32, which torch calls a
        RuntimeError."""
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            groups: list[dict[str, Any]] = getattr(self.optimizer, "param_groups", [{}])
            rate, step = groups[0].get("lr"), self.state.global_step + 1
            overflow = update_overflows(error, learning_rate=rate, step=step, folder=self._folder)
            if overflow is None:
                raise
            raise overflow from error

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """See `transformers.Trainer.get_batch_samples`; batches may carry the reference's log-probs."""
        if self.state.global_step >= self.state.max_steps:  # resumed after its last step, transformers takes another
            self.control.should_training_stop = True
            return [], None
        ahead = self._look_ahead.of_training(epoch_iterator, self.state)
        with doing("reading data", is_long=True):
            samples, num_items = super().get_batch_samples(ahead, num_batches, device)
        self._stream_position.advance(epoch_iterator, len(samples))
        return samples, num_items

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self.lr_scheduler is None:
            rehearse(self.args, num_steps=max_steps)
        epochs_and_batches = super()._init_training_state(max_steps, *args, **kwargs)
        if self.args.load_best_model_at_end:
            best = best_checkpoint(self.state, Path(str(self.args.output_dir)), self._resumed)
            self.state.best_model_checkpoint = str(best) if best is not None else None
        if not isinstance(self.train_dataset, IterableDataset):
            return epochs_and_batches
        return self._stream_position.num_passes, self._stream_position.num_batches

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.create_optimizer`. ValueError where it has none of the policy's tensors."""
        self._makes_optimizer = self._makes_optimizer or self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._is_sharded:
            check_optimizer(self.optimizer, self.model)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._makes_optimizer:
            return
        before = heed_learning_rate(self.args.learning_rate, self.optimizer, self.lr_scheduler)
        if before is not None and self.is_world_process_zero():
            logger.warning(
                "The run goes on with learning_rate=%g, as asked; %s was written with %g.",
                self.args.learning_rate,
                checkpoint,
                before,
            )

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.training_step`; with `activation_offloading` activations wait in host memory."""
        if self.reference is not None:
            self.reference.before_policy_changes()
        with offloaded(self.model) if self.args.activation_offloading else contextlib.nullcontext():
            loss = super().training_step(model, self._handed_out(inputs), *args, **kwargs)
        self._step_record.add_loss(loss, self.state.global_step + 1)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        self._step_record.add_gradient_norm(grad_norm, self.state.global_step)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @guarded("evaluating")
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics on `eval_dataset` (default: the trainer's), prepared like those; a dict gives those of each part.
        ValueError where one is no finite number."""
        if self.is_in_train:
            check_steps(self._first_break(), folder=self._folder)
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._preparation.of_eval(eval_dataset)
            self._announce(datasets_by_name(eval_dataset))
            if isinstance(eval_dataset, dict):
                metrics: dict[str, float] = {}
                for name, part in eval_dataset.items():
                    metrics |= super().evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                return metrics
        chosen: Any = eval_dataset
        metrics = super().evaluate(chosen, ignore_keys, metric_key_prefix)
        self._check_numbers(metrics, "The evaluation")  # callbacks may have changed some
        return metrics

    @guarded("predicting")
    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """See `transformers.Trainer.predict`; `test_dataset` is prepared like the others."""
        test_dataset = self._preparation.of(test_dataset, "test")
        self._announce({"test": test_dataset})
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluation_loop`; loss and metrics are means over pairs, each counted once."""
        self._tallies["eval"], self._tallies["handed"], self._margins["eval"] = Tally(), Tally(), Margins()
        self._by_source.begin()
        self.gather_function, self._is_real_row = self._gathered, None
        dataloader = self._look_ahead.of_evaluation(dataloader)
        with contextlib.nullcontext() if self.is_in_train else self._full_eval.cast():
            output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = means(self._tallies["eval"].reset(self._sum_over_processes)) | self._margins["eval"].reset()
        metrics |= means(self._tallies["handed"].reset(self._sum_over_processes))
        metrics |= self._by_source.metrics(dataloader.dataset, self._sum_over_processes)
        since_the_log = self._tallies["train"].total("num_tokens", self._sum_over_processes)
        metrics["num_tokens"] = tokens_logged(self.state.log_history) + since_the_log
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._check_numbers(output.metrics, "The evaluation")
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """(loss, logits, input ids); the latter two only where `compute_metrics` asks for them."""
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._handed_out(inputs)
            result: Any = self.compute_loss(model, inputs, return_outputs=not prediction_loss_only)
            loss = result if prediction_loss_only else result[0]
            if self._handed is not None:
                self._tally_loss(loss, inputs)
            if prediction_loss_only:
                return loss, None, None
            batch, _ = self._real_pairs(self._pair_batch(row_per_completion(inputs, self._pad_token_id)))
            self._is_real_row = rows_of_pairs(batch)
            return loss, result[1].logits, batch.inputs["input_ids"]

    def _tally_loss(self, loss: Tensor, inputs: Any) -> None:
        """Counts the loss that a subclass returned once for each pair of the batch."""
        batch, _ = self._real_pairs(self._pair_batch(inputs))
        num_pairs = loss.new_full((), batch.num_pairs)
        self._tallies["handed"].add({"loss": (loss.detach() * num_pairs, num_pairs)})

    def _gathered(self, values: Any) -> Any:
        return gather_rows(values, self._is_real_row, self.accelerator)

    # --- logs ---------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `transformers.Trainer.log`; a log of training carries the metrics since the one before. ValueError where
        a number is not finite, or where the loss or the gradient norm of a step was not."""
        if "loss" in logs or "train_loss" in logs:
            logs = self._with_metrics(logs)
        self._check_numbers(logs, "The log")
        super().log(logs, *args, **kwargs)

    def _with_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """A log of training with the metrics since the one before; ValueError where training broke meanwhile."""
        first = self._first_break(ends_period=True)
        totals = self._tallies["train"].reset(self._sum_over_processes)
        num_tokens, _ = totals.pop("num_tokens", (0.0, 0.0))
        _, self._num_pairs_logged = totals.get("loss", (0.0, 0.0))
        metrics = means(totals) | self._margins["train"].reset()
        loss = metrics.pop("loss", 0.0)
        if "train_loss" in logs:  # the end of training, before the best model is loaded and checkpoints are deleted
            self._check_finite(loss, self._folder, first)
        check_steps(first, folder=self._folder)
        check_loss(loss, step=self.state.global_step, folder=self._folder)
        if self._step_record.skips_steps and not math.isfinite(logs.get("grad_norm", 0.0)):
            logs = {name: value for name, value in logs.items() if name != "grad_norm"}  # of a step that was skipped
        if metrics:
            logs = logs | metrics | {"num_tokens": tokens_logged(self.state.log_history) + num_tokens}
        if metrics and self.reference is not None and self.args.sync_ref_model:
            logs |= motion(self.reference, self.state.global_step, self.args.ref_model_sync_steps)
        return logs

    def _sum_over_processes(self, values: Tensor) -> Any:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
