"""Options of `transformers` that would have no effect here: each is refused with the reason and what to do instead.

Options about the optimizer, the schedule, logs, checkpoints, loaders and processes work as in `transformers.Trainer`.
Options about labels, losses of tokens, or changes to the model after its reference was captured mean nothing for
preference pairs, or something else. `tests/unit/test_training_arguments.py` lists every option. One that a newer
`transformers` adds fails there until somebody has looked at it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from datasets import IterableDataset
from torch import nn
from transformers import TrainingArguments


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """An option that is refused where `is_asked(value)` is true, with the reason and the way out."""

    name: str
    reason: str
    instead: str
    is_asked: Callable[[Any], bool] = bool


def _is_parallel(config: Any) -> bool:
    return any(getattr(config, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp"))


REFUSALS = (
    _Refusal(
        name="logging_nan_inf_filter",
        reason="a loss that is NaN or infinite stops the run, so logs have none to leave out",
        instead="Leave it out, or set it to False",
    ),
    _Refusal(
        name="label_smoothing_factor",
        reason="it smooths the labels of tokens, and a pair has none",
        instead="Use label_smoothing, the probability that a pair's label is flipped",
    ),
    _Refusal(
        name="label_names",
        reason="a batch of pairs has no labels: `compute_metrics` gets the input ids as `label_ids`",
        instead="Leave label_names out",
        is_asked=lambda value: value is not None,
    ),
    _Refusal(
        name="include_for_metrics",
        reason="a batch's rows are laid out otherwise than the padded ones that `compute_metrics` gets, and a loss is "
        "of a pair, not of a row",
        instead="Leave it out: the input ids come as `label_ids`, and `eval_loss` is the mean over pairs",
    ),
    _Refusal(
        name="auto_find_batch_size",
        reason="a second try would begin with the policy, the reference and the place in the data that the first one "
        "left",
        instead="Set tokens_per_batch, which computes a batch in parts that fit",
    ),
    _Refusal(
        name="use_liger_kernel",
        reason="it would replace parts of the policy after its reference was captured, and not those of a `ref_model`",
        instead="Apply the kernels to the models before they are handed over (AutoLigerKernelForCausalLM)",
    ),
    _Refusal(
        name="liger_kernel_config",
        reason="it configures use_liger_kernel, which is refused",
        instead="Apply the kernels to the models before they are handed over (AutoLigerKernelForCausalLM)",
        is_asked=lambda value: value is not None,
    ),
    _Refusal(
        name="length_column_name",
        reason="lengths are counted from the token ids of both sides of a pair",
        instead="Leave it out",
        is_asked=lambda value: value != "length",
    ),
    _Refusal(
        name="train_sampling_strategy",
        reason="it goes by the length of one row of tokens, and a pair has several",
        instead="Use 'group_by_length'",
        is_asked=lambda value: value == "batch_rebalance",
    ),
    _Refusal(
        name="parallelism_config",
        reason="tensor, context and sequence parallelism divide a row or its model among processes, and log-probs are "
        "summed over whole rows",
        instead="Use data parallelism or FSDP",
        is_asked=_is_parallel,
    ),
)


def check_heeded(args: TrainingArguments) -> None:
    """ValueError where `args` set an option that would be ignored, or that would give other numbers than it says."""
    for refusal in REFUSALS:
        value = getattr(args, refusal.name, None)
        if value is not None and refusal.is_asked(value):
            raise ValueError(f"{refusal.name}={value!r} was asked for, but {refusal.reason}. {refusal.instead}.")


def check_noise(args: Any) -> None:
    """ValueError where NEFTune's noise would depend on the layout, since it is scaled by the length of rows."""
    if args.neftune_noise_alpha is not None and (args.layout != "padded" or args.tokens_per_batch is not None):
        other = f"layout={args.layout!r}" if args.layout != "padded" else f"tokens_per_batch={args.tokens_per_batch}"
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} was asked for together with {other}, but NEFTune scales "
            "its noise by the length of a row, which would be of many sequences, or of a part of the batch. Use "
            "layout='padded' without tokens_per_batch."
        )


def checked_gathering(args: TrainingArguments) -> Any:
    """The options of `args` for accelerate, with dispatching off. ValueError where gathering would go wrong.

    Dispatching, accelerate's default for streams, splits a batch along its first dimension, but pairs, sequences and
    tokens differ in theirs. transformers puts gathered objects of several batches together wrongly. Processes with
    unlike numbers of batches or pairs cannot step together.
    """
    if args.eval_use_gather_object:
        raise ValueError(
            "eval_use_gather_object=True was asked for, but logits and ids are gathered as tensors, in which "
            "fillers of the last batch are told apart. Leave eval_use_gather_object out."
        )
    options: Any = copy.copy(args.accelerator_config)
    if options.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True was asked for, which cuts a batch's tensors into equal parts, but "
            "those of a batch of pairs have unlike lengths (rows, tokens, pairs). Leave dispatch_batches out."
        )
    if not options.even_batches and args.world_size > 1:
        raise ValueError(
            f"even_batches=False was asked for on {args.world_size} processes, but they step together, and some "
            "would have fewer batches or pairs than others. Leave even_batches out: the pairs that fill up the "
            "last batches count for nothing."
        )
    options.dispatch_batches = False
    return options


def check_metrics(args: TrainingArguments, compute_metrics: Any) -> None:
    """ValueError where an option about `compute_metrics` contradicts whether that function was passed."""
    if compute_metrics is not None and args.prediction_loss_only:
        raise ValueError(
            "prediction_loss_only=True was asked for together with `compute_metrics`, which would never be called. "
            "Drop one of them."
        )
    if compute_metrics is None and args.batch_eval_metrics:
        raise ValueError(
            "batch_eval_metrics=True was asked for without `compute_metrics`, the function that it is about. Pass one, "
            "or leave it out."
        )


def check_stream(args: TrainingArguments, train_dataset: Any) -> None:
    """ValueError where a resumed run would lose its position in a stream."""
    if args.ignore_data_skip and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            "ignore_data_skip=True was asked for with a stream, whose place a checkpoint records: a resumed run would "
            "read its beginning again and record another place. Leave ignore_data_skip out."
        )


def check_optimizers(optimizers: tuple[Any, Any], policy: nn.Module) -> None:
    """ValueError where the user's optimizer would not train the policy, or the user's schedule not steer it."""
    optimizer, schedule = optimizers
    if optimizer is not None:
        check_optimizer(optimizer, policy)
    of_schedule = getattr(schedule, "optimizer", optimizer)
    if schedule is not None and (optimizer is None or of_schedule is not optimizer):
        raise ValueError(
            f"`optimizers` has a {type(schedule).__name__} "
            f"{'without an optimizer' if optimizer is None else 'of another optimizer'}, so the learning rate of the "
            "one that trains would never change. Pass the optimizer that the schedule was made for, or set "
            "lr_scheduler_type."
        )


def check_optimizer(optimizer: Any, policy: nn.Module) -> None:
    """ValueError where none of the optimizer's tensors is a trainable one of the policy."""
    if not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ == "LayerWiseDummyOptimizer":
        return  # an engine's, or one that stands for an optimizer per layer
    trainable = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if not any(id(tensor) in trainable for tensor in tensors):
        raise ValueError(
            f"The optimizer ({type(optimizer).__name__}) has {len(tensors)} tensors, none of which is among the "
            f"policy's {len(trainable)} trainable ones, so nothing would train. Make it from the parameters of the "
            "model that is handed over, after its adapter was added (without `peft_config`), or leave it out and set "
            "`optim`."
        )
