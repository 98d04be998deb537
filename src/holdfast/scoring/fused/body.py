"""Which pieces of a model's body few operations can compute, and their replacement for the length of a forward pass.

Only rows that hold several sequences are computed so. Padded rows keep the model's own code, and a layout is taken only
where its log-probs are those of padded rows (`data.layouts.trial`). So each run compares the pieces here with the
model's own before anything is scored. What is not recognised keeps the model's own code.

Policy and reference have the same pieces replaced, in all passes, so equal models keep equal log-probs.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from holdfast.internals.torch import modules_of
from holdfast.scoring.fused import lora, norms, rotary

_Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Modules with the forward pass that each gets, and namespaces with the rotation that each gets."""

    forwards: tuple[tuple[nn.Module, _Forward], ...] = ()
    rotations: tuple[tuple[dict[str, Any], _Forward], ...] = ()


def pieces_of(causal_lm: PreTrainedModel) -> Pieces:
    """What can be replaced in the model. A module whose forward pass another library has replaced is left alone."""
    forwards = [
        (module, norms.fused_forward(module, kind))
        for module in modules_of(causal_lm)
        if (kind := norms.kind_of(module)) is not None and "forward" not in vars(module)
    ]
    rotations: list[tuple[dict[str, Any], _Forward]] = []
    for namespace in rotary.namespaces(causal_lm):
        own = namespace[rotary.FUNCTION]
        kind = rotary.kind_of(own)
        if kind is not None:
            rotations.append((namespace, rotary.fused_function(own, kind)))
    return Pieces(forwards=(*forwards, *lora.fused_forwards(causal_lm)), rotations=tuple(rotations))


@contextlib.contextmanager
def replaced(pieces: Pieces) -> Iterator[None]:
    """Inside, the model computes the pieces as they say; on leaving, as it did before. May be entered again within."""
    functions = [namespace[rotary.FUNCTION] for namespace, _ in pieces.rotations]
    forwards = [vars(module).get("forward") for module, _ in pieces.forwards]
    try:
        for namespace, rotation in pieces.rotations:
            namespace[rotary.FUNCTION] = rotation
        for module, forward in pieces.forwards:
            vars(module)["forward"] = forward
        yield
    finally:
        for (module, _), forward in zip(pieces.forwards, forwards, strict=True):
            if forward is None:  # it had none of its own before
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
        for (namespace, _), function in zip(pieces.rotations, functions, strict=True):
            namespace[rotary.FUNCTION] = function
