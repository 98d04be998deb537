"""What a run must not carry on with: a policy, an optimizer, a moved reference or a loss that is NaN or infinite.

Looked at before a checkpoint is written and at the end of training, so that neither a checkpoint nor a trained model
holds such numbers, and none that is finite is deleted for one that is not. Two values of each tensor are computed where
it is, and read together. Given up: finding the step at which it happened. A look at every step would wait for the
device.
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
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALLER = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    if hasattr(torch, name)
)


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold NaN or infinity. Integers and packed numbers have neither; of a sharded
    tensor, this process's part is read; one without storage is not."""
    bounds: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in tensors:
        for values in _plain(tensor.detach()):
            names, found = bounds.setdefault(values.device, ([], []))
            names.append(name)
            found.append(_bounds(values))
    wrong: list[str] = []
    for names, found in bounds.values():
        flags = torch.stack(found).isfinite().all(1).tolist()
        wrong += [name for name, is_finite in zip(names, flags, strict=True) if not is_finite]
    return list(dict.fromkeys(wrong))


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of floating-point numbers that `tensor` is made of."""
    if hasattr(tensor, "__tensor_flatten__"):  # sharded, or quantised by torchao
        of_parts: Any = tensor
        names, _ = of_parts.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(tensor, name))
    elif not tensor.is_meta and tensor.numel() > 0 and tensor.dtype in (*_DTYPES, *_SMALLER):
        yield tensor


def _bounds(values: Tensor) -> Tensor:
    """The least and the largest value, or NaN where there is any, in fp32: no mask as large as `values` is made."""
    if values.dtype in _SMALLER:
        values = values.half() if "e5m2" in str(values.dtype) else values.bfloat16()
    least, largest = torch.aminmax(values)
    both = torch.stack([least, largest])
    return torch.where(both.isfinite(), 0.0, both).float()


def policy_tensors(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers; of a parameter that DeepSpeed divides, this process's part."""
    for name, parameter in policy.named_parameters():
        yield f"the policy's `{name}`", getattr(parameter, "ds_tensor", parameter)
    for name, buffer in policy.named_buffers():
        yield f"the policy's buffer `{name}`", buffer


def optimizer_tensors(optimizer: Any, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps for each parameter, such as the running means of AdamW."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    for number, (parameter, state) in enumerate(dict(getattr(optimizer, "state", None) or {}).items()):
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, float):
                value = torch.tensor(value)
            if isinstance(value, Tensor):
                yield f"the optimizer's `{key}` of `{names.get(id(parameter), number)}`", value


def reference_tensors(reference: Reference | None) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint would hold of a reference that has moved."""
    if reference is not None and reference.version > 0:
        for name, tensor in reference.state_dict().items():
            yield f"the moved reference's `{name}`", tensor


def infinite_buffers(policy: nn.Module) -> frozenset[str]:
    """Of a policy that is about to train, the buffers that are infinite as they are: masks."""
    return frozenset(not_finite((name, tensor) for name, tensor in policy_tensors(policy) if "'s buffer `" in name))


def check_finite(
    policy: nn.Module, optimizer: Any, reference: Reference | None, loss: float, masks: Container[str],
    *, step: int, folder: Path,
) -> None:  # fmt: skip
    """ValueError on all processes where a tensor of the three, or the loss since the last log, is not finite on any of
    them; buffers named in `masks` may be. The message names what, and the last complete checkpoint in `folder`."""
    tensors = chain(policy_tensors(policy), optimizer_tensors(optimizer, policy), reference_tensors(reference))
    found = ["the loss"] if not math.isfinite(loss) else []
    found += not_finite((name, tensor) for name, tensor in tensors if name not in masks)
    found = list(dict.fromkeys(gather_object(found)))
    if not found:
        return
    others = f" (and {len(found) - _NUM_NAMED} more)" if len(found) > _NUM_NAMED else ""
    raise ValueError(
        f"A checkpoint or a trained model must be finite; at step {step}, NaN or infinity is in "
        f"{', '.join(found[:_NUM_NAMED])}{others}. Nothing was written or deleted. {_remedy(step, folder)}"
    )


def check_loss(loss: float, *, step: int, folder: Path) -> None:
    """ValueError where the mean loss since the last log is NaN or infinite."""
    if not math.isfinite(loss):
        what = "NaN" if math.isnan(loss) else "infinite"
        raise ValueError(f"The loss is {what} at step {step}; a loss must be finite. {_remedy(step, folder)}")


def _remedy(step: int, folder: Path) -> str:
    """What to do, with the checkpoint to resume."""
    lower = "Lower the learning rate, or train in bf16 or fp32 rather than fp16"
    before = [path for path in complete_checkpoints(folder) if int(path.name.rpartition("-")[2]) <= step]
    if not before:
        return f"{lower}, and start again: there is no complete checkpoint in {folder}."
    return f"{lower}, and resume from {before[-1]}, the last complete checkpoint."
