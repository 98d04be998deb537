"""Private names of torch: a module's hooks, what it saves, dropout's base class, the wrapper of `torch.compile`, and a
block mask that is compiled."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from holdfast.internals.moved import MovedError, looked_up


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs before or after the module's forward or backward pass."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(looked_up("torch", module, name) for name in names)


def hooks_before(module: nn.Module) -> list[Callable[..., Any]]:
    """What runs before the module's forward pass."""
    return list(looked_up("torch", module, "_forward_pre_hooks").values())


def hooks_after(module: nn.Module) -> list[Callable[..., Any]]:
    """What runs after the module's forward pass."""
    return list(looked_up("torch", module, "_forward_hooks").values())


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """What the module itself would save, without its children: its tensors, and a quantised weight's scales."""
    state: dict[str, Tensor] = {}
    looked_up("torch", module, "_save_to_state_dict")(state, "", keep_vars=False)
    missing = [name for name, _ in module.named_parameters(recurse=False) if name not in state]
    if missing:
        raise MovedError("torch", "nn.Module._save_to_state_dict", f"it leaves out {missing[0]!r}")
    return state


def dropout_class() -> type[nn.Module]:
    """What every dropout module is an instance of."""
    found = looked_up("torch", nn.modules.dropout, "_DropoutNd")
    if not issubclass(nn.Dropout, found):
        raise MovedError("torch", "nn.modules.dropout._DropoutNd", "nn.Dropout is none")
    return found


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` is what `torch.compile` made of a module."""
    return type(model) is looked_up("torch", looked_up("torch", torch, "_dynamo"), "OptimizedModule")


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that was compiled into `model`."""
    return looked_up("torch", model, "_orig_mod")


def compiler(model: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What compiles a function with the options that `model` was compiled with."""
    return looked_up("torch", model, "dynamo_ctx")


def compiled_block_mask(
    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], num_rows: int, num_columns: int, device: torch.device
) -> flex_attention.BlockMask:
    """The block mask of `sees`, a function of (row, head, query, key), for all heads. On a GPU its making is compiled,
    so that no mask [R T T] is ever held."""
    make = flex_attention.create_block_mask
    if "_compile" not in inspect.signature(make).parameters:
        taken = list(inspect.signature(make).parameters)
        raise MovedError("torch", "create_block_mask", f"it takes no `_compile`, but {taken}")
    shape = (num_rows, None, num_columns, num_columns)
    return make(sees, *shape, device=str(device), _compile=device.type != "cpu")
