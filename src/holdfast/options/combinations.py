"""Options of a run that are each in their range, and together cannot be right.

Most of them would be found late otherwise, by an error of a library after models were loaded, or never: as a warmup
that is longer than the run, or an evaluation that never comes.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from accelerate import ParallelismConfig
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.checkpoint import checkpoint
from transformers.trainer_utils import IntervalStrategy

from holdfast.data.shapes.mapping import check_mapping
from holdfast.losses import LOSSES
from holdfast.losses.options import shown
from holdfast.options.engines import check_engine_options
from holdfast.options.ranges import count
from holdfast.options.samples import SampleOptions
from holdfast.policy.init_names import present_names


def refused_by_transformers(error: Exception) -> ValueError:
    """The error for options of which transformers itself has refused one, with what is missing where a package is."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    is_missing = isinstance(error, ImportError) and "deepspeed" in str(error).lower()
    remedy = " Install it: pip install 'holdfast[deepspeed]'." if is_missing else ""
    return ValueError(f"The options were refused by transformers: {kind}{error}{remedy}")


def check_combinations(args: Any) -> None:
    """ValueError where two of the options contradict each other, or where an option that is a mapping holds what it
    cannot."""
    _check_intervals(args)
    _check_loaders(args)
    _check_processes(args)
    _check_mappings(args)
    if args.samples_max_new_tokens != SampleOptions.samples_max_new_tokens and not args.generate_samples:
        raise ValueError(
            f"samples_max_new_tokens={args.samples_max_new_tokens} was asked for with generate_samples=0, which "
            "completes no prompts. Set generate_samples, or drop it."
        )


def _check_intervals(args: Any) -> None:
    for what in ("logging", "save"):
        if getattr(args, f"{what}_strategy") == "steps" and getattr(args, f"{what}_steps") == 0:
            raise ValueError(
                f"{what}_steps=0 was asked for with {what}_strategy='steps'; it counts from 1. Use a larger number, or "
                f"{what}_strategy='no'."
            )
    if args.eval_strategy == "steps" and 0 < args.max_steps < args.eval_delay:
        raise ValueError(
            f"eval_delay={args.eval_delay:g} was asked for with max_steps={args.max_steps}: the run would end before "
            "its first evaluation. Use a smaller eval_delay, or eval_strategy='no'."
        )
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        raise ValueError(
            f"warmup_steps={args.warmup_steps} was asked for with lr_scheduler_type='constant', which has no warmup. "
            "Use 'constant_with_warmup', or drop it."
        )


def _check_loaders(args: Any) -> None:
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(args, name) and args.dataloader_num_workers == 0:
            raise ValueError(
                f"{name}={getattr(args, name)!r} was asked for with dataloader_num_workers=0: batches are loaded in "
                "the process that trains. Set dataloader_num_workers, or drop it."
            )


def _check_processes(args: Any) -> None:
    if not isinstance(args.parallelism_config, ParallelismConfig | None):
        raise ValueError(
            f"parallelism_config={shown(args.parallelism_config)} was asked for; it is an "
            "`accelerate.ParallelismConfig`. Make one, or leave it out."
        )
    check_engine_options(args)


