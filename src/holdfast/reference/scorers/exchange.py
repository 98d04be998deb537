"""An exchange of values: for the length of a context, a module's parameters have those of the reference.

Storage is exchanged and not copied, so it costs no time and no memory. Given up: sharded parameters.
"""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def exchanged(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A context within which the parameters of `module` named in `values` have these values.

    On leaving, the parameters have their own values again, also after an exception. A graph that was built before stays
    valid for a backward pass after the context. ValueError where a parameter is sharded.
    """
    parameters = {name: module.get_parameter(name) for name in values}
    sharded = [name for name, parameter in parameters.items() if _is_gathered_by_an_engine(parameter)]
    if sharded:
        raise ValueError(
            "A frozen copy of the trainable tensors was to be put in place of the policy's, but these are sharded "
            f"(`{sharded[0]}` first), and the engine would go on computing with the policy's. Use "
            "reference='precomputed', or train without sharding."
        )
    current = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = current[name]


def _is_gathered_by_an_engine(parameter: Tensor) -> bool:
    """Whether FSDP2 or ZeRO-3 gathers the parameter's values before a forward pass, over whatever was put there."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")
