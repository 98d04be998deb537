"""Quantised models, whose weights are integers: recognised, and made to compute alike in training and eval mode."""

from typing import Any

from torch import nn

from holdfast.internals.torch import hooks_before


def is_quantised(module: nn.Module) -> bool:
    """Whether any weight of `module` is stored as integers."""
    return not all(parameter.is_floating_point() for parameter in module.parameters())


def pin_quantised_layers(module: nn.Module) -> nn.Module:
    """`module`, whose quantised layers compute in eval mode as they do in training from now on.

    These layers have no dropout; their mode only chooses a kernel. On CPUs bitsandbytes chooses badly in eval mode.
    With 8 bits, its kernel rounds the activations as well, so policy and reference would differ. With 4 bits, its
    kernel has no gradient and repacks the weights for good: an evaluation would end the training of all layers below.
    """
    for part in module.modules():
        is_pinned = _in_training_mode in hooks_before(part)
        if not is_pinned and not all(p.is_floating_point() for p in part.parameters(recurse=False)):
            part.register_forward_pre_hook(_in_training_mode)
    return module


def _in_training_mode(part: nn.Module, _inputs: Any) -> None:
    part.training = True


def check_not_repacked(policy: nn.Module) -> None:
    """ValueError where bitsandbytes has repacked a weight of the policy for inference on a CPU."""
    for name, parameter in policy.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The policy's `{name}` was repacked for inference, since the model ran on this CPU in eval mode; no "
                "gradient would pass through it. Load the model again, and pass it before it runs."
            )
