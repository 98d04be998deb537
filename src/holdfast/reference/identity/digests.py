"""Digests of tensors: equal for equal values on whatever device, at several GB/s. Proof against accident, not against
forgery."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash
from torch import Tensor


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, dtypes, shapes and bytes (law L2): BLAKE2b over what `tensor_digest` says of each tensor."""
    lines = sorted(f"{name} {found}" for name, found in _each(list(tensors)))
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """The tensor's dtype, shape and XXH3-128 of its bytes, in words."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(content)}"


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`tensor_digest` of each tensor by name; one that stands under several names is read once."""
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    known = dict(_each([(str(key), tensor) for key, tensor in distinct.items()]))
    return {name: known[str(id(tensor))] for name, tensor in tensors.items()}


def _each(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
        found = threads.map(lambda item: tensor_digest(item[1]), tensors)
        yield from zip((name for name, _ in tensors), found, strict=True)
