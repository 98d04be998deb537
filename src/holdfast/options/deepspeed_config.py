"""A DeepSpeed config that contradicts the options of the run, or that trains something else than they say.

DeepSpeed clips, steps and schedules by its own config. transformers compares the two late, after forward passes, and
passes over what the config leaves out: without `gradient_clipping` DeepSpeed clips by a default of its own, and without
`lr` its optimizer has a rate of its own. Here every contradiction is found before the first forward pass, and all are
said at once. `"auto"` takes the option's value and never contradicts it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from holdfast.losses.options import shown
from holdfast.options.zero import zero_faults

_OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "adamw": ("adamw_torch", "adamw_torch_fused"),
    "adam": ("adamw_torch", "adamw_torch_fused"),
    "sgd": ("sgd",),
    "adagrad": ("adagrad",),
    "rmsprop": ("rmsprop",),
    "lion": ("lion_32bit",),
}
"""The values of `optim` that mean the same as an optimizer of DeepSpeed."""

_SCHEDULERS: Mapping[str, str] = {
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
_DEFAULT_OPTIM = ("adamw_torch", "adamw_torch_fused")
_DEFAULTS = {"betas": ["adam_beta1", "adam_beta2"], "eps": ["adam_epsilon"], "weight_decay": ["weight_decay"]}
_OF_DEEPSPEED = {"betas": [0.9, 0.999], "eps": [1e-8], "weight_decay": [0.0]}

_OF_CPU = ("DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion")
_KEEP = "Use optim='adamw_torch', or write \"zero_force_ds_cpu_optimizer\": false, and torch's own steps on the host."

_CHANGES = (
    "amp", "data_efficiency", "curriculum_learning", "progressive_layer_drop", "compression_training",
    "quantize_training", "sparse_attention", "sparse_gradients",
)  # fmt: skip
"""Blocks that change what the policy computes, or on which rows, without its reference."""


def check_deepspeed(args: Any, config: Mapping[str, Any]) -> None:
    """ValueError that names every entry of a DeepSpeed config that contradicts `args`, each with what to write."""
    found = [*_clipping(args, config), *_batches(args, config), *_precision(args, config)]
    found += [*_optimizer(args, config), *_offloaded(args, config), *_scheduler(args, config)]
    found += [*_changes(config), *_divisions(config), *zero_faults(config)]
    if found:
        lines = "\n".join(f"- {line}" for line in found)
        raise ValueError(f"The DeepSpeed config was asked for what the options of the run contradict:\n{lines}")


def check_deepspeed_optimizer(config: Mapping[str, Any], optimizers: tuple[Any, Any]) -> None:
    """ValueError where the user's optimizer or schedule would be exchanged for one of DeepSpeed."""
    kind = type(optimizers[0]).__name__
    if optimizers[0] is not None and _exchanges_optimizers(config) and kind not in ("AdamW", "Adagrad", *_OF_CPU):
        raise ValueError(
            f"`optimizers` has a {kind}, but the DeepSpeed config offloads the optimizer, and DeepSpeed would take its "
            f"own Adam in its place. {_KEEP}"
        )
    for name, own in zip(("optimizer", "scheduler"), optimizers, strict=True):
        if own is not None and name in config:
            raise ValueError(
                f"`optimizers` has a {type(own).__name__}, but the DeepSpeed config has a block {name!r}, and "
                "DeepSpeed would take that one. Remove the block, or leave `optimizers` out."
            )


def _clipping(args: Any, config: Mapping[str, Any]) -> Iterator[str]:
    value = config.get("gradient_clipping")
    if value is None:
        yield (
            f"gradient_clipping is not written, so DeepSpeed clips to norm 1 or not at all, by its version, and "
            f'max_grad_norm={args.max_grad_norm:g}. Write "gradient_clipping": "auto".'
        )
    elif value != "auto" and float(value) != float(args.max_grad_norm):
        said = f"gradient_clipping is {value}, and max_grad_norm={args.max_grad_norm:g}"
        yield f'{said}. Write "gradient_clipping": "auto".'


def _batches(args: Any, config: Mapping[str, Any]) -> Iterator[str]:
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    num_pairs = size * steps * args.world_size
    ours = {
        "train_micro_batch_size_per_gpu": (size, f"per_device_train_batch_size={size}"),
        "gradient_accumulation_steps": (steps, f"gradient_accumulation_steps={steps}"),
        "train_batch_size": (num_pairs, f"{args.world_size} processes make batches of {num_pairs}"),
    }
    for name, (number, said) in ours.items():
        value = config.get(name, 1 if name == "gradient_accumulation_steps" else "auto")
        if value != "auto" and value != number:
            is_written = "" if name in config else " where it is not written"
            yield f'{name} is {value}{is_written}, and {said}. Write "{name}": "auto".'


