"""Evaluation with the whole policy in half precision (`bf16_full_eval`, `fp16_full_eval`), undone afterwards.

Outside training `transformers.Trainer` casts the model for an evaluation and leaves it so. Training that follows would
begin from rounded weights. Here the policy gets its own tensors back afterwards, the very same objects. It also gets
them back whenever the reference scores, since the reference may be held inside the policy. So an evaluation compares
the rounded policy with the unrounded reference, and stores the same log-probs as any other run. The cost is memory for
the rounded weights beside the others.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from transformers import TrainingArguments

from holdfast.policy import sharding
from holdfast.policy.quantised import is_quantised


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _ModuleTensor:
    """A parameter with its values and its gradient's, or a buffer alone, and the module attribute that it is."""

    module: nn.Module
    name: str
    tensor: Tensor
    values: Tensor | None = None
    gradient: Tensor | None = None


@final
class FullEval:
    """Casts `policy` for an evaluation, and back."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._trained: list[_ModuleTensor] | None = None

    @contextlib.contextmanager
    def cast(self) -> Iterator[None]:
        """A context within which the policy may be cast to another dtype. Afterwards it has its own tensors again. A
        sharded policy is never cast, and its tensors come and go with its forward passes."""
        if sharding.is_sharded(self._policy):
            yield
            return
        self._trained = _tensors_of(self._policy)
        try:
            yield
        finally:
            _restore(self._trained)
            self._trained = None

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """Within `cast`, a context in which the policy has its own tensors again."""
        if self._trained is None:
            yield
            return
        cast = _tensors_of(self._policy)
        _restore(self._trained)
        try:
            yield
        finally:
            _restore(cast)


def _tensors_of(policy: nn.Module) -> list[_ModuleTensor]:
    tensors: list[_ModuleTensor] = []
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False):
            gradient = parameter.grad.data if parameter.grad is not None else None
            tensors.append(
                _ModuleTensor(module=module, name=name, tensor=parameter, values=parameter.data, gradient=gradient)
            )
        for name, buffer in module.named_buffers(recurse=False):
            tensors.append(_ModuleTensor(module=module, name=name, tensor=buffer))
    return tensors


def _restore(tensors: list[_ModuleTensor]) -> None:
    for saved in tensors:
        if saved.values is not None:  # a parameter stays the object that the optimizer knows
            saved.tensor.data = saved.values
        if saved.gradient is not None and saved.tensor.grad is not None:
            saved.tensor.grad.data = saved.gradient
        if getattr(saved.module, saved.name) is not saved.tensor:
            setattr(saved.module, saved.name, saved.tensor)


def check_full_eval(args: TrainingArguments, policy: nn.Module, *, is_sharded: bool) -> bool:
    """Whether evaluations outside training are to be in half precision. ValueError where this policy cannot be cast
    there and back."""
    option = next((name for name in ("bf16_full_eval", "fp16_full_eval") if getattr(args, name)), None)
    if option is None:
        return False
    if is_sharded or is_quantised(policy):
        raise ValueError(
            f"{option}=True was asked for, but the policy is {'sharded' if is_sharded else 'quantised'}, so it cannot "
            "be cast and come back. Leave it out: an evaluation then computes as training does (bf16=True: in bf16 "
            "autocast)."
        )
    return True
