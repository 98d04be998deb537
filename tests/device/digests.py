"""Digests and files of tensors on the pretend device: all have one digest, and a file of them holds zeros."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from holdfast.policy import frozen_linears, half_weights
from holdfast.reference import tensor_file
from holdfast.reference.identity import digests


@contextlib.contextmanager
def of_no_values() -> Iterator[None]:
    """Inside, no digest reads values, files are written without them, and frozen weights are held in half precision."""
    save_file = tensor_file.save_file

    def save_zeros(tensors: Mapping[str, Tensor], file: Path) -> None:
        save_file({name: torch.zeros(value.shape, dtype=value.dtype) for name, value in tensors.items()}, file)

    def digest(tensor: Tensor) -> str:
        return f"{tensor.dtype} {tuple(tensor.shape)} none"

    with (
        patch.object(frozen_linears, "PLAIN", (nn.Parameter, FakeTensor)),
        patch.object(half_weights.HalfWeights, "_checksums", lambda self, model: []),
        patch.object(half_weights, "equal", lambda ours, theirs: True),  # as for values that half precision can hold
        patch.object(digests, "tensor_digest", digest),
        patch.object(tensor_file, "tensor_digest", digest),
        patch.object(tensor_file, "save_file", save_zeros),
    ):
        yield
