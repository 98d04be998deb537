"""A policy and an optimizer in parts, saved and read as those of one process.

Weights that are spread over processes are gathered one tensor at a time, and only the processes that write keep them.
So the files are those of a run in one process, and a run with any number of processes, sharded or not, reads them: each
process takes its own part of each tensor. The cost is host memory for the whole state in the process that writes, and
in one process of each machine at a time where an optimizer's state is read. Given up: optimizers that keep tensors of
their own in each process.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from holdfast.policy.adapters import is_adapted
from holdfast.policy.sharding import cut_like, give_back, is_part, own_part, shape_of, whole


def whole_policy(policy: nn.Module, *, keeps: bool) -> dict[str, Tensor]:
    """The state dict of `policy` with whole tensors in host memory; of a PEFT model only what belongs to its adapters,
    and what trains. Empty without `keeps`. Collective."""
    give_back(policy)
    state: dict[str, Any] = policy.state_dict()
    by_name = dict(policy.named_parameters(remove_duplicate=False))
    names = _names_of_adapters(policy, state) if is_adapted(policy) else state.keys()
    first_names: dict[int, str] = {}
    kept: dict[str, Tensor] = {}
    for name in names:
        first = first_names.setdefault(id(by_name.get(name, name)), name)
        value = whole(state[name]).cpu() if first == name else kept.get(first)  # tied tensors are gathered once
        if keeps and value is not None:
            kept[name] = value
    return kept


def _names_of_adapters(policy: PeftModel, state: Mapping[str, Tensor]) -> list[str]:
    """The entries of the state dict that peft saves of the policy's adapters, and the trainable ones."""
    saved = {
        id(tensor)
        for adapter in policy.peft_config
        for tensor in get_peft_model_state_dict(policy, state_dict=dict(state), adapter_name=adapter).values()
    }
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return [name for name, tensor in state.items() if id(tensor) in saved or name in trainable]


def put_whole(target: Tensor, value: Tensor, name: str) -> None:
    """Writes the whole `value` over `target`, or this process's part of it over its part. ValueError where the shapes
    differ."""
    if shape_of(target) != value.shape:
        raise ValueError(f"{name} has the shape {list(value.shape)}, and {list(shape_of(target))} in the policy")
    with torch.no_grad():
        own_part(target).copy_(cut_like(value, target))


def load_files(state: Mapping[str, Tensor], files: Iterable[Path]) -> None:
    """Writes the tensors of safetensors files over those of the same names in `state`. One tensor of a file is in
    memory at a time."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in set(opened.keys()) & state.keys():
                put_whole(state[name], opened.get_tensor(name), name)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def whole_optimizer(optimizer: Any, *, keeps: bool) -> dict[str, Any]:
    """The state dict of `optimizer` with whole tensors in host memory; empty without `keeps`. Collective. ValueError
    where a process has a tensor of its own for a part."""
    state = optimizer.state_dict()
    parameters = _parameters(optimizer)
    kept: dict[int, dict[str, Any]] = {}
    for index, entries in sorted(state["state"].items()):
        own: dict[str, Any] = {}
        for name, value in sorted(entries.items()):
            if isinstance(value, Tensor):
                _check_is_shared(parameters[index], name, value)
                value = whole(value).cpu()
            own[name] = value
        if keeps:
            kept[index] = own
    return {"state": kept, "param_groups": state["param_groups"]} if keeps else {}


def cut_optimizer(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole state dict with this process's part of each tensor, for `optimizer`. No other process is asked."""
    parameters = _parameters(optimizer)
    cut = {
        index: {name: _cut(value, parameters[index]) for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": cut}


def _parameters(optimizer: Any) -> list[Tensor]:
    """The optimizer's parameters, in the order of the numbers that a state dict has for them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _cut(value: Any, parameter: Tensor) -> Any:
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    part = cut_like(value, parameter).clone()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _check_is_shared(parameter: Tensor, name: str, value: Tensor) -> None:
    if is_part(parameter) and not is_part(value) and value.numel() > 1:
        raise ValueError(
            f"A checkpoint with whole state dicts was to be written, but the optimizer keeps `{name}` of a sharded "
            f"tensor in a form of its own in each process (shape {list(value.shape)}), which cannot be gathered. Use "
            "another optimizer (`optim`)."
        )
