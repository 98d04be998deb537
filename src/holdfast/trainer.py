"""`DPOTrainer`: the glue between `transformers.Trainer` and the rooms of this house.

The only subclass of a concrete class here. A batch's way through it is `compute_loss`; what a script may read is the
attributes of `transformers.Trainer` plus `reference`, `ref_model` and `null_ref_context`.
"""
# budget: every override is one hook of transformers

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from holdfast.arguments import check_same_batches, checked_arguments, prepare_device, router_aux_loss_coef
from holdfast.batch import PairBatch
from holdfast.callbacks import SyncCallback
from holdfast.card import TAGS, write_card
from holdfast.checkpoint.finite import check_finite, check_loss, infinite_buffers
from holdfast.checkpoint.folder import best_checkpoint, checkpoint_to_resume, save_complete
from holdfast.checkpoint.policy_state import (
    check_loaded,
    load_adapters,
    load_converted,
    needs_conversion,
    policy_digest,
)
from holdfast.checkpoint.provenance import Provenance
from holdfast.checkpoint.reference_state import load_reference, read_manifest
from holdfast.checkpoint.template_date import date_to_print, recorded_date
from holdfast.config import DPOConfig
from holdfast.data.columns import TOKENIZED_COLUMNS
from holdfast.data.completions import Batching, all_to_score, datasets_by_name
from holdfast.data.dates import date_of_run
from holdfast.data.inputs import complete_batch
from holdfast.data.layouts.choose import choose_layout, make_layout
from holdfast.data.layouts.completion_rows import row_per_completion
from holdfast.data.layouts.trial import LayoutTrial
from holdfast.data.loader.fillers import gather_rows, mean_over_processes, real_pairs, rows_of_pairs, with_fillers
from holdfast.data.loader.order import order_by_length
from holdfast.data.loader.stream_position import StreamPosition
from holdfast.data.prepare import Preparation
from holdfast.data.tokenize import check_vocabulary
from holdfast.losses import implicit_rewards, pair_logps, preference_loss, wpo_weights
from holdfast.metrics import Tally, batch_metrics, means, motion, tokens_logged
from holdfast.policy.adapters import is_adapted
from holdfast.policy.broadcast import broadcast_unlike_tensors
from holdfast.policy.full_eval import FullEval, check_full_eval
from holdfast.policy.independence import Dependence, check_resumable, find_dependence
from holdfast.policy.placement import move_all_to_device
from holdfast.policy.prepare import make_policy
from holdfast.policy.rotations import pin_rotations
from holdfast.policy.tokenizer import load_tokenizer, padding_id
from holdfast.policy.untouched import untouched
from holdfast.reference.audit import audit, checksums, introduction
from holdfast.reference.build import build_reference
from holdfast.reference.load import RefModel, load_ref_models, ref_model_entries
from holdfast.reference.look_ahead import LookAhead
from holdfast.reference.reference import Reference
from holdfast.reference.run_folder import running
from holdfast.reference.user_columns import all_bring_logps, use_user_columns, without_user_columns
from holdfast.scoring.causal_lm import unwrap, vocabulary_size
from holdfast.scoring.token_limit import score_within_limit
from holdfast.training_arguments import check_optimizer, check_optimizers

logger = logging.getLogger(__name__)


