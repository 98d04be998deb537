"""Weights that are spread over processes: which they are, this process's part of them, and their whole values.

FSDP2 makes a parameter a DTensor, of which each process holds the rows of its own. A module's forward pass gathers the
values that it needs and frees them. The policy is sharded when the trainer is made, before anything is scored, so that
no forward pass of the run needs the whole model in one process. From then on every forward pass is one of all processes
together.

Whatever gathers is a collective call: all processes must make it, in the same order. Given up: FSDP1, whose parameters
are flat.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from holdfast.internals.accelerate import forget_optimizers


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only a part of one of the module's parameters."""
    return any(is_part(parameter) for parameter in module.parameters())


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor stands for values that are spread over processes."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """The values of `tensor` that this process holds, without gradients: all of them, unless they are spread. It shares
    memory with `tensor`."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All values of `tensor`, without gradients. Collective where it is spread."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of the whole `value` of a parameter. No other process is asked."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None).to_local()


def give_back(module: nn.Module) -> None:
    """Frees the values that forward passes have gathered, so that parameters are this process's parts again."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def shard_policy(policy: nn.Module, accelerator: Accelerator) -> None:
    """Shards `policy` in place where `accelerator` is to shard it with FSDP2, as its `prepare` would when training
    begins. `prepare` then finds it sharded."""
    if not accelerator.is_fsdp2 or is_sharded(policy):
        return
    stand_in = torch.optim.SGD(policy.parameters())  # accelerate shards a model together with its optimizer only
    accelerator.prepare(policy, stand_in)
    forget_optimizers(accelerator)
