"""Private names of torch's FSDP2: how a module was sharded, the plain module beneath, and other memory for its parts.

FSDP2 turns a module into one of a class of its own and hangs hooks and a record on it, which cannot be copied.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy

from holdfast.internals.moved import MovedError, looked_up

_PACKAGE = "torch.distributed.fsdp"
_RECORDS = "__composable_api"
"""How the names of the attributes begin in which torch records what was done to a module."""


class ShardingOptions(NamedTuple):
    """The options of `fully_shard` that a module was sharded with."""

    mesh: DeviceMesh
    mp_policy: MixedPrecisionPolicy
    offload_policy: OffloadPolicy


def sharding_options(module: nn.Module) -> ShardingOptions:
    """The options with which the first sharded module in `module` was sharded. ValueError where none is sharded."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            state = looked_up("torch", child, "_get_fsdp_state")()
            for group in looked_up("torch", state, "_fsdp_param_groups"):
                mesh = looked_up("torch", looked_up("torch", group, "mesh_info"), "mesh")
                offload_policy = looked_up("torch", group, "offload_policy")
                return ShardingOptions(mesh, looked_up("torch", state, "_mp_policy"), offload_policy)
    raise ValueError(f"{type(module).__name__} was to be asked how it was sharded, but it is not.")


def meshes(module: nn.Module) -> dict[int, object]:
    """The attributes of `module` and those in it that are device meshes or hold some, by id: they cannot be copied."""
    values = [value for child in module.modules() for value in vars(child).values()]
    return {id(value): value for value in values if isinstance(value, DeviceMesh) or _holds_mesh(value)}


def _holds_mesh(value: Any) -> bool:
    return any(isinstance(own, DeviceMesh) for own in getattr(value, "__dict__", {}).values())


def replace_tensors(module: nn.Module, made_of: Callable[[Tensor], Tensor]) -> None:
    """Replaces each tensor of `module` by the one that is `made_of` it. Parameters stay the objects that they are."""
    looked_up("torch", module, "_apply")(made_of)


def share_tied_parts(module: nn.Module) -> None:
    """Makes FSDP2 gather tied weights from one memory, where it knows them under several names: weights that were tied
    after they were sharded. Where parts are uneven, it would go on gathering the values of one name as they were."""
    known: dict[int, list[Any]] = {}
    for child in module.modules():
        if isinstance(child, FSDPModule):
            for group in looked_up("torch", looked_up("torch", child, "_get_fsdp_state")(), "_fsdp_param_groups"):
                for parameter in looked_up("torch", group, "fsdp_params"):
                    looked_up("torch", parameter, "reset_sharded_param")()
                    known.setdefault(id(looked_up("torch", parameter, "sharded_param")), []).append(parameter)
    for *others, last in known.values():
        for other in others:
            other._sharded_param_data = looked_up("torch", last, "_sharded_param_data")


@contextlib.contextmanager
def as_plain_modules(module: nn.Module) -> Iterator[None]:
    """Inside, `module` and those in it are of their own classes, and nothing of FSDP2 hangs on them. They cannot
    compute then, but be copied."""
    former = [(child, type(child), vars(child)) for child in module.modules()]
    try:
        for child, kind, attributes in former:
            if issubclass(kind, FSDPModule):
                child.__class__ = kind.__mro__[looked_up("torch", FSDPModule, "_orig_cls_mro_index")]
            child.__dict__ = {
                name: _without_own_hooks(value) if name.endswith("_hooks") else value
                for name, value in attributes.items()
                if not name.startswith(_RECORDS)
            }
        left = [type(child).__name__ for child, _, _ in former if isinstance(child, FSDPModule)]
        if left:
            raise MovedError("torch", "distributed.fsdp.FSDPModule", f"{left[0]} has no class beneath")
        yield
    finally:
        for child, kind, attributes in former:
            child.__dict__ = attributes
            child.__class__ = kind


def _without_own_hooks(hooks: Any) -> Any:
    """Hooks by number, or modules' attributes of another kind, without those that FSDP2 has registered."""
    if not isinstance(hooks, dict):
        return hooks
    others = hooks.copy()
    for key, hook in hooks.items():
        if str(getattr(hook, "__module__", "")).startswith(_PACKAGE):
            del others[key]
    return others
