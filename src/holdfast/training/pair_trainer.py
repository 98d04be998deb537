"""`PairTrainer`: the loops of `transformers.Trainer` over batches of pairs.

A batch of pairs has no first dimension that counts: rows, sequences, tokens and pairs are unlike numbers. So the order
of the data, the fillers of last batches, the windows read ahead, the gathering of predictions and the means of the
logs are done here, where transformers would do them by rows.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer

from holdfast.batch import PairBatch
from holdfast.checkpoint.finite import check_finite, check_loss
from holdfast.checkpoint.folder import best_checkpoint
from holdfast.config import DPOConfig
from holdfast.data.columns import TOKENIZED_COLUMNS
from holdfast.data.completions import datasets_by_name
from holdfast.data.layouts.completion_rows import row_per_completion
from holdfast.data.loader.fillers import gather_rows, real_pairs, rows_of_pairs, with_fillers
from holdfast.data.loader.order import order_by_length
from holdfast.data.loader.stream_position import StreamPosition
from holdfast.data.prepare import Preparation
from holdfast.interruption import interruptible
from holdfast.metrics import Tally, means, motion, tokens_logged
from holdfast.policy.full_eval import FullEval
from holdfast.reference.look_ahead import LookAhead
from holdfast.reference.reference import Reference
from holdfast.training_arguments import check_optimizer


class PairTrainer(Trainer):
    """Trains, evaluates and logs over batches of pairs. `DPOTrainer` makes the attributes and says what the loss is."""

    args: DPOConfig
    model: nn.Module
    reference: Reference | None = None
    """pi_ref; None where no loss compares with one."""

    _rows: tuple[Any, Any]
    """The datasets for training and evaluation as they were handed in."""
    _preparation: Preparation
    _pad_token_id: int
    _tallies: dict[str, Tally]
    _full_eval: FullEval
    _look_ahead: LookAhead
    _stream_position: StreamPosition
    _is_sharded: bool
    _infinite_masks: frozenset[str] = frozenset()
    _is_real_row: Tensor | None = None

    @abstractmethod
    def _pair_batch(self, tensors: Mapping[str, Tensor]) -> PairBatch:
        """The batch that a data collator's tensors stand for, on the device."""

    @abstractmethod
    def _announce(self, datasets: Mapping[str, Any]) -> None:
        """Tells the reference of datasets that it will be asked about."""

    def _datasets(self) -> dict[str, Any]:
        return {"train": self.train_dataset} | datasets_by_name(self.eval_dataset)

    def _prepared(self, args: DPOConfig) -> tuple[Any, Any]:
        train_dataset, eval_dataset = self._rows
        with args.main_process_first(desc="preparing the datasets"):
            assert train_dataset is not None  # `checked_arguments` refuses that
            return self._preparation.of(train_dataset, "train"), self._preparation.of_eval(eval_dataset)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(TOKENIZED_COLUMNS)

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **kwargs: Any) -> Any:
        filled = with_fillers(dataset, batch_size, self.accelerator)
        return super()._get_dataloader(filled, description, batch_size, **kwargs)

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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """See `transformers.Trainer.get_batch_samples`; batches may carry the reference's log-probs."""
        if self.state.global_step >= self.state.max_steps:  # resumed after its last step, transformers takes another
            self.control.should_training_stop = True
            return [], None
        ahead = self._look_ahead.of_training(epoch_iterator, self.state)
        samples, num_items = super().get_batch_samples(ahead, num_batches, device)
        self._stream_position.advance(epoch_iterator, len(samples))
        return samples, num_items

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        epochs_and_batches = super()._init_training_state(*args, **kwargs)
        if self.args.load_best_model_at_end:
            best = best_checkpoint(self.state, Path(str(self.args.output_dir)))
            self.state.best_model_checkpoint = str(best) if best is not None else None
        if not isinstance(self.train_dataset, IterableDataset):
            return epochs_and_batches
        return self._stream_position.num_passes, self._stream_position.num_batches

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.create_optimizer`. ValueError where it has none of the policy's tensors."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._is_sharded:
            check_optimizer(self.optimizer, self.model)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.training_step`; with `activation_offloading` activations wait in host memory."""
        if self.reference is not None:
            self.reference.before_policy_changes()
        offload = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        with offload if self.args.activation_offloading else contextlib.nullcontext():
            return super().training_step(*args, **kwargs)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @interruptible()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics on `eval_dataset` (default: the trainer's), prepared like those; a dict gives those of each part."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._preparation.of_eval(eval_dataset)
            self._announce(datasets_by_name(eval_dataset))
            if isinstance(eval_dataset, dict):
                metrics: dict[str, float] = {}
                for name, part in eval_dataset.items():
                    metrics |= super().evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                return metrics
        chosen: Any = eval_dataset
        return super().evaluate(chosen, ignore_keys, metric_key_prefix)

    @interruptible()
    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """See `transformers.Trainer.predict`; `test_dataset` is prepared like the others."""
        test_dataset = self._preparation.of(test_dataset, "test")
        self._announce({"test": test_dataset})
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluation_loop`; loss and metrics are means over pairs, each counted once."""
        self._tallies["eval"] = Tally()
        self.gather_function, self._is_real_row = self._gathered, None
        dataloader = self._look_ahead.of_evaluation(dataloader)
        with contextlib.nullcontext() if self.is_in_train else self._full_eval.cast():
            output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = means(self._tallies["eval"].reset(self._sum_over_processes))
        since_the_log = self._tallies["train"].total("num_tokens", self._sum_over_processes)
        metrics["num_tokens"] = tokens_logged(self.state.log_history) + since_the_log
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """(loss, logits, input ids); the latter two only where `compute_metrics` asks for them."""
        with torch.no_grad():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            outputs: Any
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            batch, _ = self._real_pairs(self._pair_batch(row_per_completion(inputs, self._pad_token_id)))
            self._is_real_row = rows_of_pairs(batch)
            return loss, outputs.logits, batch.inputs["input_ids"]

    def _gathered(self, values: Any) -> Any:
        return gather_rows(values, self._is_real_row, self.accelerator)

    # --- logs ---------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `transformers.Trainer.log`; a log of training carries the metrics since the one before."""
        if "loss" in logs or "train_loss" in logs:
            totals = self._tallies["train"].reset(self._sum_over_processes)
            num_tokens, _ = totals.pop("num_tokens", (0.0, 0.0))
            metrics = means(totals)
            loss, step, folder = metrics.pop("loss", 0.0), self.state.global_step, Path(str(self.args.output_dir))
            check_loss(loss, step=step, folder=folder)
            if "train_loss" in logs:  # the end of training, before the best model is loaded and checkpoints are deleted
                self._check_finite(loss, folder)
            if metrics:
                logs = logs | metrics | {"num_tokens": tokens_logged(self.state.log_history) + num_tokens}
            if metrics and self.reference is not None and self.args.sync_ref_model:
                logs |= motion(self.reference, self.state.global_step, self.args.ref_model_sync_steps)
        super().log(logs, *args, **kwargs)

    def _check_finite(self, loss: float, folder: Path) -> None:
        check_finite(
            policy=self.model,
            optimizer=self.optimizer,
            reference=self.reference if self.args.should_save else None,
            loss=loss,
            masks=self._infinite_masks,
            step=self.state.global_step,
            folder=folder,
        )

    def _sum_over_processes(self, values: Tensor) -> Any:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
