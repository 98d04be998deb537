"""Weights that are spread over processes: which they are, this process's part of them, and their whole values.

FSDP2 makes a parameter a DTensor, of which each process holds the rows of its own; ZeRO-3 gives each process a stretch
of its flat values (see `internals.deepspeed`). A module's forward pass gathers the values that it needs and frees them.
The policy is sharded when the trainer is made, before anything is scored, so that no forward pass of the run needs the
whole model in one process. From then on every forward pass is one of all processes together.

Whatever gathers is a collective call: all processes must make it, in the same order. Given up: FSDP1, whose parameters
are flat.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, reduce
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from holdfast.internals.accelerate import forget_optimizers
from holdfast.internals.deepspeed import (
    all_values,
    is_partitioned,
    num_partitions,
    own_partition,
    partition_of,
    release,
    whole_shape,
)
from holdfast.internals.fully_shard import replace_tensors, share_tied_parts
from holdfast.internals.torch import end_forward, modules_of, own_parameters, without_hooks
from holdfast.internals.transformers import is_averaged


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only a part of one of the module's parameters. The same on all processes, also where
    a forward pass has left its values gathered."""
    modules = modules_of(module)
    if any(isinstance(child, FSDPModule) for child in modules):
        return True
    return any(is_part(parameter) for child in modules for parameter in own_parameters(child))


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor stands for values that are spread over processes."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def own_part(tensor: Tensor) -> Tensor:
    """The values of `tensor` that this process holds, without gradients: all of them, unless they are spread. It shares
    memory with `tensor`."""
    if is_partitioned(tensor):
        return own_partition(tensor)
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All values of `tensor`, without gradients. Collective where it is spread."""
    return whole_from_part(own_part(tensor), tensor)


def whole_from_part(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole value of which `part` is this process's part, cut as `parameter` is. Collective where it is spread."""
    if is_partitioned(parameter):
        return all_values(parameter, part)
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    on_mesh = part.to(mesh.device_type)  # it may wait in host memory
    return DTensor.from_local(on_mesh, mesh, placements, shape=shape, stride=parameter.stride()).full_tensor()


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of all values of `tensor`."""
    return whole_shape(tensor) if is_partitioned(tensor) else tensor.shape


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of the whole `value` of a parameter. No other process is asked."""
    if is_partitioned(parameter):
        return partition_of(value, parameter)
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    part = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None).to_local()
    return part.to(parameter.device)


def give_back(module: nn.Module) -> None:
    """Frees the values that forward passes have gathered, so that parameters are this process's parts again. A forward
    pass that an exception has ended is over."""
    release(module)
    for child in module.modules():
        if isinstance(child, FSDPModule):
            end_forward(child)
            child.reshard()


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters by name, none of them gathered."""
    give_back(module)
    return dict(module.named_parameters())


def state_of(module: nn.Module) -> dict[str, Any]:
    """The module's state dict, in which parameters stand themselves: a copy would not know which part it is."""
    give_back(module)
    return module.state_dict() | dict(module.named_parameters(remove_duplicate=False))


