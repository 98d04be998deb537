"""A model's log-probs and gradients on two short rows, to compare it with itself before and after a change.

The rows are those that `independence` scores: a few tokens of the first row of the training data, so that the cost is
two small passes. Given up: parts of a model that so few tokens do not reach, such as most of its experts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.policy.independence import short_batches
from holdfast.policy.untouched import untouched
from holdfast.scoring.frozen import Autocast, evaluating
from holdfast.scoring.score import score


def own_numbers(
    first_rows: Callable[[], Sequence[Mapping[str, Any]]], length: int | None, autocast: Autocast
) -> Callable[[nn.Module], list[Tensor]]:
    """A function that returns the log-probs of a model, and the gradients of their sum. `length` is what
    `pin_rotations` returned."""

    def numbers(model: nn.Module) -> list[Tensor]:
        _, batch = short_batches(model, first_rows()[0], length)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with untouched(model), torch.enable_grad():
            with evaluating(model), autocast():
                logps = score(model, batch).logps.per_token
            found = torch.autograd.grad(logps.sum(), trainable, allow_unused=True) if trainable else ()
        return [logps.detach(), *(gradient for gradient in found if gradient is not None)]

    return numbers
