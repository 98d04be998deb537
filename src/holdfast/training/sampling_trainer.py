"""`SamplingTrainer`: completions of held-out prompts at each evaluation, by the policy and by its reference.

They are generated before the evaluation's own passes, whose speed is measured. Training does not notice: nothing is
drawn at random, and the policy is afterwards in the modes and with the buffers that it had. Win rates are among the
evaluation's metrics, so the best model can be chosen by them. Trackers and the run's record get the texts.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from holdfast.agreement import of_all, raised_together
from holdfast.data.completions import datasets_by_name
from holdfast.options.combinations import check_samples
from holdfast.peers.guard import guarded
from holdfast.peers.phase import doing
from holdfast.policy.positions import num_free_positions
from holdfast.policy.quantised import is_quantised
from holdfast.record.entries import Sample
from holdfast.record.writer import RecordWriter
from holdfast.reference.base import Share
from holdfast.samples.greedy import complete_greedily
from holdfast.samples.prompts import Prompt, choose_prompts, stop_ids, text_of
from holdfast.samples.sampler import Sampler
from holdfast.samples.tables import show_samples
from holdfast.samples.win_rate import WinRateCallback
from holdfast.scoring.causal_lm import unwrap
from holdfast.training.renewable_trainer import RenewableTrainer


class SamplingTrainer(RenewableTrainer):
    """Completes prompts where `generate_samples` asks for that."""

    _sampler: Sampler | None = None
    """None where no prompts are completed."""
    _sampled_metrics: dict[str, float] | None = None
    """What the evaluation that is under way has of its samples."""
    _recalled: Path | None = None
    """The checkpoint of the run whose record was read."""

    @property
    def _judges(self) -> list[WinRateCallback]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, WinRateCallback)]

    def _begin_sampling(self) -> None:
        """Chooses the prompts of this run. ValueError where none of a set can be completed, or where what is asked for
        contradicts itself."""
        args, tokenizer, datasets = self.args, self._preparation.processing_class, datasets_by_name(self.eval_dataset)
        self._check_samples()
        self._sampler = None
        if args.generate_samples == 0:
            return
        models = [self.model, *(self.reference.fixed_modules() if self.reference is not None else ())]
        free = [number for model in models if (number := num_free_positions(model)) is not None]
        most = args.samples_max_new_tokens
        longest = max(min(free) // 2, min(free) - most) if free else None
        prompts: dict[str, list[Prompt]] = {}
        for name, data in datasets.items():
            prompts[name] = choose_prompts(
                data, args.generate_samples, tokenizer, max_length=args.max_length,
                truncation_mode=self._preparation.truncation_mode, longest=longest,
            )  # fmt: skip
            if not prompts[name]:
                raise ValueError(
                    f"generate_samples={args.generate_samples} was asked for, but the first prompts of the data "
                    f"{name!r} have more than {longest} tokens, and the model has {min(free, default=0)} positions for "
                    "prompt and completion. Lower max_length, or set generate_samples=0."
                )
        if free:
            lengths = [len(prompt.ids) for of_data in prompts.values() for prompt in of_data]
            most = min(most, min(free) - max(lengths))
        ends = stop_ids(next(iter(datasets.values())), tokenizer, unwrap(self.model).generation_config)
        in_lockstep = self._is_sharded or (self.reference is not None and self.reference.in_lockstep)
        self._sampler = Sampler(
            prompts, self.reference, partial(self._completed, stop_ids=ends, most=most),
            max_new_tokens=args.samples_max_new_tokens, in_lockstep=in_lockstep,
        )  # fmt: skip
        if self.reference is not None:
            self.reference.before_offload = self._complete_while_there

    def _check_samples(self) -> None:
        """ValueError where there is nothing to complete or to compare."""
        check_samples(
            self.args,
            has_eval_data=self.eval_dataset is not None,
            has_judge=bool(self._judges),
            lacks_reference=self.reference is None and any(judge.against == "reference" for judge in self._judges),
        )

    def _completed(
        self, models: Sequence[Share], prompts: Sequence[Prompt], *, stop_ids: Sequence[int], most: int
    ) -> list[str]:
        completions = complete_greedily(
            models,
            [prompt.ids for prompt in prompts],
            max_new_tokens=most,
            stop_ids=stop_ids,
            pad_id=self._pad_token_id,
            batch_size=self.args.per_device_eval_batch_size,
            autocast=self.accelerator.autocast,
        )
        return [text_of(ids, self._preparation.processing_class) for ids in completions]

    def _complete_while_there(self) -> None:
        """Has the reference complete its prompts where it is let go once the data are scored: a quantised module."""
        assert self.reference is not None
        if self._sampler is not None and any(map(is_quantised, self.reference.fixed_modules())):
            with doing("generating samples", is_long=True):
                self._sampler.complete_by_reference()

    # --- an evaluation ------------------------------------------------------------------------------------------------

    @guarded("evaluating")
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See `transformers.Trainer.evaluate`. Of the trainer's own evaluation sets, prompts are completed before."""
        self._check_samples()  # a callback may have been added meanwhile
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        is_own = eval_dataset is None or isinstance(eval_dataset, str)
        if self._sampler is None or not is_own or name not in self._sampler.prompts:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        samples = self._samples(self._sampler, name)
        self._sampled_metrics = self._win_rates(samples)
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._sampled_metrics = None
        if self.is_world_process_zero():
            show_samples(samples, self.callback_handler.callbacks)
        return metrics

    def _samples(self, sampler: Sampler, name: str) -> list[Sample]:
        model: nn.Module = self.model
        if self._resumed is not None and self._recalled != self._resumed:
            self._recalled, record = self._resumed, self._sample_record()
            sampler.recall(of_all([] if record is None else [*record.samples()])[0], self.state.global_step)
        with doing("generating samples", is_long=True):
            samples, is_new = sampler.samples(name, self.state.global_step, model)
        self._last_samples = samples
        if is_new and (record := self._sample_record()) is not None:
            before = {*record.samples()}
            for sample in samples:
                if sample not in before:
                    record.sample(sample)
        return samples

    @abstractmethod
    def _sample_record(self) -> RecordWriter | None:
        """What writes the run's record in this process; None where it writes none."""

    def _win_rates(self, samples: Sequence[Sample]) -> dict[str, float]:
        """The metrics of all judges, in all processes. The first process asks them."""
        metrics: dict[str, float] = {}
        with doing("asking for a judgement of the samples", is_long=True), raised_together():
            for judge in self._judges if self.is_world_process_zero() else ():
                metrics |= judge.metrics(samples)
        return of_all(metrics)[0]

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluation_loop`; with the win rates of the samples."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        own = {f"{metric_key_prefix}_{name}": value for name, value in (self._sampled_metrics or {}).items()}
        output.metrics.update(own)
        return output
