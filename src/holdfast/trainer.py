"""`DPOTrainer`: the glue between `transformers.Trainer` and the rooms of this house.

A batch's way is `compute_loss`, from top to bottom. What a script may read is the attributes of `transformers.Trainer`
plus `reference`, `null_ref_context` and what `training.script_attributes` lists. The hooks of transformers that are not
about the loss or the reference are in `training`.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from holdfast.agreement import raised_together
from holdfast.arguments import checked_arguments, prepare_device, router_aux_loss_coef
from holdfast.batch import PairBatch
from holdfast.callbacks import SyncCallback
from holdfast.checkpoint.hosts import heed_hosts
from holdfast.checkpoint.manifest import read_manifest
from holdfast.checkpoint.placed import remove_what_a_kill_left
from holdfast.checkpoint.provenance import Provenance
from holdfast.checkpoint.reference_state import load_reference
from holdfast.checkpoint.template_date import recorded_date
from holdfast.config import DPOConfig
from holdfast.data.collator_check import check_masks_are_heeded
from holdfast.data.columns import columns_of_pairs
from holdfast.data.completions import Batching, CompletionsToScore, all_to_score
from holdfast.data.dates import date_of_run
from holdfast.data.inputs import complete_batch
from holdfast.data.layouts.completion_rows import row_per_completion
from holdfast.data.loader.stream_position import StreamPosition
from holdfast.data.loader.to_device import copied_ahead
from holdfast.data.pair_values import check_pair_values
from holdfast.data.prepare import Preparation
from holdfast.data.tokenize import check_vocabulary
from holdfast.losses import PairLogps, implicit_rewards, pair_logps, wpo_weights
from holdfast.metrics import Tally, batch_metrics, metrics_by_source
from holdfast.options.combinations import check_length
from holdfast.options.engines import check_engine
from holdfast.peers.guard import guarded
from holdfast.policy.broadcast import broadcast_unlike_tensors, is_loaded_once
from holdfast.policy.full_eval import FullEval, check_full_eval
from holdfast.policy.positions import check_positions
from holdfast.policy.sharding import is_sharded
from holdfast.policy.tokenizer import load_tokenizer, padding_id
from holdfast.policy.untouched import untouched
from holdfast.reference.audit import checksums
from holdfast.reference.load import RefModel, load_ref_models, ref_model_entries
from holdfast.reference.look_ahead import LookAhead
from holdfast.reference.run_folder import running
from holdfast.reference.user_columns import all_bring_logps, use_user_columns, without_user_columns
from holdfast.scoring.causal_lm import unwrap, vocabulary_size
from holdfast.scoring.token_limit import score_within_limit
from holdfast.training.by_source import BySource
from holdfast.training.global_batch import GlobalBatch
from holdfast.training.handed_batches import batch_hooks
from holdfast.training.hooked_trainer import HookedTrainer
from holdfast.training.interruption import InterruptionCallback
from holdfast.training.makings import Makings, ModelInit, check_model
from holdfast.training.margins import Margins
from holdfast.training.never_called import check_patches
from holdfast.training.startup import Startup
from holdfast.training.unknown_arguments import refusing_unknown_arguments
from holdfast.training.watched_trainer import WatchedTrainer
from holdfast.training_arguments import check_optimizers

logger = logging.getLogger(__name__)


class DPOTrainer(WatchedTrainer):
    """Trains `model` on preference pairs with Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

    `model`: a causal language model, a PEFT model, or the path or hub id of one. `ref_model`: the reference, likewise;
    None for the policy as it starts to train, which is captured from memory; a list of these for their mixture with
    `ref_model_weights`. `args`: `DPOConfig`. `train_dataset`, `eval_dataset`: `datasets` of rows with `prompt`,
    `chosen` and `rejected` (text or messages), with `chosen` and `rejected` that both begin with the prompt, or with
    token ids; for evaluation also a dict of them. `processing_class`: the tokenizer (or a processor with one).
    `peft_config`: trains a fresh adapter. `model_init`, in place of `model`, returns a fresh model for each run, such
    as a trial of a hyperparameter search; its reference is made anew. The others are those of `transformers.Trainer`.

    Raises ValueError or TypeError, before the first forward pass, on whatever of this cannot be right.
    """

    @refusing_unknown_arguments
    @guarded("making the trainer")
    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,
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
        model_init: ModelInit | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        check_model(model, model_init, optimizers)
        ref_model = self._early_ref_model(ref_model)
        args = checked_arguments(
            args, model, ref_model, train_dataset, eval_dataset, data_collator, compute_metrics, callbacks
        )
        args = heed_hosts(self._early_options(args))
        hooks = self._overridden_hooks(args)
        set_seed(args.seed)  # a fresh adapter draws its weights
        self.model_init = model_init
        self._makings = Makings.of(ref_model, quantization_config, peft_config, data_collator, model_init)
        policy = self._makings.policy(model if model is not None else Trainer.call_model_init(self), args)
        check_optimizers(optimizers, policy)
        processing_class, tokenizer = load_tokenizer(processing_class, policy, args)
        num_ids = vocabulary_size(unwrap(policy))
        check_vocabulary(tokenizer, num_ids)
        self._pad_token_id = padding_id(tokenizer, args.pad_token)
        with raised_together():
            self._first_checksums = checksums(policy) if args.process_index == 0 or not is_loaded_once() else {}
        self._rows = train_dataset, eval_dataset
        date = date_of_run(tokenizer, args.template_date, recorded_date(args), self._rows, args.columns)
        self._preparation = Preparation.of_options(args, tokenizer, vocab_size=num_ids, template_date=date)
        prepared, prepared_eval = self._prepared(args)
        check_length(args, prepared)
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or self._make_collator(args, hooks),
            train_dataset=prepared,
            eval_dataset=prepared_eval,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        check_engine(args, self.accelerator, optimizers)
        self.model_init, self._is_fresh = model_init, model_init is not None  # transformers has None: it got a model
        self._begin_handing_out(hooks)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: gradient accumulation divides it
        self._tallies = {"train": Tally(), "eval": Tally(), "handed": Tally()}
        self._margins = {"train": Margins(), "eval": Margins()}
        self._begin_watching()
        self._begin_with(policy, ref_model)

    def _begin_with(self, policy: nn.Module, ref_model: RefModel | Sequence[RefModel]) -> None:
        """Makes all that a run of this policy needs: its reference, and what callbacks do with it."""
        self._place_policy(policy)
        self._by_source = BySource(is_main=self.is_world_process_zero())
        self._router_coef = router_aux_loss_coef(unwrap(policy), self.args)
        self._global_batch = GlobalBatch(self.args, self.accelerator, has_router=self._router_coef != 0)
        self._is_reference_chosen = ref_model_entries(ref_model) != [None] or self.args.ref_adapter_name is not None
        self._make_reference(load_ref_models(ref_model, self.args))
        if hasattr(unwrap(policy), "add_model_tags"):
            unwrap(policy).add_model_tags(list(self._tag_names))
        self._interruption = InterruptionCallback(self)
        self.add_callback(self._interruption)  # the last one: it ends a step

    def _place_policy(self, policy: nn.Module) -> None:
        prepare_device(self.args)
        self._full_eval = FullEval(policy)
        is_spread = self._has_engine or is_sharded(policy)
        if check_full_eval(self.args, policy, is_sharded=is_spread) and not self.is_model_parallel:
            self._move_model_to_device(policy, self.args.device)  # transformers would do so when training begins
        if not is_loaded_once() and broadcast_unlike_tensors(policy):
            self._first_checksums = checksums(policy)
        self._begin_engine(policy)
        if is_sharded(policy):  # each process has a part of what was summed before
            self._first_checksums = checksums(policy)

    def _make_reference(self, ref_models: list[nn.Module | None]) -> None:
        self._startup = Startup(
            policy=self.model,
            args=self.args,
            accelerator=self.accelerator,
            first_checksums=self._first_checksums,
        )
        if hasattr(self.data_collator, "max_length"):  # a user's own may cut rows to any length
            longest, is_main = self.data_collator.max_length, self.is_world_process_zero()
            check_positions([self.model, *ref_models], self._datasets(), longest, is_main=is_main)
        self.reference = self._startup.make_reference(
            ref_models,
            self.train_dataset,
            is_stream=isinstance(self.train_dataset, IterableDataset),
            brings_logps=all_bring_logps(self._datasets()),
            layout=self._layout_name,
        )
        self.data_collator = self._startup.choose_layout(self.data_collator, self._first_rows, self._pair_batch)
        self._begin_holding(self._first_rows, self._startup.longest_row)
        self._begin_sampling()
        self._announce(self._datasets())
        self._look_ahead = LookAhead(self.reference, self.accelerator, self._pair_batch, self.args, self._as_reference)
        if self.reference is not None and self.args.sync_ref_model:
            alpha, steps = self.args.ref_model_mixup_alpha, self.args.ref_model_sync_steps
            self.add_callback(SyncCallback(self.reference, alpha, steps, self._syncing))

    # --- the reference ------------------------------------------------------------------------------------------------

    def null_ref_context(self) -> AbstractContextManager[None]:
        """A context in which an implicit reference's policy computes as that reference."""
        return contextlib.nullcontext() if self.reference is None else self.reference.null_ref_context()

    def _announce(self, datasets: Mapping[str, Any]) -> None:
        check_masks_are_heeded(self.data_collator, datasets, self._columns_read)
        check_pair_values(self.args, datasets)
        use_user_columns(self.reference, datasets, self.model, self.args, self.accelerator)
        if self.reference is None:
            return
        with untouched(self.model):
            self.reference.prepare(self.completions_to_score(datasets))

    def completions_to_score(self, datasets: Mapping[str, Any]) -> dict[str, CompletionsToScore]:
        """The completions of prepared datasets by name, in the batches in which a reference scores them ahead; streams
        are left out."""
        batching = Batching(
            collator=self.data_collator,
            pair_batch=self._pair_batch,
            collate=self._collated,
            accelerator=self.accelerator,
        )
        return all_to_score(datasets, self.args, batching)

    def _introduce(self, batch: PairBatch) -> None:
        digest, is_chosen = self._reference_digest(), self._is_reference_chosen
        self._startup.introduce(self.reference, batch, digest=digest, is_users_choice=is_chosen)
        if self.is_in_train:  # at the first batch of weights that are spread
            self._watch.introduced()

    def _settle(self, checkpoint: Path | None) -> None:
        """Records and audits the reference, and brings it to where it was at `checkpoint`, if there is one."""
        self._heed_hooks()
        self._begin_numbers()
        self._global_batch.begin()
        if checkpoint is not None:
            self._print_date_of(checkpoint)
        if self.reference is not None and self._provenance is None:
            self._provenance = Provenance.of_run(
                args=self.args,
                policy=self.model,
                reference_identity=self.reference.identity(),
                train_dataset=self.train_dataset,
                first_pair=self._collated(self._first_rows()[:1]),
                layout=self._layout_name(),
            )
        self._record_base()
        if self.reference is not None:
            self.reference.before_policy_changes()
        if not self._startup.is_introduced and not self._is_sharded:
            self._introduce(self._collated(self._first_rows()))
        if checkpoint is not None:
            self._adopt(checkpoint)
            self._global_batch.begin(read_manifest(checkpoint).get("moments"), checkpoint)
            self._startup.check_resumable(self.train_dataset)
            load_reference(checkpoint, self.reference, self._provenance)
            self._check_base(checkpoint)

    # --- a run --------------------------------------------------------------------------------------------------------

    @guarded("training")
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Audit the reference, then train; see `transformers.Trainer.train`.

        SIGTERM, SIGINT and SIGUSR1 end it after a step, with a complete checkpoint: see `holdfast.interruption`.
        """
        check_patches(self)
        self._resumed = checkpoint = self._to_resume(resume_from_checkpoint)
        trial = kwargs.get("trial", next(iter(args), None))
        self._make_fresh(trial)
        with self._interruption.run(checkpoint, trial):
            return self._train(checkpoint, *args, **kwargs)

    def _train(self, checkpoint: Path | None, *args: Any, **kwargs: Any) -> Any:
        self._settle(checkpoint)
        if checkpoint is not None:
            self._say_what_starts_afresh(checkpoint)
        self._stream_position = StreamPosition(**read_manifest(checkpoint)["place"]) if checkpoint else StreamPosition()
        has_files = self.args.save_strategy != "no" and self.is_world_process_zero()
        if self.is_world_process_zero():
            remove_what_a_kill_left(Path(str(self.args.output_dir)))
        with running(self.args.reference_folder) if has_files else contextlib.nullcontext():
            output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        self._announce({})  # what was scored meanwhile is stored, if anything is
        return output

    def restore(self, checkpoint: str | bool = True) -> None:
        """Policy and reference as they were at `checkpoint`, or at the last complete one, to evaluate them. The trainer
        must be made with what that run began with; ValueError names what differs."""
        found = self._to_resume(checkpoint)
        assert found is not None
        self._settle(found)
        self._say_reference()
        self._load_from_checkpoint(str(found))

    def _run_record(self) -> dict[str, Any]:
        return {**super()._run_record(), "moments": self._global_batch.moments_record()}

    # --- one batch ----------------------------------------------------------------------------------------------------

    def _layout_name(self) -> str:
        return getattr(self.data_collator, "name", "padded")

    def _first_rows(self) -> list[dict[str, Any]]:
        dataset: Any = self.train_dataset
        return list(islice(iter(dataset), self.args.per_device_train_batch_size))

    def _collated(self, rows: list[dict[str, Any]]) -> PairBatch:
        return self._pair_batch(self.data_collator([*map(self._columns_read, rows)]))

    def _columns_read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as the data loader hands it to the collator."""
        names = columns_of_pairs(row) if self.args.remove_unused_columns else row
        return {name: row[name] for name in names}

    def _pair_batch(self, tensors: Mapping[str, Tensor]) -> PairBatch:
        if self._handed is not None:
            tensors = self._handed.taken_back(tensors)
        tensors = complete_batch(without_user_columns(tensors, self.reference), self.data_collator, unwrap(self.model))
        return PairBatch.from_tensors(self._prepare_inputs(copied_ahead(tensors, self.args.device)))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch, with the model's logits where `return_outputs` asks for them."""
        batch = self._pair_batch(inputs)
        is_training = self.model.training
        if not self._startup.is_introduced and is_training and self.state.global_step == 0:
            self._introduce(batch)
        real, is_uneven = self._real_pairs(batch)
        # Before the policy's forward pass, so that no values which it gathered are in the reference's way.
        early = self._reference_logps(real) if self._is_sharded else None
        router_weights = self._global_batch.router_weights(batch, real)
        with self.accelerator.autocast():
            has_router = self._router_coef != 0
            scores = score_within_limit(
                model, batch, self.args.tokens_per_batch, router_logits=has_router, router_weights=router_weights
            )
        batch, scores = real, self._global_batch.with_aux_loss(scores)
        assert (statistics := scores.statistics) is not None  # noqa: RUF018
        policy = pair_logps(scores.logps, batch, self.args.ld_alpha)
        reference = early if self._is_sharded else self._reference_logps(batch)
        is_weighted = self.args.use_weighting
        weights = wpo_weights(scores.logps, statistics.log_sum_sq_probs, batch) if is_weighted else None
        pairs = self._global_batch.compared(
            policy,
            reference,
            weights=(weights, batch.pair_weights),
            margins=batch.pair_margins,
            is_uneven=is_uneven,
            is_training=is_training,
        )
        losses = pairs.losses_of(terms := pairs.terms(self.args))
        term = None if scores.aux_loss is None else self._router_coef * scores.aux_loss
        chosen, rejected = implicit_rewards(policy, reference, self.args.loss_types, self.args.loss_options)
        values = chosen, rejected, policy, reference, scores
        own_losses = pairs.of_this_process(losses if term is None else losses + term)
        loss_terms = pairs.terms_by_name(self.args, terms, term)
        metrics = batch_metrics(batch, own_losses, *values, is_training=is_training, loss_terms=loss_terms)
        self._tallies["train" if is_training else "eval"].add(metrics)
        self._margins["train" if is_training else "eval"].add(chosen, rejected)
        of_sources = None if is_training else self._global_batch.losses_by_source(batch, pairs)
        if of_sources is not None and batch.host_sources is not None:
            of_sources = of_sources if term is None else of_sources + term
            self._by_source.add(batch.host_sources.names, metrics_by_source(batch, of_sources, *values))
        loss = self._global_batch.mean(pairs, losses, term, is_uneven=is_uneven)
        if not return_outputs:
            return loss
        with torch.no_grad():
            rows = self._pair_batch(row_per_completion(inputs, self._pad_token_id))
            return loss, model(**rows.inputs, use_cache=False)

    def _reference_logps(self, batch: PairBatch) -> PairLogps | None:
        if self.reference is None:
            return None
        with self._as_reference():
            return pair_logps(self.reference.logps(batch), batch, self.args.ld_alpha)


HookedTrainer._own_hooks = batch_hooks(DPOTrainer)
