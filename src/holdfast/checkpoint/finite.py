"""Checks that nothing is saved or reported that is NaN or infinite.

They look at the policy, the optimizer, a moved reference, losses, gradient norms and metrics: before a checkpoint or a
model is written, at logs, around evaluations and at the end of training. So no checkpoint and no trained model holds
such numbers, and no finite checkpoint is deleted in favour of a broken one. The least and the largest value of each
tensor are computed on its device and read all at once. The step at which a loss or a gradient norm broke comes from
`training.step_record`. Given up: the step at which a tensor broke, where neither the loss nor the gradient norm shows
it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from holdfast.checkpoint.folder import complete_checkpoints
from holdfast.policy.sharding import own_part
from holdfast.reference.reference import Reference

Masks = Mapping[str, bool]
"""The names of buffers that may be infinite; True for those that may be NaN as well, as they were at first."""

NO_MASKS: Masks = MappingProxyType({})

_NUM_NAMED = 3
"""How many of the broken tensors or metrics an error message names."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES_OF_8_BITS = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    if hasattr(torch, name)
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """The first optimizer step whose `quantity` (the loss, or the gradient norm) was no finite number but `value`."""

    quantity: str
    value: str
    step: int

    def __str__(self) -> str:
        return f"The {self.quantity} is {self.value} at step {self.step}; it must be finite."


def not_finite(tensors: Iterable[tuple[str, Tensor]], masks: Masks = NO_MASKS) -> list[str]:
    """The names of the tensors that hold NaN or infinity, but for what `masks` allow. Integers and packed numbers hold
    neither. Of a sharded tensor this process's shard is read; a tensor without storage is not read."""
    by_device: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in tensors:
        for values in _plain(own_part(tensor)):
            names, bounds = by_device.setdefault(values.device, ([], []))
            names.append(name)
            bounds.append(_bounds(values))
    broken: list[str] = []
    for names, bounds in by_device.values():
        found = torch.stack(bounds)
        flags = torch.stack([found.isfinite().all(1), found.isnan().any(1)], dim=1).tolist()
        for name, (is_finite, is_nan) in zip(names, flags, strict=True):
            is_allowed = name in masks and (masks[name] or not is_nan)
            broken += [] if is_finite or is_allowed else [name]
    return list(dict.fromkeys(broken))


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain floating-point tensors that `tensor` is made of."""
    if hasattr(tensor, "__tensor_flatten__"):  # quantised by torchao
        composite: Any = tensor
        names, _ = composite.__tensor_flatten__()
        for name in names:
            if isinstance(part := getattr(tensor, name), Tensor):
                yield from _plain(part)
    elif not tensor.is_meta and tensor.numel() > 0 and tensor.dtype in (*_DTYPES, *_DTYPES_OF_8_BITS):
        yield tensor


def _bounds(values: Tensor) -> Tensor:
    """The least and the largest value as fp32 zeros, or as NaN and infinity where they are such. This makes no mask as
    large as `values`."""
    if values.dtype in _DTYPES_OF_8_BITS:
        values = values.half() if "e5m2" in str(values.dtype) else values.bfloat16()
    least, largest = torch.aminmax(values)
    bounds = torch.stack([least, largest])
    return torch.where(bounds.isfinite(), 0.0, bounds).float()


def policy_tensors(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The policy's parameters, then its buffers. Of a parameter that DeepSpeed divides, this process's share."""
    for name, parameter in policy.named_parameters():
        yield f"the policy's `{name}`", getattr(parameter, "ds_tensor", parameter)
    for name, buffer in policy.named_buffers():
        yield f"the policy's buffer `{name}`", buffer


def optimizer_tensors(optimizer: Any, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state for each parameter, such as the running means of AdamW."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    for number, (parameter, state) in enumerate(dict(getattr(optimizer, "state", None) or {}).items()):
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, float):
                value = torch.tensor(value)
            if isinstance(value, Tensor):
                yield f"the optimizer's `{key}` of `{names.get(id(parameter), number)}`", value


