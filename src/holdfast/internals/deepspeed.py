"""Private names of DeepSpeed: how ZeRO-3 spreads a parameter over processes, and what its engines leave on modules.

ZeRO-3 gives a parameter attributes of its own. `ds_tensor` is the part of its flat values that this process holds, with
padding at the end of the last one. The parameter itself is empty, but while a forward or backward pass has its values
gathered. DeepSpeed is not imported here: a parameter that it spread brings along all that is needed.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.internals.moved import MovedError, looked_up

ENGINE_ATTRIBUTES = {
    "ds_id", "ds_grads_remaining", "ds_recompute_parameters", "ds_inflight_param_registry", "ds_model_granularity",
    "applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn",
}  # fmt: skip
"""The attributes that an engine gives to the modules of a model."""

PARTITIONING_ATTRIBUTES = {"all_parameters", "ds_external_parameters"}
"""The functions that modules get when their parameters are spread."""


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has spread a parameter over processes."""
    return hasattr(tensor, "ds_id")


def num_partitions(parameter: Tensor) -> int:
    """Over how many processes a parameter is spread."""
    return looked_up("deepspeed", parameter, "ds_zero_partition_world_size")


def own_partition(parameter: Tensor) -> Tensor:
    """The flat values of a parameter that this process holds, without padding; they share memory with it."""
    padded = looked_up("deepspeed", parameter, "ds_tensor")
    return padded.detach()[: _bounds(parameter)[1]]


def own_memory(parameter: Tensor) -> None:
    """Moves the values of a parameter that this process holds into memory that nothing else looks at."""
    padded = looked_up("deepspeed", parameter, "ds_tensor")
    padded.data = padded.data.clone()


def partition_of(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of the whole `value` of a parameter, flat. No other process is asked."""
    start, length = _bounds(parameter)
    return value.reshape(-1)[start : start + length]


def all_values(parameter: Tensor, part: Tensor | None = None) -> Tensor:
    """All values of a parameter, in its shape; of another tensor that is spread likewise where its `part` in this
    process is given. Collective."""
    padded = looked_up("deepspeed", parameter, "ds_tensor").detach().to(parameter.device)
    if part is not None:
        padded = torch.zeros_like(padded, dtype=part.dtype)
        padded[: part.numel()] = part
    parts = [torch.empty_like(padded) for _ in range(num_partitions(parameter))]
    dist.all_gather(parts, padded, group=looked_up("deepspeed", parameter, "ds_process_group"))
    shape = whole_shape(parameter)
    return torch.cat(parts)[: shape.numel()].view(shape)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of all values of a parameter."""
    return looked_up("deepspeed", parameter, "ds_shape")


def release(module: nn.Module) -> None:
    """Frees the values of spread parameters that passes have gathered, or have begun to gather."""
    parameters: Any = [parameter for parameter in module.parameters() if is_partitioned(parameter)]
    in_flight = getattr(module, "ds_inflight_param_registry", {})
    for parameter in parameters:
        if parameter in in_flight:
            in_flight.pop(parameter).wait()
        looked_up("deepspeed", parameter, "ds_active_sub_modules").clear()
        if looked_up("deepspeed", parameter, "ds_status").name == "AVAILABLE":
            parameter.partition()
        if parameter.ds_status.name != "NOT_AVAILABLE" or parameter.numel() > 0:
            raise MovedError("deepspeed", "Parameter.partition", f"it left a parameter {parameter.ds_status.name}")


def spread_like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    """A new parameter with the whole `value`, frozen and spread as `parameter` is. Collective."""
    new = nn.Parameter(value, requires_grad=False)
    looked_up("deepspeed", parameter, "convert_to_zero_parameters")(param_list=[new])
    return new


def forget_engine(module: nn.Module) -> None:
    """Takes from a model what an engine that was destroyed has left on its modules, so that the next one's backward
    pass does not run through the former's hooks."""
    for child in module.modules():
        for name in ENGINE_ATTRIBUTES & vars(child).keys():
            delattr(child, name)
        if type(child._parameters).__name__ == "ZeROOrderedDict":
            child._parameters = dict(child._parameters.items())


def without_engine(module: nn.Module) -> nn.Module:
    """`module`, a copy of one that an engine runs, without that engine's hooks, and without what a module was seen to
    read of others: these are the parameters that the copy began with, and it is about to get its own."""
    for child in module.modules():
        vars(child).pop("_external_params", None)
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = looked_up("torch", child, kind)
            for key in [key for key, hook in hooks.items() if hook.__module__.startswith("deepspeed.")]:
                del hooks[key]
    forget_engine(module)
    return module


def _bounds(parameter: Tensor) -> tuple[int, int]:
    """Where in the flat values of a parameter this process's part begins, and how many values it has."""
    size = looked_up("deepspeed", looked_up("deepspeed", parameter, "ds_tensor"), "ds_numel")
    start = looked_up("deepspeed", parameter, "ds_zero_partition_rank") * size
    return start, max(0, min(size, looked_up("deepspeed", parameter, "ds_numel") - start))
