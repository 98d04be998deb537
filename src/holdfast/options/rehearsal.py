"""The optimizer and the schedule of a run, made for one number before anything is loaded.

What an optimizer or a schedule accepts is known only to itself: whether its package is installed, which `optim_args`
and `lr_scheduler_kwargs` it takes, which betas. So both are made for a tensor of one number, and the schedule is asked
for its learning rates. Given up: optimizers that need the model itself (GaLore, APOLLO, LOMO), and those of DeepSpeed;
they are made when training begins.
"""

import math
import warnings
from copy import copy
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

_NEED_THE_MODEL = ("galore", "apollo", "lomo")
_FILL_NOTHING_IN = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
_UNKNOWN_STEPS = 10**6
"""Steps of a run whose length is not known yet."""


def rehearse(args: Any, *, num_steps: int | None = None) -> None:
    """ValueError where the optimizer or the schedule of `args` cannot be made, where the learning rate would be no
    number, or where it would be 0 at every one of the run's `num_steps` (default: `max_steps`, where that is set)."""
    optimizer = _optimizer(args)
    if optimizer is None:
        return
    num_steps = num_steps if num_steps is not None else args.max_steps if args.max_steps > 0 else None
    if num_steps is not None and args.warmup_steps > num_steps:
        raise ValueError(
            f"warmup_steps={args.warmup_steps} was asked for in a run of {num_steps} steps, which would end before the "
            "learning rate is reached. Use fewer, or a fraction of the run (warmup_steps=0.1)."
        )
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(num_steps or _UNKNOWN_STEPS),
            num_training_steps=num_steps or _UNKNOWN_STEPS,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        factors = _factors(schedule, num_steps or _UNKNOWN_STEPS)
    except Exception as error:  # each schedule has its own
        raise ValueError(
            f"{_schedule(args)} was asked for, which cannot be made: {_first_line(error)}. Mend its options."
        ) from error
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors):
        found = next(factor for factor in factors if not (math.isfinite(factor) and factor >= 0))
        raise ValueError(
            f"{_schedule(args)} was asked for, by which the learning rate would be {found * args.learning_rate:g}. "
            "Mend its options."
        )
    if num_steps is not None and args.learning_rate > 0 and factors and not any(factors):
        raise ValueError(
            f"{_schedule(args)} was asked for with warmup_steps={args.warmup_steps}: in a run of {num_steps} steps the "
            "learning rate would be 0 at each, so nothing would train. Use warmup_steps=0, or a longer run."
        )


def _schedule(args: Any) -> str:
    kwargs = f" with lr_scheduler_kwargs={args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
    return f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r}{kwargs}"


def _factors(schedule: Any, num_steps: int) -> list[float]:
    """What the schedule multiplies the learning rate by: at each step of a short run, at some of a long one. Empty for
    a schedule that goes by a metric."""
    factor = next(iter(getattr(schedule, "lr_lambdas", ())), None)
    if factor is None:
        return []
    shown = range(num_steps) if num_steps <= 1_000 else range(0, num_steps, num_steps // 1_000)
    return [float(factor(step)) for step in (*shown, num_steps - 1)]


def _optimizer(args: Any) -> torch.optim.Optimizer | None:
    """The optimizer of `args` for one number; None where the model itself is needed to make it."""
    name = OptimizerNames(args.optim).value
    if args.deepspeed is not None or any(kind in name for kind in _NEED_THE_MODEL):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **kwargs)
            unread = _unread(args, kwargs)
            infinite = [key for key, value in kwargs.items() if isinstance(value, float) and not math.isfinite(value)]
    except Exception as error:  # each optimizer has its own
        asked = f"optim={name!r}{f' with optim_args={args.optim_args!r}' if args.optim_args else ''}"
        raise ValueError(
            f"{asked} was asked for, which cannot be made: {_first_line(error)}. Mend it, or use optim='adamw_torch'."
        ) from error
    if infinite:
        raise ValueError(
            f"optim_args={args.optim_args!r} was asked for, by which {infinite[0]} is {kwargs[infinite[0]]}. Use a "
            "finite number."
        )
    if unread:
        raise ValueError(
            f"optim_args={args.optim_args!r} was asked for, but optim={name!r} does not read {unread[0]!r}. Drop it, "
            "or use another optimizer."
        )
    return optimizer


def _unread(args: Any, kwargs: dict[str, Any]) -> list[str]:
    """The parts of `optim_args` without which the optimizer would be made of the same `kwargs`. None are known of an
    optimizer that fills in defaults."""
    if not args.optim_args or OptimizerNames(args.optim).value not in _FILL_NOTHING_IN:
        return []
    parts, other, unread = args.optim_args.split(","), copy(args), []
    for part in parts:
        other.optim_args = ",".join(rest for rest in parts if rest is not part) or None
        if Trainer.get_optimizer_cls_and_kwargs(other)[1] == kwargs:
            unread.append(part)
    return unread


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
