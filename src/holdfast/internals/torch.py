"""Private names of torch: a tensor's storage, whether a backward pass runs, a module's hooks, what it saves, dropout's
base class, what wraps a model (`torch.compile`, recomputation), how a dimension is marked for it, where FSDP2 believes
a forward pass to be, and how many collective operations were begun.

Given up: `torch.compile` of anything but a whole model.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import distributed_c10d
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils import _python_dispatch

from holdfast.internals.moved import MovedError, looked_up

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def modules_of(module: nn.Module) -> list[nn.Module]:
    """`module` and all modules within, in the order of `module.modules()`. A few times as fast, since a model with
    adapters has thousands, and a step asks many times."""
    looked_up("torch", module, "_modules")
    found: dict[nn.Module, None] = {}
    ahead = [module]
    while ahead:
        each = ahead.pop()
        if each not in found:
            found[each] = None
            if children := each._modules:
                ahead += [child for child in reversed(children.values()) if child is not None]
    return list(found)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of `module`, without those of the modules within."""
    return [each for each in looked_up("torch", module, "_parameters").values() if each is not None]


def set_training(module: nn.Module, mode: bool) -> None:
    """Puts `module` into training or eval mode, without the modules within. Faster than an assignment, which asks
    whether the value is a parameter or a module."""
    object.__setattr__(module, "training", mode)


def num_collectives() -> int | None:
    """How many collective operations this process has begun, in all of its groups; None where torch does not say. No
    operation is begun, and none waited for."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0
    groups = looked_up("torch", looked_up("torch", distributed_c10d, "_world"), "pg_map")
    counts = [looked_up("torch", group, "_get_sequence_number_for_group") for group in list(groups)]
    try:
        return sum(count() for count in counts)
    except RuntimeError:  # of a backend that does not count
        return None


def storage_number(tensor: Tensor) -> int:
    """A number that tensors with one storage share, and no other living tensor has."""
    return looked_up("torch", tensor.untyped_storage(), "_cdata")


def is_in_backward_pass() -> bool:
    """Whether this thread computes gradients now."""
    return looked_up("torch", looked_up("torch", torch, "_C"), "_current_graph_task_id")() != -1


def has_hooks(module: nn.Module) -> bool:
    """Whether anything but FSDP2 runs before or after the module's forward or backward pass."""
    hooks = [hook for name in _HOOK_TABLES for hook in looked_up("torch", module, name).values()]
    return any(not str(getattr(hook, "__module__", "")).startswith(fully_shard.__module__) for hook in hooks)


def has_global_hooks() -> bool:
    """Whether something runs before or after every module's forward or backward pass."""
    return looked_up("torch", nn.modules.module, "_has_any_global_hook")()


def is_bare(module: nn.Module) -> bool:
    """Whether calling `module` runs the forward of its class and nothing else."""
    state = vars(module)
    try:
        return "forward" not in state and not any(state[name] for name in _HOOK_TABLES)
    except KeyError as error:
        raise MovedError("torch", f"nn.Module.{error.args[0]}") from None


def is_wrapper(tensor: Tensor) -> bool:
    """Whether `tensor` is made of other tensors, as a quantised weight or a shard."""
    return looked_up("torch", _python_dispatch, "is_traceable_wrapper_subclass")(tensor)


def version_of(tensor: Tensor) -> int | None:
    """A number that grows with each change of `tensor` in place; None where torch counts no changes."""
    return None if tensor.is_inference() else looked_up("torch", tensor, "_version")


