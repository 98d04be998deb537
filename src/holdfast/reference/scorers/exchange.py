"""An exchange of values: for the length of a context, a module's parameters have those of the reference.

Where parameters are whole, storage is exchanged, so it costs no time and no memory. Where they are spread over
processes, each process copies the values of its own part, and nothing is gathered. Given up there: memory for a copy of
the policy's part while the reference computes.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from holdfast.policy.sharding import give_back, put


@contextlib.contextmanager
def exchanged(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A context within which the parameters of `module` named in `values` have these values: of a parameter that is
    spread over processes, those of this process's part.

    On leaving, the parameters have their own values again, also after an exception. A graph that was built before stays
    valid for a backward pass after the context. All processes must enter and leave it at the same forward passes.
    """
    give_back(module)  # a forward pass may have left values gathered, of which a copy would be lost
    parameters: dict[str, nn.Parameter] = {name: module.get_parameter(name) for name in values}
    former: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                former[name] = put(parameter, values[name])
        yield
    finally:
        give_back(module)
        with torch.no_grad():
            for name, value in former.items():
                put(parameters[name], value)
