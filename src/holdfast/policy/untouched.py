"""A model put back as it was, after forward passes that may have changed it.

Checks score batches with the models of a run before it begins. They must not change the run.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """A context after which `model` has its former buffers, plain attributes and modes, and torch its random state.
    Parameters are not restored: a forward pass does not change them."""
    attributes = {part: plain_attributes(part) for part in model.modules()}
    buffers = {part: {name: (b, b.clone()) for name, b in part.named_buffers(recurse=False)} for part in attributes}
    modes = {part: part.training for part in attributes}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=True):
        try:
            yield
        finally:
            for part, own in buffers.items():
                for name, (buffer, value) in own.items():
                    if not torch.equal(buffer, value):
                        with torch.no_grad():
                            buffer.copy_(value)
                    if getattr(part, name) is not buffer:
                        setattr(part, name, buffer)
            for part, own in attributes.items():
                for name in plain_attributes(part).keys() - own.keys():
                    delattr(part, name)
                for name, value in own.items():
                    if vars(part).get(name) is not value:
                        setattr(part, name, value)
                part.training = modes[part]


def plain_attributes(part: nn.Module) -> dict[str, Any]:
    """The public attributes of a module itself, without its mode, by name."""
    return {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "training"}
