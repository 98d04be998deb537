"""Digests of tensors, at several GB/s. Equal tensors have equal digests on every device.

The hash (XXH3-128) finds accidents. Given up: it does not withstand forgery.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash
from torch import Tensor

from holdfast.policy.sharding import is_part, whole


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of the names, dtypes, shapes and bytes of tensors (law L2): BLAKE2b of each one's `tensor_digest`."""
    return digest_of_each(_each_digest(list(tensors)))


def digest_of_each(digests: Iterable[tuple[str, str]]) -> str:
    """The digest of tensors of which each one's `tensor_digest` is known by name."""
    lines = sorted(f"{name} {text}" for name, text in digests)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """A tensor's dtype, its shape and the XXH3-128 of its bytes, as one text."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(content)}"


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`tensor_digest` of each tensor by name. A tensor that has several names is read once."""
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    by_id = dict(_each_digest([(str(key), tensor) for key, tensor in distinct.items()]))
    return {name: by_id[str(id(tensor))] for name, tensor in tensors.items()}


def _each_digest(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    if any(is_part(tensor) for _, tensor in tensors):
        yield from ((name, tensor_digest(whole(tensor))) for name, tensor in tensors)
        return
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        digests = threads.map(lambda item: tensor_digest(item[1]), tensors)
        yield from zip((name for name, _ in tensors), digests, strict=True)
