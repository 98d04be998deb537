"""Evaluation with the whole policy in half precision (`bf16_full_eval`, `fp16_full_eval`), undone afterwards.

Outside training `transformers.Trainer` casts the model for an evaluation and leaves it so: training that follows would
begin from rounded weights. Here the policy's tensors are put back, the very same ones. The reference is asked with the
policy as it is trained, so an evaluation compares the rounded policy with the reference of the run, however that is
held; and what is stored meanwhile is what any other run stores. Costs the rounded weights on top of the others.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from transformers import TrainingArguments

from holdfast.policy.quantised import is_quantised


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A module's tensor by name, and the values of it and of its gradient; of a buffer, itself alone."""

    module: nn.Module
    name: str
    tensor: Tensor
    values: Tensor | None = None
    gradient: Tensor | None = None


@final
class FullEval:
    """The casts of `policy`."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._trained: list[_Place] | None = None

    @contextlib.contextmanager
    def cast(self) -> Iterator[None]:
        """A context within which the policy may be cast to another dtype. Afterwards it has the tensors from before."""
        self._trained = _places(self._policy)
        try:
            yield
        finally:
            _put(self._trained)
            self._trained = None

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """Within `cast`, a context in which the policy has its own tensors again."""
        if self._trained is None:
            yield
            return
        cast = _places(self._policy)
        _put(self._trained)
        try:
            yield
        finally:
            _put(cast)


def _places(policy: nn.Module) -> list[_Place]:
    places: list[_Place] = []
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False):
            gradient = parameter.grad.data if parameter.grad is not None else None
            places.append(_Place(module=module, name=name, tensor=parameter, values=parameter.data, gradient=gradient))
        for name, buffer in module.named_buffers(recurse=False):
            places.append(_Place(module=module, name=name, tensor=buffer))
    return places


def _put(places: list[_Place]) -> None:
    for place in places:
        if place.values is not None:  # a parameter stays the object that the optimizer knows
            place.tensor.data = place.values
        if place.gradient is not None and place.tensor.grad is not None:
            place.tensor.grad.data = place.gradient
        if getattr(place.module, place.name) is not place.tensor:
            setattr(place.module, place.name, place.tensor)


def check_full_eval(args: TrainingArguments, policy: nn.Module, *, is_sharded: bool) -> bool:
    """Whether evaluations outside training are to be in half precision. ValueError where this policy cannot be cast and
    come back."""
    asked = next((name for name in ("bf16_full_eval", "fp16_full_eval") if getattr(args, name)), None)
    if asked is None:
        return False
    if is_sharded or is_quantised(policy):
        raise ValueError(
            f"{asked}=True was asked for, but the policy is {'sharded' if is_sharded else 'quantised'}, so it cannot "
            "be cast and come back. Leave it out: an evaluation then computes as training does (bf16=True: in bf16 "
            "autocast)."
        )
    return True