def cast_at_once(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors, at least one and all on one device, in `dtype`."""
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    looked_up("torch", torch, "_foreach_copy_")(casts, list(tensors))
    return casts


def hooks_before(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before the module's forward pass."""
    return list(looked_up("torch", module, "_forward_pre_hooks").values())


def hooks_after(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run after the module's forward pass."""
    return list(looked_up("torch", module, "_forward_hooks").values())


@contextlib.contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """A context within which nothing runs before or after the forward pass of `module` or of a module in it."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    tables = [looked_up("torch", child, name) for child in module.modules() for name in names]
    hooks = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, own in zip(tables, hooks, strict=True):
            table.update(own)


def recomputed(module: nn.Module) -> nn.Module:
    """The module whose activations `module` recomputes or moves, where it is made for that; else `module` itself."""
    while isinstance(module, ActivationWrapper):
        module = looked_up("torch", module, "_checkpoint_wrapped_module")
    return module


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that the module itself saves, without its children's: also the scales of a quantised weight."""
    state: dict[str, Tensor] = {}
    looked_up("torch", module, "_save_to_state_dict")(state, "", keep_vars=False)
    missing = [name for name, _ in module.named_parameters(recurse=False) if name not in state]
    if missing:
        raise MovedError("torch", "nn.Module._save_to_state_dict", f"it leaves out {missing[0]!r}")
    return state


def class_of(module: Any) -> type[nn.Module]:
    """The class of a module before FSDP2 gave it one of its own."""
    kind = type(module)
    return kind.__mro__[kind.__mro__.index(FSDPModule) + 1] if isinstance(module, FSDPModule) else kind


def dropout_class() -> type[nn.Module]:
    """The base class of every dropout module."""
    base = looked_up("torch", nn.modules.dropout, "_DropoutNd")
    if not issubclass(nn.Dropout, base):
        raise MovedError("torch", "nn.modules.dropout._DropoutNd", "nn.Dropout is none")
    return base


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` made `model`."""
    return type(model) is looked_up("torch", looked_up("torch", torch, "_dynamo"), "OptimizedModule")


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that was compiled into `model`."""
    return looked_up("torch", model, "_orig_mod")


def compiler(model: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function that compiles another function with the options that `model` was compiled with.

    Sizes are dynamic from the first call on, unless these options say which are. Otherwise every graph would be made
    for the sizes of the first batch, and once more when the second batch has others.
    """
    context = looked_up("torch", model, "dynamo_ctx")
    config = looked_up("torch", looked_up("torch", torch, "_dynamo"), "config")
    if looked_up("torch", context, "_dynamic") is not None:
        return context

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        run = context(function)

        def of_any_size(*args: Any, **kwargs: Any) -> Any:
            with config.patch(assume_static_by_default=False):
                return run(*args, **kwargs)

        return of_any_size

    return compiled


def static_by_default() -> contextlib.AbstractContextManager[Any]:
    """A context within which what is compiled takes sizes and numbers to stay as they are, unless they are marked. A
    compiled model may run around it that takes none to stay."""
    config = looked_up("torch", looked_up("torch", torch, "_dynamo"), "config")
    return config.patch(assume_static_by_default=True)


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Tells `torch.compile` that this dimension has another size in another call, before it has seen one."""
    looked_up("torch", looked_up("torch", torch, "_dynamo"), "mark_dynamic")(tensor, dimension)


def without_base(tensor: Tensor) -> Tensor:
    """The same values in the same memory, but to autograd no view of another tensor. `torch.compile` also looks at the
    tensor that an argument is a view of, and would compile anew where that has another shape."""
    found = looked_up("torch", torch.ops.aten, "_unsafe_view")(tensor, tensor.shape)
    if looked_up("torch", found, "_is_view")():
        raise MovedError("torch", "ops.aten._unsafe_view", "it returns a view")
    return found


def end_forward(module: FSDPModule) -> None:
    """Ends the forward pass in which FSDP2 believes `module` to be, as after an exception. Its values stay gathered
    otherwise, and the next forward pass would compute with them."""
    state = looked_up("torch", module, "_get_fsdp_state")()
    groups = looked_up("torch", state, "_fsdp_param_groups")
    for part in (state, *groups):
        if looked_up("torch", part, "_training_state").name == "FORWARD":
            part._training_state = type(part._training_state).IDLE
    looked_up("torch", state, "_modules_to_run_forward").clear()
    looked_up("torch", state, "_state_ctx").iter_forward_root = None
