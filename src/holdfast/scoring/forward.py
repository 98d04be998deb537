"""A module's forward pass replaced for a while, and the body of a compiled model.

The replacement sits on the instance, not on the class, and what was there before comes back: nothing, or the forward
that another library had put there. Given up: two threads in one model at the same time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from holdfast.internals.torch import compiler, is_compiled, uncompiled


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` computes with `forward`; on leaving, as it did before."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


@contextlib.contextmanager
def compiled_body(model: nn.Module, causal_lm: PreTrainedModel) -> Iterator[nn.Module]:
    """What to call in place of `model`, of which `causal_lm` is the language model.

    That is `model` itself, unless `torch.compile` made it. To the compiler a model with another head is another model,
    and scoring gives it another head in every forward pass. So only the body is compiled, and the uncompiled model is
    called. ValueError where the model has no body apart from its head.
    """
    if not is_compiled(model):
        yield model
        return
    body: Any = causal_lm.base_model
    if body is causal_lm:
        raise ValueError(
            f"{type(body).__name__} was to be scored under torch.compile, which compiles a model's body without its "
            f"head; found none at {body.base_model_prefix!r}. Use torch_compile=False."
        )
    compiled: Any = compiler(model)
    with replaced_forward(body, compiled(body.forward)):
        yield uncompiled(model)
