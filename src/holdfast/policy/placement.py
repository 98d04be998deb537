"""Reference models placed where a run computes: on its device, or in parts where the policy is sharded."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from holdfast.policy.broadcast import broadcast_unlike_tensors
from holdfast.policy.quantised import is_quantised
from holdfast.policy.scoring_engine import is_spread_by_zero
from holdfast.policy.second_module import shard_beside
from holdfast.policy.sharding import free_other_parts, is_sharded

logger = logging.getLogger(__name__)


def move_to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`. It stays where it is if it was loaded with a `device_map`, or is quantised."""
    is_quantised = getattr(module, "is_quantized", False)
    return module if is_quantised or getattr(module, "hf_device_map", None) else module.to(device)


def place_reference_models(
    modules: Sequence[nn.Module | None], policy: nn.Module, device: torch.device, *, is_main: bool
) -> list[nn.Module | None]:
    """The reference modules with the same values in all processes: on `device`, or sharded as `policy` is sharded.

    One that cannot be cut is whole in each process, and a warning says so.
    """
    return [None if module is None else _placed(module, policy, device, is_main=is_main) for module in modules]


def _placed(module: nn.Module, policy: nn.Module, device: torch.device, *, is_main: bool) -> nn.Module:
    if is_sharded(module):
        free_other_parts(module)
        return shard_beside(module, policy) if is_spread_by_zero(module) else module
    reason = _reason_to_stay_whole(module) if is_sharded(policy) else None
    if reason is not None and is_main:
        logger.warning(
            "The policy is sharded, but its reference, a %s, is whole in each process: %s.",
            type(module).__name__, reason,
        )  # fmt: skip
    is_cut = is_sharded(policy) and reason is None
    if not is_cut:
        module = move_to_device(module, device)
    broadcast_unlike_tensors(module)
    return shard_beside(module.requires_grad_(False), policy) if is_cut else module


def _reason_to_stay_whole(module: nn.Module) -> str | None:
    if getattr(module, "is_quantized", False) or is_quantised(module):
        return "it is quantised"
    return "it was loaded with a `device_map`" if getattr(module, "hf_device_map", None) else None
