"""A model left as it was found: what a forward pass may change is put back afterwards."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from holdfast.policy.rotations import plain_attributes


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards `model` is as it was before in all that a forward pass may change: buffers, plain attributes, modes;
    and so is torch's random state. Parameters are not looked at."""
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
