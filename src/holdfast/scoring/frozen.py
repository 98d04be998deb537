"""Log-probs as a reference gives them: without gradients, in eval mode, under the policy's own numerics."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.scoring.score import score

Autocast = Callable[..., AbstractContextManager[Any]]
"""Makes the context under which the policy's forward pass runs; a reference must be scored under the same."""


def frozen_logps(module: nn.Module, batch: PairBatch, autocast: Autocast) -> SequenceLogps:
    """`module`'s log-probs as a reference gives them: no gradients, eval mode, the policy's own numerics."""
    with torch.no_grad(), evaluating(module), autocast():
        return score(module, batch).logps


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All of `module` in eval mode, each part put back as it was: a policy and its parts may be in different modes."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