class DPOTrainer(Trainer):
    """Trains `model` on preference pairs with Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

    `model`: a causal language model, a PEFT model, or the path or hub id of one. `ref_model`: the reference, likewise;
    None for the policy as it starts to train, which is captured from memory; a list of these for their mixture with
    `ref_model_weights`. `args`: `DPOConfig`. `train_dataset`, `eval_dataset`: `datasets` of rows with `prompt`,
    `chosen` and `rejected` (text or messages), with `chosen` and `rejected` that both begin with the prompt, or with
    token ids; for evaluation also a dict of them. `processing_class`: the tokenizer (or a processor with one).
    `peft_config`: trains a fresh adapter. The other arguments are those of `transformers.Trainer`.

    Raises ValueError or TypeError, before the first forward pass, on whatever of this cannot be right.
    """

    args: DPOConfig
    model: nn.Module
    _is_introduced = False
    _masks: frozenset[str] = frozenset()
    _uploading: Sequence[str] = ()
    _provenance: Provenance | None = None
    reference: Reference | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: RefModel | Sequence[RefModel] = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = checked_arguments(args, model, ref_model, train_dataset, data_collator, compute_metrics)
        set_seed(args.seed)  # a fresh adapter draws its weights
        policy = make_policy(model, args, quantization_config, peft_config)
        check_optimizers(optimizers, policy)
        processing_class, tokenizer = load_tokenizer(processing_class, policy, args)
        check_vocabulary(tokenizer, vocabulary_size(unwrap(policy)))
        self._pad_token_id = padding_id(tokenizer, args.pad_token)
        self._captured = checksums(policy)

        self._rows = train_dataset, eval_dataset
        self._date = date_of_run(tokenizer, args.template_date, recorded_date(args), self._rows)
        self._preparation = Preparation.of_options(
            args, tokenizer, vocab_size=vocabulary_size(unwrap(policy)), template_date=self._date
        )
        prepared, prepared_eval = self._prepared(args)
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or make_layout(args, self._pad_token_id),
            train_dataset=prepared,
            eval_dataset=prepared_eval,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )  # fmt: skip
        self._place_policy(policy)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: gradient accumulation divides it
        self._tallies = {"train": Tally(), "eval": Tally()}
        self._router_coef = router_aux_loss_coef(unwrap(policy), args)
        self._is_reference_chosen = ref_model_entries(ref_model) != [None] or args.ref_adapter_name is not None
        self.reference = self._make_reference(load_ref_models(ref_model, args))
        self._windows = LookAhead(self.reference, self.accelerator, self._pair_batch, args, self._full_eval.as_trained)
        if self.reference is not None and args.sync_ref_model:
            self.add_callback(SyncCallback(self.reference, args.ref_model_mixup_alpha, args.ref_model_sync_steps))
        if hasattr(unwrap(policy), "add_model_tags"):
            unwrap(policy).add_model_tags(list(TAGS))

    def _place_policy(self, policy: nn.Module) -> None:
        prepare_device(self.args)
        self._is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._full_eval = FullEval(policy)
        if check_full_eval(self.args, policy, is_sharded=self._is_sharded) and not self.is_model_parallel:
            self._move_model_to_device(policy, self.args.device)  # transformers would do so when training begins
        if not self._is_sharded and broadcast_unlike_tensors(policy):
            self._captured = checksums(policy)

    def _prepared(self, args: DPOConfig) -> tuple[Any, Any]:
        train_dataset, eval_dataset = self._rows
        with args.main_process_first(desc="preparing the datasets"):
            assert train_dataset is not None  # `checked_arguments` refuses that
            return self._preparation.of(train_dataset, "train"), self._preparation.of_eval(eval_dataset)

    def _print_date_of(self, checkpoint: Path) -> None:  # templates print what they did in the run that wrote it
        found = date_to_print(checkpoint, self._date, self.args.template_date)
        if found == self._date:
            return
        if self.is_world_process_zero():
            logger.warning("Chat templates print the date %s, as in the run that wrote %s.", found, checkpoint)
        self._date = found
        self._preparation = replace(self._preparation, template_date=found)
        self.train_dataset, self.eval_dataset = self._prepared(self.args)
        self._provenance = None
        datasets = {"train": self.train_dataset} | datasets_by_name(self.eval_dataset)
        self.reference = self._announce(self.reference, datasets)

    # --- the reference ------------------------------------------------------------------------------------------------

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's own module where one is held, else None."""
        return self.reference.module if self.reference is not None else None

    @property
    def beta(self) -> float:
        """The strength of the pull to the reference; callbacks that schedule it set it."""
        return self.args.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.args.beta = value

    def null_ref_context(self) -> AbstractContextManager[None]:
        """A context in which an implicit reference's policy computes as that reference."""
        return contextlib.nullcontext() if self.reference is None else self.reference.null_ref_context()

    def _make_reference(self, ref_models: list[nn.Module | None]) -> Reference | None:
        is_stream = isinstance(self.train_dataset, IterableDataset)
        options = self.args.reference_options(is_stream=is_stream)
        if options.way != "none":
            ref_models = move_all_to_device(ref_models, self.accelerator.device)
        models = [self.model, *filter(None, ref_models)]
        datasets = {"train": self.train_dataset} | datasets_by_name(self.eval_dataset)
        self._longest = pin_rotations(
            models, self.args.max_length, self.train_dataset, is_main=self.is_world_process_zero()
        )
        # Log-probs that the data bring along come from other batches: comparing them with the reference is the check.
        self._dependence = None if all_bring_logps(datasets) else self._find_dependence(models)
        check_same_batches(self._dependence, self.args)
        reference = build_reference(
            options,
            self.model,
            ref_models,
            self.accelerator.autocast,
            mixed_precision=self.accelerator.mixed_precision,
            layout=self._layout_name,
            is_quiet=self.args.disable_tqdm or not self.accelerator.is_local_main_process,
            is_main=self.is_world_process_zero(),
            wait_for_all=self.accelerator.wait_for_everyone,
        )
        trial = LayoutTrial(
            models=models,
            first_pairs=self._first_rows,
            pair_batch=self._pair_batch,
            accelerator=self.accelerator,
            is_sharded=self._is_sharded,
        )
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(untouched(model))
            self.data_collator = choose_layout(self.data_collator, self.args, trial)
        return self._announce(reference, datasets)

    def _find_dependence(self, models: list[nn.Module]) -> Dependence | None:
        if self._is_sharded:
            return None
        return find_dependence(models, self.train_dataset, self._longest, self.accelerator.autocast)

    def _layout_name(self) -> str:
        return getattr(self.data_collator, "name", "padded")

    def _first_rows(self) -> list[dict[str, Any]]:
        dataset: Any = self.train_dataset
        return list(islice(iter(dataset), self.args.per_device_train_batch_size))

    def _announce(self, reference: Reference | None, datasets: Mapping[str, Any]) -> Reference | None:
        use_user_columns(reference, datasets, self.model, self.args, self.accelerator)
        if reference is not None:
            batching = Batching(
                collator=self.data_collator,
                pair_batch=self._pair_batch,
                collate=self._collated,
                accelerator=self.accelerator,
            )
            with untouched(self.model):
                reference.prepare(all_to_score(datasets, self.args, batching))
        return reference

    def _introduce(self, batch: PairBatch) -> None:  # in one line, once the audit has found it right on `batch`
        self._is_introduced = True
        if self.reference is None:
            return
        found = "not audited"
        if self.args.reference_audit:
            with untouched(self.model):
                found = audit(
                    self.model,
                    self.reference,
                    batch,
                    autocast=self.accelerator.autocast,
                    mixed_precision=self.accelerator.mixed_precision,
                    first_checksums=self._captured,
                    is_users_choice=self._is_reference_chosen,
                )
        if self.is_world_process_zero():  # at the level that shows where nobody has configured logging
            logger.warning(introduction(self.reference, self._provenance and self._provenance.weights, found))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Audit the reference, then train; see `transformers.Trainer.train`."""
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self._settle(checkpoint)
        self._masks = infinite_buffers(self.model)
        self._stream_position = StreamPosition(**read_manifest(checkpoint)["place"]) if checkpoint else StreamPosition()
        with self._seen_by_other_runs():
            output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        self._announce(self.reference, {})  # what was scored meanwhile is stored, if anything is
        return output

    def _seen_by_other_runs(self) -> AbstractContextManager[None]:
        is_seen = self.args.save_strategy != "no" and self.is_world_process_zero()
        return running(self.args.reference_folder) if is_seen else contextlib.nullcontext()

    def restore(self, checkpoint: str | bool = True) -> None:
        """Policy and reference as they were at `checkpoint`, or at the last complete one, to evaluate them. The trainer
        must be made with what that run began with; ValueError names what differs."""
        found = checkpoint_to_resume(checkpoint, self.args.output_dir)
        assert found is not None
        self._settle(found)
        self._load_from_checkpoint(str(found))

    def _settle(self, checkpoint: Path | None) -> None:
        """The reference recorded, audited, and brought to where it was at `checkpoint`."""
        if checkpoint is not None:
            self._print_date_of(checkpoint)
        is_recorded = checkpoint is not None or self.args.save_strategy != "no"
        if self.reference is not None and self._provenance is None and is_recorded:
            self._provenance = Provenance.of_run(
                args=self.args,
                policy=self.model,
                reference_identity=None if self._is_sharded else self.reference.identity(),
                train_dataset=self.train_dataset,
                first_pair=self._collated(self._first_rows()[:1]),
                layout=self._layout_name(),
            )
        if self.reference is not None:
            self.reference.before_policy_changes()
        if not self._is_introduced and not self._is_sharded:
            self._introduce(self._collated(self._first_rows()))
        if checkpoint is not None:
            check_resumable(self._dependence or self._find_dependence([self.model]))
        if checkpoint is not None:
            load_reference(checkpoint, self.reference, self._provenance)

    def _collated(self, rows: list[dict[str, Any]]) -> PairBatch:
        names = TOKENIZED_COLUMNS if self.args.remove_unused_columns else rows[0].keys()  # as the data loader does
        return self._pair_batch(self.data_collator([{name: row[name] for name in names} for row in rows]))

    # --- one batch ----------------------------------------------------------------------------------------------------

    def _pair_batch(self, tensors: Mapping[str, Tensor]) -> PairBatch:
        tensors = complete_batch(without_user_columns(tensors, self.reference), self.data_collator, unwrap(self.model))
        return PairBatch.from_tensors(self._prepare_inputs(tensors))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch, with the model's logits where `return_outputs` asks for them."""
        batch = self._pair_batch(inputs)
        if not self._is_introduced and self.model.training and self.state.global_step == 0:
            self._introduce(batch)
        with self.accelerator.autocast():
            scores = score_within_limit(model, batch, self.args.tokens_per_batch, router_logits=self._router_coef != 0)
        assert (statistics := scores.statistics) is not None  # noqa: RUF018
        batch, is_filled = self._real_pairs(batch)
        options = {"loss_types": self.args.loss_types, "options": self.args.loss_options}
        policy = pair_logps(scores.logps, batch, self.args.ld_alpha)
        reference = None
        if self.reference is not None:
            with self._full_eval.as_trained():
                reference = pair_logps(self.reference.logps(batch), batch, self.args.ld_alpha)
        is_weighted = self.args.use_weighting
        pair_weights = wpo_weights(scores.logps, statistics.log_sum_sq_probs, batch) if is_weighted else None
        losses = preference_loss(
            policy,
            reference,
            loss_weights=self.args.loss_weights or [1.0] * len(self.args.loss_types),
            pair_weights=pair_weights,
            **options,
        )
        if scores.aux_loss is not None:
            losses = losses + self._router_coef * scores.aux_loss
        chosen, rejected = implicit_rewards(policy, reference, **options)
        tally = self._tallies["train" if self.model.training else "eval"]
        is_training = self.model.training
        tally.add(batch_metrics(batch, losses, chosen, rejected, policy, reference, scores, is_training=is_training))
        loss = mean_over_processes(losses, self.accelerator) if is_filled else losses.mean()
        if not return_outputs:
            return loss
        with torch.no_grad():
            rows = self._pair_batch(row_per_completion(inputs, self._pad_token_id))
            return loss, model(**rows.inputs, use_cache=False)

    def _real_pairs(self, batch: PairBatch) -> tuple[PairBatch, bool]:
        drops_last = self.args.dataloader_drop_last
        return real_pairs(batch, self.accelerator, is_training=self.model.training, drops_last=drops_last)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """See `transformers.Trainer.get_batch_samples`; batches may carry the reference's log-probs."""
        if self.state.global_step >= self.state.max_steps:  # resumed after its last step, transformers takes another
            self.control.should_training_stop = True
            return [], None
        ahead = self._windows.of_training(epoch_iterator, self.state)
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

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.training_step`; with `activation_offloading` activations wait in host memory."""
        if self.reference is not None:
            self.reference.before_policy_changes()
        offload = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        with offload if self.args.activation_offloading else contextlib.nullcontext():
            return super().training_step(*args, **kwargs)

    # --- evaluation and logs ------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics on `eval_dataset` (default: the trainer's), prepared like those; a dict gives those of each part."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._preparation.of_eval(eval_dataset)
            self.reference = self._announce(self.reference, datasets_by_name(eval_dataset))
            if isinstance(eval_dataset, dict):
                metrics: dict[str, float] = {}
                for name, part in eval_dataset.items():
                    metrics |= super().evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                return metrics
        chosen: Any = eval_dataset
        return super().evaluate(chosen, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """See `transformers.Trainer.predict`; `test_dataset` is prepared like the others."""
        test_dataset = self._preparation.of(test_dataset, "test")
        self.reference = self._announce(self.reference, {"test": test_dataset})
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluation_loop`; loss and metrics are means over pairs, each counted once."""
        self._tallies["eval"] = Tally()
        self.gather_function, self._is_real_row = self._gathered, None
        dataloader = self._windows.of_evaluation(dataloader)
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
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            batch, _ = self._real_pairs(self._pair_batch(row_per_completion(inputs, self._pad_token_id)))
            self._is_real_row = rows_of_pairs(batch)
            return loss, outputs.logits, batch.inputs["input_ids"]

    def _gathered(self, values: Any) -> Any:
        return gather_rows(values, self._is_real_row, self.accelerator)

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
            masks=self._masks,
            step=self.state.global_step,
            folder=folder,
        )

    def _sum_over_processes(self, values: Tensor) -> Any:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **kwargs: Any) -> Any:
        return super()._get_dataloader(
            with_fillers(dataset, batch_size, self.accelerator), description, batch_size, **kwargs
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy == "group_by_length":
            return order_by_length(self.train_dataset if train_dataset is None else train_dataset, self.args)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy == "group_by_length":  # of training; transformers would want `input_ids`
            return SequentialSampler(eval_dataset) if isinstance(eval_dataset, Dataset) else None
        return super()._get_eval_sampler(eval_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.create_optimizer`. ValueError where it has none of the policy's tensors."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._is_sharded:
            check_optimizer(self.optimizer, self.model)
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(TOKENIZED_COLUMNS)

    # --- saving -----------------------------------------------------------------------------------------------------

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
        save = partial(super()._save_checkpoint, model, trial)
        push = getattr(self, "push_in_progress", None)
        self._uploading = () if push is None or push.is_done() else self._uploading
        save_complete(
            self,
            checkpoint,
            save,
            reference=self.reference,
            provenance=self._provenance,
            run_record=self._record,
            uploading=self._uploading,
        )
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(checkpoint))
            self._uploading = [*self._uploading, checkpoint.name]

    def _record(self) -> dict[str, Any]:  # what a checkpoint's manifest says besides
        policy = policy_digest(self.model, is_sharded=self._is_sharded)
        return {"place": self._stream_position.record(), "policy": policy, "template_date": self._date}

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
        """Nothing: transformers would push in the middle of a save, and `_save_checkpoint` does once it is complete."""
