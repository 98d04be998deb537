"""Log-probs as a reference gives them: without gradients, in eval mode, under the policy's own numerics.

A reference must be scored under the autocast context of the policy's forward pass; otherwise the two differ by rounding
where they should be equal. Given up: a cheaper dtype for the reference alone.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.internals.torch import modules_of, set_training
from holdfast.scoring.score import score

Autocast = Callable[..., AbstractContextManager[Any]]
"""Returns the context under which the policy's forward pass runs."""


def frozen_logps(module: nn.Module, batch: PairBatch, autocast: Autocast) -> SequenceLogps:
    """The log-probs of `module` without gradients, in eval mode, under `autocast`."""
    with torch.no_grad(), evaluating(module), autocast():
        return score(module, batch).logps


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, all of `module` is in eval mode; on leaving, each submodule is in the mode that it was in before."""
    training = [submodule for submodule in modules_of(module) if submodule.training]
    for submodule in training:
        set_training(submodule, False)
    try:
        yield
    finally:
        for submodule in training:
            set_training(submodule, True)