def put(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Gives `parameter` the values `part` in this process; returns those that it had. No other process is asked.

    Where the parameter is whole, storage is exchanged, which costs nothing. What is spread is gathered from storage
    that belongs to FSDP or DeepSpeed, so there bytes are copied. DeepSpeed's fp32 weights are in other storage.
    """
    if not is_part(parameter):
        former, parameter.data = parameter.data, part
        return former
    own = own_part(parameter)
    former = own.clone()
    own.copy_(part)
    return former


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A context within which the module's parameters are whole, and its forward pass gathers nothing. They are copies,
    which are lost on leaving. Collective where they are spread over processes."""
    if not is_sharded(module):
        yield
        return
    values = {name: whole(parameter) for name, parameter in parameters_of(module).items()}
    with without_hooks(module), standing_in(module, values):
        yield


@contextlib.contextmanager
def standing_in(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A context within which other parameters are in the place of those named in `values`, with these values. They may
    have any shape. The module's parameters themselves are untouched."""
    give_back(module)
    places: list[tuple[nn.Module, str, Any]] = []
    try:
        for path, value in values.items():
            owner, _, name = path.rpartition(".")
            child = module.get_submodule(owner)
            places.append((child, name, getattr(child, name)))
            setattr(child, name, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for child, name, parameter in places:
            setattr(child, name, parameter)


def total(terms: Iterable[tuple[Tensor, float]]) -> float:
    """The sum of values, each of one tensor: of all its numbers, or of this process's part of them. Then it is the sum
    over all parts, and collective."""
    values, num_parts = [], []
    for tensor, value in terms:
        values.append(value)
        num_parts.append(_num_parts(tensor))
    if max(num_parts, default=1) == 1:
        return sum(values)
    state = PartialState()
    own = sum(value * num / state.num_processes for value, num in zip(values, num_parts, strict=True))
    everyones: Any = reduce(torch.tensor(own, dtype=torch.float64, device=state.device), reduction="sum")
    return float(everyones)


def _num_parts(tensor: Tensor) -> int:
    """Into how many unlike parts a tensor is cut."""
    if is_partitioned(tensor):
        return num_partitions(tensor)
    if not isinstance(tensor, DTensor):
        return 1
    sizes = tensor.device_mesh.shape
    return math.prod(size for size, placed in zip(sizes, tensor.placements, strict=True) if isinstance(placed, Shard))


def cut_evenly(value: Tensor) -> Tensor:
    """This process's share of a tensor that all processes have whole: a stretch of its flat values, a copy."""
    state, flat = PartialState(), value.reshape(-1)
    length = math.ceil(len(flat) / state.num_processes)
    return flat[state.process_index * length :][:length].clone()


def joined(share: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor of that shape of which `share` is this process's share. Collective."""
    state, num = PartialState(), math.prod(shape)
    padded = share.new_zeros(math.ceil(num / state.num_processes), device=state.device)
    padded[: len(share)] = share
    everyones: Any = gather(padded)
    return everyones[:num].view(*shape)


def average_gradients(module: nn.Module) -> None:
    """Gives all processes the mean of their gradients of each parameter that is whole in a sharded module, such as an
    adapter that was added after the module was loaded in parts. The engine averages the others. Collective."""
    if not is_sharded(module):
        return
    for parameter in parameters_of(module).values():
        if parameter.requires_grad and not is_part(parameter) and not is_averaged(parameter):
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            mean: Any = reduce(own, reduction="mean")
            parameter.grad = mean


def free_other_parts(module: nn.Module) -> None:
    """Gives this process's parts of a sharded module memory of their own where they lie in a larger one: transformers
    cuts them out of whole tensors, which would stay in memory with them. Weights that it has tied stay tied."""
    parts = [own_part(parameter) for parameter in parameters_of(module).values() if isinstance(parameter, DTensor)]
    if any(part.untyped_storage().nbytes() > 1.5 * part.nbytes for part in parts if part.numel()):
        del parts
        replace_tensors(module, Tensor.clone)
    share_tied_parts(module)


def shard_policy(policy: nn.Module, accelerator: Accelerator) -> None:
    """Shards `policy` in place where `accelerator` is to shard it with FSDP2, as its `prepare` would when training
    begins. `prepare` then finds it sharded. One that was sharded as it was loaded only frees what it does not need."""
    if is_sharded(policy):
        free_other_parts(policy)
        return
    if not accelerator.is_fsdp2:
        return
    shared = _shared_parameters(policy)
    keep_fp32_outputs(accelerator)
    stand_in = torch.optim.SGD(policy.parameters())  # accelerate shards a model together with its optimizer only
    try:
        accelerator.prepare(policy, stand_in)
    except Exception as error:
        if not shared:
            raise
        raise ValueError(
            f"The policy was to be sharded with FSDP2, but its modules share weights, `{shared[0]}` first of "
            f"{len(shared)}, and accelerate could not shard these together: {error}. Train without what shares them, "
            "or with DDP or DeepSpeed."
        ) from error
    forget_optimizers(accelerator)


def _shared_parameters(module: nn.Module) -> list[str]:
    """The other names of parameters that have several."""
    names = {name for name, _ in module.named_parameters()}
    return [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in names]


def keep_fp32_outputs(accelerator: Accelerator) -> None:
    """Has FSDP2 leave what a model returns as it is. In bf16 accelerate would have it rounded, and so the log-probs,
    which are fp32 whatever the weights' dtype."""
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
