"""Models whose weights are kept as integers: told apart, and made to compute alike in training and in eval mode."""

from typing import Any

from torch import nn

from holdfast.internals.torch import hooks_before


def is_quantised(module: nn.Module) -> bool:
    """Whether any weight of `module` is kept as integers."""
    return not all(parameter.is_floating_point() for parameter in module.parameters())


def pin_quantised_layers(module: nn.Module) -> nn.Module:
    """`module`, whose quantised layers compute in eval mode as they do in training from now on.

    They have no dropout; their mode picks a kernel. On CPUs bitsandbytes picks one for eval mode that rounds the
    activations as well (8 bit), so that policy and reference would differ, or one without a gradient, for which it
    repacks the weights for good (4 bit): an evaluation would silently end the training of all layers below.
    """
    for part in module.modules():
        is_pinned = _in_training_mode in hooks_before(part)
        if not is_pinned and not all(p.is_floating_point() for p in part.parameters(recurse=False)):
            part.register_forward_pre_hook(_in_training_mode)
    return module


def _in_training_mode(part: nn.Module, _inputs: Any) -> None:
    part.training = True
