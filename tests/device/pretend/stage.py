"""What torch's Python side says of CUDA on the pretend device, and for how long.

`set_up` is called right after `load`, before transformers is imported. `on_stage` lasts as long as a run on the device:
outside of it a trainer is made on the CPU, with values.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._foreach_utils as foreach
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pretend.device import CUDA, Event, PretendDevice
from pretend.kernels import use_single_kernels
from pretend.pinned import is_pinned, pinned_copy
from pretend.streams import IdleEvent, IdleStream


def set_up() -> None:
    """What stays for the whole process."""
    use_single_kernels()
    torch.cuda._lazy_init = lambda: None
    foreach._foreach_supported_types.append(FakeTensor)  # optimizers and clipping take many tensors at once


def _apply_to_twins(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for tensors without values, whose places in memory torch cannot exchange."""
    for child in module.children() if recurse else ():
        _apply_to_twins(child, function)
    for kind in ("_parameters", "_buffers"):
        for name, tensor in vars(module)[kind].items():
            changed = tensor if tensor is None else function(tensor)
            if changed is not tensor and isinstance(tensor, nn.Parameter):
                changed = nn.Parameter(changed, requires_grad=tensor.requires_grad)
            vars(module)[kind][name] = changed
    return module


def _zeros(tensor: Tensor, observer: Callable[[Event], None]) -> Any:
    """What `tolist` gives: it reads once, however many numbers there are."""
    observer(Event("read", "tolist"))
    return torch.zeros(tensor.shape, dtype=tensor.dtype).tolist()


@contextlib.contextmanager
def on_stage(observer: Callable[[Event], None]) -> Iterator[PretendDevice]:
    """Inside, torch, accelerate and the options say that there is a GPU, and tensors on it are fake."""
    from accelerate.state import AcceleratorState, PartialState

    from holdfast import DPOConfig

    answers: list[Any] = [
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        patch.object(torch.cuda, "current_device", lambda: 0),
        patch.object(torch.cuda, "device_count", lambda: 1),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(torch.cuda, "get_device_name", lambda *_: "a pretend one"),
        patch.object(torch.cuda, "max_memory_allocated", lambda *_: 0),
        patch.object(torch.cuda, "manual_seed_all", lambda _: None),
        patch.object(torch.cuda, "synchronize", lambda *_: observer(Event("read", "synchronize"))),
        patch.object(torch.cuda, "empty_cache", lambda: None),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.accelerator, "is_available", lambda: True),
        patch.object(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
        patch.object(torch.cuda, "set_rng_state", lambda *_: None),
        patch.object(torch.cuda, "current_stream", lambda *_: IdleStream(observer)),
        patch.object(torch.cuda, "default_stream", lambda *_: IdleStream(observer)),
        patch.object(torch.cuda, "stream", lambda *_: contextlib.nullcontext()),
        patch.object(torch.cuda, "Stream", lambda *_, **__: IdleStream(observer)),
        patch.object(torch.cuda, "Event", lambda *_, **__: IdleEvent(observer)),
        patch.object(nn.Module, "_apply", _apply_to_twins),
        patch.object(FakeTensor, "tolist", lambda tensor: _zeros(tensor, observer)),
        patch.object(torch.Tensor, "pin_memory", pinned_copy),
        patch.object(torch.Tensor, "is_pinned", lambda tensor, *_: is_pinned(tensor)),
        patch.object(torch.utils.checkpoint.DefaultDeviceType, "_default_device_type", "cuda"),
        patch.object(DPOConfig, "device", property(lambda _: CUDA)),
        *(patch.dict(state._shared_state, device=CUDA) for state in (PartialState, AcceleratorState)),
    ]
    with contextlib.ExitStack() as stack:
        for answer in answers:
            stack.enter_context(answer)
        yield stack.enter_context(PretendDevice(observer))
