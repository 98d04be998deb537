"""Checks that no NaN or infinity is saved: in the policy, the optimizer, a moved reference or the loss.

They run before a checkpoint is written and at the end of training. So no checkpoint and no trained model holds such
numbers, and no finite checkpoint is deleted in favour of a broken one. The least and the largest value of each tensor
are computed on its device and read all at once. Given up: finding the step at which it happened, since a check at every
step would wait for the device.
"""

import math
from collections.abc import Container, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from holdfast.checkpoint.folder import complete_checkpoints
from holdfast.reference.reference import Reference

_NUM_NAMED = 3
"""How many of the broken tensors an error message names."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES_OF_8_BITS = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    if hasattr(torch, name)
)


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold NaN or infinity. Integers and packed numbers hold neither. Of a sharded tensor
    this process's shard is read; a tensor without storage is not read."""
    by_device: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in tensors:
        for values in _plain(tensor.detach()):
            names, bounds = by_device.setdefault(values.device, ([], []))
            names.append(name)
            bounds.append(_bounds(values))
    broken: list[str] = []
    for names, bounds in by_device.values():
        flags = torch.stack(bounds).isfinite().all(1).tolist()
        broken += [name for name, is_finite in zip(names, flags, strict=True) if not is_finite]
    return list(dict.fromkeys(broken))


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain floating-point tensors that `tensor` is made of."""
    if hasattr(tensor, "__tensor_flatten__"):  # sharded, or quantised by torchao
        composite: Any = tensor
        names, _ = composite.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(tensor, name))
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
    """The tensors of a reference that has moved, as a checkpoint holds them."""
    if reference is not None and reference.version > 0:
        for name, tensor in reference.state_dict().items():
            yield f"the moved reference's `{name}`", tensor


def infinite_buffers(policy: nn.Module) -> frozenset[str]:
    """The names of buffers that are infinite before training begins, and may stay so: they are masks."""
    return frozenset(not_finite((name, tensor) for name, tensor in policy_tensors(policy) if "'s buffer `" in name))


def check_finite(
    *,
    policy: nn.Module,
    optimizer: Any,
    reference: Reference | None,
    loss: float,
    masks: Container[str],
    step: int,
    folder: Path,
) -> None:
    """ValueError on all processes where, on any of them, a tensor of policy, optimizer or reference is not finite, or
    the mean `loss` since the last log. Buffers named in `masks` (see `infinite_buffers`) may be infinite.

    The message names the tensors, and the last complete checkpoint in `folder`.
    """
    tensors = chain(policy_tensors(policy), optimizer_tensors(optimizer, policy), reference_tensors(reference))
    broken = ["the loss"] if not math.isfinite(loss) else []
    broken += not_finite((name, tensor) for name, tensor in tensors if name not in masks)
    broken = list(dict.fromkeys(gather_object(broken)))
    if not broken:
        return
    others = f" (and {len(broken) - _NUM_NAMED} more)" if len(broken) > _NUM_NAMED else ""
    raise ValueError(
        f"A checkpoint or a trained model must be finite; at step {step}, NaN or infinity is in "
        f"{', '.join(broken[:_NUM_NAMED])}{others}. Nothing was written or deleted. {_remedy(step, folder)}"
    )


def check_loss(loss: float, *, step: int, folder: Path) -> None:
    """ValueError where the mean loss since the last log is NaN or infinite."""
    if not math.isfinite(loss):
        value = "NaN" if math.isnan(loss) else "infinite"
        raise ValueError(f"The loss is {value} at step {step}; a loss must be finite. {_remedy(step, folder)}")


def _remedy(step: int, folder: Path) -> str:
    """The last sentence of the messages: what to change, and which checkpoint to resume."""
    lower = "Lower the learning rate, or train in bf16 or fp32 rather than fp16"
    before = [path for path in complete_checkpoints(folder) if int(path.name.rpartition("-")[2]) <= step]
    if not before:
        return f"{lower}, and start again: there is no complete checkpoint in {folder}."
    return f"{lower}, and resume from {before[-1]}, the last complete checkpoint."
