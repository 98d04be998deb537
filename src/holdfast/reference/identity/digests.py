"""Digests of tensors, at several GB/s. Equal tensors have equal digests on every device, and however they are held.

A tensor that is spread over processes is gathered, one at a time, and has the digest that it has in one process. All
processes must then ask about the same tensors in the same order. The hash (XXH3-128) finds accidents. Given up: it does
not withstand forgery.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash
from accelerate import PartialState
from accelerate.utils import gather_object
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
    """A tensor's dtype, its shape and the XXH3-128 of its bytes, as one text. Collective where the tensor is spread."""
    content = whole(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(content)}"


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`tensor_digest` of each tensor by name. A tensor that has several names is read once."""
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    by_id = dict(_each_digest([(str(key), tensor) for key, tensor in distinct.items()]))
    return {name: by_id[str(id(tensor))] for name, tensor in tensors.items()}


def _each_digest(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    yield from _digests_of_spread([(name, tensor) for name, tensor in tensors if is_part(tensor)])
    tensors = [(name, tensor) for name, tensor in tensors if not is_part(tensor)]
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        digests = threads.map(lambda item: tensor_digest(item[1]), tensors)
        yield from zip((name for name, _ in tensors), digests, strict=True)


def _digests_of_spread(tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """The digests of tensors that are spread over processes. Each process hashes some of them."""
    if not tensors:
        return []
    state, own = PartialState(), list[tuple[int, str]]()
    for number, (_, tensor) in enumerate(tensors):
        gathered = whole(tensor)
        if number % state.num_processes == state.process_index:
            own.append((number, tensor_digest(gathered)))
    return [(tensors[number][0], text) for number, text in gather_object(own)]
