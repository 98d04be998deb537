"""Other values for a module's parameters, for a while: how a reference is put in the policy's place to score."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def exchanged(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A context within which the named parameters of `module` have these values; undone on leaving.

    Storage is exchanged and not copied. Graphs that were built before hold the parameters, which have their own values
    again before any backward pass. ValueError where a parameter is sharded.
    """
    parameters = {name: module.get_parameter(name) for name in values}
    sharded = [name for name, parameter in parameters.items() if hasattr(parameter, "full_tensor")]
    if sharded:
        raise ValueError(
            "A frozen copy of the trainable tensors was to be put in place of the policy's, but these are sharded "
            f"(`{sharded[0]}` first), and FSDP would go on computing with the policy's. Use reference='precomputed', "
            "or train without sharding."
        )
    current = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = current[name]
