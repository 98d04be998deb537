"""A model whose layers were divided among processes when it was handed over: by tensor, pipeline or expert parallelism.

FSDP gathers a layer's weights before the layer computes, so each process computes whole rows of its own. What is
refused here stays divided while it computes: all processes of a group must have the same rows, and rows differ between
processes.
"""

from typing import Any

import torch.distributed
from torch import nn

from holdfast.scoring.causal_lm import unwrap

_SIZES = ("tp_size", "pp_size", "ep_size")


def check_undivided(model: nn.Module, name: str) -> None:
    """ValueError where `model`, which the user knows as `name`, has layers that are divided among processes."""
    found = _of_config(unwrap(model)) or _of_weights(model)
    if found is not None:
        raise ValueError(
            f"`{name}` was handed over divided among processes: {found}. Its processes would have to see the same "
            "rows, and here each has rows of its own. Load it whole, for data parallelism or ZeRO, or sharded by FSDP2 "
            "(`fsdp=True`, or `DistributedConfig(fsdp_size=...)` with the number of processes)."
        )


def _of_config(causal_lm: Any) -> str | None:
    config = getattr(getattr(causal_lm, "config", None), "distributed_config", None)
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    sizes["tp_size"] = sizes["tp_size"] or getattr(causal_lm, "tp_size", None)
    return next((f"{name}={size}" for name, size in sizes.items() if isinstance(size, int) and size > 1), None)


def _of_weights(model: nn.Module) -> str | None:
    """The first tensor that is divided, and that no FSDP module gathers."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    gathered = {id(p) for part in model.modules() if isinstance(part, FSDPModule) for p in part.parameters()}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        num_divisions = sum(isinstance(placement, Shard) for placement in parameter.placements)
        if num_divisions > (id(parameter) in gathered):
            return f"`{name}` is divided by {parameter.placements}, beyond what FSDP gathers"
    return None