def _precision(args: Any, config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("fp16", "bf16"):
        block = config.get(name)
        is_enabled = block.get("enabled", False) if isinstance(block, Mapping) else "auto"
        is_ours = args.mixed_precision == name
        if is_enabled != "auto" and bool(is_enabled) != is_ours:
            asked = f"{name}.enabled is {str(bool(is_enabled)).lower()}"
            yield f'{asked}, and the run is in {_name(args.mixed_precision)}. Write "enabled": "auto".'


def _name(precision: str) -> str:
    return "fp32" if precision == "no" else precision


def _optimizer(args: Any, config: Mapping[str, Any]) -> Iterator[str]:
    block = config.get("optimizer")
    if not isinstance(block, Mapping):
        return
    remedy = 'Remove the block "optimizer": `optim` works under ZeRO.'
    name, optim = str(block.get("type", "Adam")), OptimizerNames(args.optim).value
    if optim not in (*_DEFAULT_OPTIM, *_OPTIMIZERS.get(name.lower(), ())):
        yield f"optimizer.type is {name!r}, and optim={optim!r}, which DeepSpeed would not read. {remedy}"
    if args.optim_args:
        yield f"there is a block optimizer, and optim_args={args.optim_args!r}, which it would not read. {remedy}"
    if args.weight_decay:
        yield (
            f"there is a block optimizer, and weight_decay={args.weight_decay:g}: DeepSpeed would decay biases and "
            f"norms as well. {remedy}"
        )
    params = block.get("params") or {}
    rates = {"lr": ["learning_rate"], **_DEFAULTS}
    for key, options in rates.items():
        ours = [getattr(args, option) for option in options]
        value = params.get(key, "auto" if key in _OF_DEEPSPEED and _OF_DEEPSPEED[key] == ours else None)
        theirs = list(value) if isinstance(value, list | tuple) else [value]
        if value != "auto" and theirs != ours:
            said = ", ".join(f"{option}={getattr(args, option):g}" for option in options)
            is_ = "is not written" if value is None else f"is {shown(value)}"
            yield f'optimizer.params.{key} {is_}, and {said}. Write "{key}": "auto".'


def _offloaded(args: Any, config: Mapping[str, Any]) -> Iterator[str]:
    """With an offloaded optimizer, accelerate makes DeepSpeed's own Adam of whatever is neither AdamW nor Adagrad."""
    optim = OptimizerNames(args.optim).value
    if _exchanges_optimizers(config) and "optimizer" not in config and optim not in (*_DEFAULT_OPTIM, "adagrad"):
        yield (
            f"zero_optimization.offload_optimizer is on, and optim={optim!r}: DeepSpeed would take its own Adam in its "
            f"place. {_KEEP}"
        )


def _exchanges_optimizers(config: Mapping[str, Any]) -> bool:
    block = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    return block.get("device", "none") != "none" and bool(config.get("zero_force_ds_cpu_optimizer", True))


def _scheduler(args: Any, config: Mapping[str, Any]) -> Iterator[str]:
    block = config.get("scheduler")
    if not isinstance(block, Mapping):
        return
    name, ours = str(block.get("type", "")), SchedulerType(args.lr_scheduler_type).value
    remedy = 'Remove the block "scheduler": lr_scheduler_type works under ZeRO.'
    if ours not in ("linear", _SCHEDULERS.get(name)):
        yield f"scheduler.type is {name!r}, and lr_scheduler_type={ours!r}, which DeepSpeed would not read. {remedy}"
    if args.lr_scheduler_kwargs:
        yield f"there is a block scheduler, and lr_scheduler_kwargs, which it would not read. {remedy}"
    params = block.get("params") or {}
    value = params.get("warmup_max_lr")
    if value != "auto" and value != args.learning_rate and name in _SCHEDULERS:
        is_ = "is not written" if value is None else f"is {value}"
        yield f'scheduler.params.warmup_max_lr {is_}, and learning_rate={args.learning_rate:g}. Write "auto".'


def _changes(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _CHANGES:
        block = config.get(name)
        if block and (not isinstance(block, Mapping) or block.get("enabled", True)):
            yield f"{name} changes what the policy computes, and the reference does not follow it. Remove it."


def _divisions(config: Mapping[str, Any]) -> Iterator[str]:
    """Tensor, sequence and pipeline parallelism of DeepSpeed."""
    sizes = {
        "tensor_parallel.autotp_size": (config.get("tensor_parallel") or {}).get("autotp_size"),
        "sequence_parallel_size": config.get("sequence_parallel_size"),
        "pipeline.stages": (config.get("pipeline") or {}).get("stages"),
    }
    for name, size in sizes.items():
        if isinstance(size, int) and size > 1:
            yield (
                f"{name} is {size}, which divides a row or its model among processes, and log-probs are summed over "
                "whole rows. Remove it: ZeRO-3 divides the weights, and each process keeps rows of its own."
            )