def reference_tensors(reference: Reference | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a reference that has moved, as a checkpoint holds them; of each this process's part."""
    if reference is not None and reference.version > 0:
        for name, tensor in reference.parts().items():
            yield f"the moved reference's `{name}`", tensor


def infinite_buffers(policy: nn.Module) -> Masks:
    """The buffers that are infinite before training begins, and may stay so: they are masks."""
    buffers = [(name, tensor) for name, tensor in policy_tensors(policy) if "'s buffer `" in name]
    infinite = not_finite(buffers)
    with_nan = set(not_finite(buffers, dict.fromkeys(infinite, False)))
    return {name: name in with_nan for name in infinite}


def check_finite(
    *,
    policy: nn.Module,
    optimizer: Any,
    reference: Reference | None,
    loss: float,
    masks: Masks,
    step: int,
    folder: Path,
    first: Break | None = None,
) -> None:
    """ValueError on all processes where, on any of them, a tensor of policy, optimizer or reference is not finite, or
    the mean `loss` since the last log, or where there is a `first` step that was not. Buffers named in `masks` (see
    `infinite_buffers`) may be infinite.

    The message names that step, the tensors, and the last complete checkpoint in `folder` from before.
    """
    tensors = chain(policy_tensors(policy), optimizer_tensors(optimizer, policy), reference_tensors(reference))
    broken = ["the loss"] if not math.isfinite(loss) and first is None else []
    broken += not_finite(tensors, masks)
    broken = list(dict.fromkeys(gather_object(broken)))
    if broken:
        since = f"{first} " if first is not None else ""
        remedy = _remedy(step, folder) if first is None else _remedy_before(first, folder)
        raise ValueError(
            f"{since}A checkpoint or a trained model must be finite; at step {step}, NaN or infinity is in "
            f"{_listed(broken)}. Nothing was written or deleted. {remedy}"
        )
    check_steps(first, folder=folder)


def check_model(policy: nn.Module, *, masks: Masks, step: int, folder: Path, is_sharded: bool) -> None:
    """ValueError where a parameter or buffer of the policy is not finite, but for the buffers in `masks`. Processes
    that have a shard each raise together; those that have the whole policy do not ask one another."""
    broken = not_finite(policy_tensors(policy), masks)
    if is_sharded:
        broken = list(dict.fromkeys(gather_object(broken)))
    if broken:
        remedy = _remedy(step, folder) if step > 0 else "Load it again, or look at how it was made."
        raise ValueError(
            f"A model that is saved must be finite; after step {step}, NaN or infinity is in {_listed(broken)}. "
            f"Nothing was written. {remedy}"
        )


def check_steps(first: Break | None, *, folder: Path) -> None:
    """ValueError where the loss or the gradient norm of a step was not finite; `first` is the first such step."""
    if first is not None:
        raise ValueError(f"{first} {_remedy_before(first, folder)}")


def check_loss(loss: float, *, step: int, folder: Path) -> None:
    """ValueError where the mean loss since the last log is NaN or infinite."""
    if not math.isfinite(loss):
        value = "NaN" if math.isnan(loss) else "infinite"
        raise ValueError(f"The loss is {value} at step {step}; it must be finite. {_remedy(step, folder)}")


def check_numbers(
    numbers: Mapping[str, Any],
    where: str,
    *,
    step: int,
    folder: Path,
    policy: nn.Module | None = None,
    masks: Masks = NO_MASKS,
) -> None:
    """ValueError where one of the named numbers is not finite; `where` says in words what they are of. Such a number
    is wrong, and JSON has none. Where there is one, the message also names what of `policy` is not finite."""
    broken = [f"{name}={value}" for name, value in numbers.items() if _is_broken(value)]
    if not broken:
        return
    broken_tensors = not_finite(policy_tensors(policy), masks) if policy is not None else []
    also = f" Also at step {step}, NaN or infinity is in {_listed(broken_tensors)}." if broken_tensors else ""
    remedy = _remedy(step, folder) if step > 0 else _AT_FIRST
    raise ValueError(
        f"{where} has {_listed(broken)} at step {step}; every number in it must be finite.{also} {remedy} A number of "
        "your own that is undefined (from a callback or `compute_metrics`) must be left out."
    )


def check_state(state: Any, *, folder: Path) -> None:
    """ValueError where `trainer_state.json`, made from a `TrainerState`, would have a number that JSON has not."""
    for entry in state.log_history:
        check_numbers(entry, "An entry of the trainer's log_history", step=entry.get("step", 0), folder=folder)
    best = {"best_metric": state.best_metric}
    check_numbers(best, "The trainer's state", step=state.global_step, folder=folder)


def _is_broken(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, int) and not math.isfinite(value)


def _listed(names: list[str]) -> str:
    others = f" (and {len(names) - _NUM_NAMED} more)" if len(names) > _NUM_NAMED else ""
    return f"{', '.join(names[:_NUM_NAMED])}{others}"


def update_overflows(error: RuntimeError, *, learning_rate: Any, step: int, folder: Path) -> ValueError | None:
    """The error to raise where torch's `error` says that a factor of the update of `step` is beyond fp32; None for any
    other error."""
    if "without overflow" not in str(error):
        return None
    return ValueError(
        f"The optimizer's update overflows at step {step}, where the learning rate is {learning_rate}. "
        f"{_remedy(step - 1, folder)}"
    )


_AT_FIRST = (
    "No optimizer step was taken before, so it comes from beta or another option of the losses, or from numbers too "
    "large for the dtype (fp16). Change that, and start again."
)


def _remedy_before(first: Break, folder: Path) -> str:
    return _AT_FIRST if first.step == 1 else _remedy(first.step - 1, folder)


def _remedy(step: int, folder: Path) -> str:
    """The last sentences of the messages: what to change, and which checkpoint, of `step` or before, to resume."""
    before = [path for path in complete_checkpoints(folder) if int(path.name.rpartition("-")[2]) <= step]
    if not before:
        return (
            "Lower the learning rate, or train in bf16 or fp32 rather than fp16, and start again: there is no complete "
            f"checkpoint in {folder} from before."
        )
    last = before[-1]
    return (
        f"Lower the learning rate and resume from {last}, the last complete checkpoint from before, which is finite: "
        f"`trainer.train(resume_from_checkpoint={str(last)!r})`, or `holdfast train` with "
        f"`--set training.resume_from_checkpoint={last}`. A run in fp16 may also start again in bf16 or fp32."
    )
