"""Moving a reference: `pi_ref <- alpha * pi_theta + (1 - alpha) * pi_ref`, in effective weights, in fp32.

TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656). In bf16 an update of alpha = 0.001 rounds to nothing, so a
reference in half precision has an fp32 state beside its weights. Given up: memory for that state.
"""

from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from holdfast.policy.sharding import shape_of

_FP32 = ".fp32"


def parameter_name(name: str) -> str:
    """The name of the parameter whose value or fp32 state has the name `name` in a state."""
    return name.removesuffix(_FP32)


def check_mixable(reference: Mapping[str, Tensor], policy: Mapping[str, Tensor]) -> None:
    """ValueError where the two cannot be mixed: they have different tensors or shapes, or quantised weights."""
    differing = [
        name for name in reference.keys() | policy.keys()
        if name not in reference or name not in policy or shape_of(reference[name]) != shape_of(policy[name])
    ]  # fmt: skip
    if differing:
        raise ValueError(
            "A sync mixes the weights of reference and policy, but they are different models: "
            f"`{sorted(differing)[0]}` is in one only or has another shape ({len(differing)} such tensors). Use a "
            "`ref_model` of the policy's architecture, or sync_ref_model=False."
        )
    for name, tensor in reference.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"A sync mixes weights, but `{name}` is {tensor.dtype}: quantised weights have no exact mix. Use an "
                "unquantised reference, or sync_ref_model=False."
            )


@final
class Average:
    """A moving average of weights, with an fp32 state for weights in half precision.

    The state is empty before the first move, and for fp32 weights.
    """

    def __init__(self) -> None:
        self._fp32: dict[str, Tensor] = {}

    @torch.no_grad()
    def move(self, reference: Mapping[str, Tensor], policy: Mapping[str, Tensor], alpha: float) -> list[Tensor]:
        """Sets `reference <- alpha * policy + (1 - alpha) * reference` in place, accumulated in fp32. Returns the
        squares of policy - reference, summed over parts of the tensors: fp64 numbers on their device (see `squares`).
        """
        squares: list[Tensor] = []
        for name, tensor in reference.items():
            state = tensor
            if tensor.dtype in (torch.float16, torch.bfloat16):
                state = self._fp32.setdefault(name, tensor.float())
            target = policy[name].to(device=state.device, dtype=state.dtype)
            chunks = zip(target.reshape(-1).split(2**20), state.view(-1).split(2**20), strict=True)
            squares += [(ours - theirs).double().square().sum() for ours, theirs in chunks]
            state.copy_(target) if alpha == 1 else state.lerp_(target, alpha)
            if state is not tensor:
                tensor.copy_(state)
        return squares

    @torch.no_grad()
    def restore(self, reference: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Sets the weights and the fp32 state to those in `state`. An empty `state` changes nothing."""
        if state:
            self._fp32 = {}
        for name, values in state.items():
            if name in reference:
                reference[name].copy_(values)
            else:
                parameter = parameter_name(name)
                self._fp32[parameter] = values.to(reference[parameter].device, copy=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The fp32 state, each tensor under `<parameter>.fp32`."""
        for name, tensor in self._fp32.items():
            yield f"{name}{_FP32}", tensor