def _check_mappings(args: Any) -> None:
    if args.columns is not None:
        check_mapping(args.columns)
    for name in ("lr_scheduler_kwargs", "accelerator_config", "model_init_kwargs", "ref_model_init_kwargs"):
        for key, number in _numbers(getattr(args, name), name):
            if abs(number) >= 2**63 if isinstance(number, int) else not math.isfinite(number):
                raise ValueError(f"{key}={shown(number)} was asked for; it is a finite number. Use one.")
    for name in ("model_init_kwargs", "ref_model_init_kwargs"):
        if isinstance(kwargs := getattr(args, name), Mapping):
            present_names(kwargs, name)
    option = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    recomputation = getattr(args, f"{option}_kwargs") if getattr(args, option) else None  # named by the version
    known = set(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"}
    if unknown := sorted(map(str, set(recomputation or {}) - known)):
        raise ValueError(
            f"gradient_checkpointing_kwargs={recomputation} was asked for, but torch's checkpoint takes no "
            f"{unknown[0]!r}. Use {', '.join(sorted(known))}."
        )
    accumulation = args.accelerator_config.gradient_accumulation_kwargs
    if accumulation is None:
        return
    try:
        GradientAccumulationPlugin(**accumulation)
    except TypeError as error:
        raise ValueError(
            f"accelerator_config.gradient_accumulation_kwargs={accumulation!r} was asked for, which accelerate does "
            f"not take: {error}. Leave it out, and use gradient_accumulation_steps."
        ) from error
    if "num_steps" in accumulation:
        num_steps = count().of("accelerator_config.gradient_accumulation_kwargs.num_steps", accumulation["num_steps"])
        if args.gradient_accumulation_steps not in (1, num_steps):
            raise ValueError(
                f"accelerator_config.gradient_accumulation_kwargs.num_steps={num_steps} was asked for together with "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}. Drop one of them."
            )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings and lists, each with where it stands."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{name}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def check_losses_compare(args: Any) -> None:
    """ValueError where a loss compares with a reference and there is none, or where an option is about a reference that
    no loss needs and nobody named."""
    if args.reference == "none" and args.needs_reference:
        needy = [name for name in args.loss_types if LOSSES[name].needs_reference]
        raise ValueError(
            f"reference='none' was asked for, but loss_type {needy} compares with a reference. Use a loss that "
            "takes none (simpo, orpo, cpo; cpo with cpo_alpha=0 is the sigmoid loss under a uniform reference), "
            "or leave `reference` at 'auto'."
        )
    is_set = {
        "sync_ref_model": args.sync_ref_model,
        "precompute_ref_log_probs": args.precompute_ref_log_probs,
        "reference_window": args.reference_window is not None,
    }
    option = next(filter(is_set.get, is_set), None)
    is_kept = args.asks_for_reference and args.reference != "none"
    if option is not None and not (args.needs_reference or is_kept):
        raise ValueError(
            f"{option} was asked for, but loss_type {args.loss_types} with reference={args.reference!r} has no "
            "reference to apply it to. Drop it, name a reference to be kept for the metrics (reference='model', "
            "...), or add a loss that compares with one."
        )


def check_evaluation(args: Any, *, has_eval_data: bool) -> None:
    """ValueError where the options ask for evaluations and there are no data to evaluate on."""
    asked = (
        "eval_on_start=True" if args.eval_on_start else f"eval_strategy={IntervalStrategy(args.eval_strategy).value!r}"
    )
    if not has_eval_data and (args.eval_on_start or args.eval_strategy != "no"):
        raise ValueError(
            f"{asked} was asked for, but there are no data to evaluate on. Give some (`eval_dataset`; in a run file "
            "`data.eval`), or drop it."
        )


def check_samples(args: Any, *, has_eval_data: bool, has_judge: bool, lacks_reference: bool) -> None:
    """ValueError where samples are asked for that there are no prompts for, or a win rate without what is compared."""
    if args.generate_samples and not has_eval_data:
        raise ValueError(
            f"generate_samples={args.generate_samples} was asked for, but there are no data to evaluate on, whose "
            "prompts would be completed. Give some (`eval_dataset`; in a run file `data.eval`), or drop it."
        )
    if has_judge and not args.generate_samples:
        raise ValueError(
            "A WinRateCallback was given with generate_samples=0: no completions would be judged. Set generate_samples "
            "to the number of prompts, or drop the callback."
        )
    if has_judge and lacks_reference:
        raise ValueError(
            f"A WinRateCallback was given to compare the policy with its reference, but loss_type {args.loss_types} "
            "needs none, and none was asked for. Name one with `ref_model` or reference='model', which keeps it "
            "beside such a loss, or compare with the data: WinRateCallback(judge, against='chosen')."
        )


def check_batches(args: Any) -> None:
    """ValueError where the batches of training have fewer pairs than a loss compares."""
    size = args.per_device_train_batch_size * args.world_size
    for name in args.loss_types:
        if size < (least := LOSSES[name].least_pairs):
            raise ValueError(
                f"{name} compares the pairs of a batch, of which it needs at least {least}; "
                f"per_device_train_batch_size={args.per_device_train_batch_size} on {args.world_size} process has "
                f"{size}. Raise it; tokens_per_batch limits the memory that a batch takes. Batches of "
                "gradient_accumulation_steps are not compared with each other."
            )


def check_length(args: Any, train_dataset: Any) -> None:
    """ValueError where a run over `train_dataset` would take no optimizer step, since its only batch is dropped."""
    if not isinstance(train_dataset, Sized) or not args.dataloader_drop_last:
        return
    size, num_pairs = args.per_device_train_batch_size * args.world_size, len(train_dataset)
    if num_pairs < size:
        raise ValueError(
            f"dataloader_drop_last=True was asked for with batches of {size} pairs, and the training data have "
            f"{num_pairs}: their only batch would be dropped, so nothing would train. Leave dataloader_drop_last out, "
            "or use smaller batches."
        )
