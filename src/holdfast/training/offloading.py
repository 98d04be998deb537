"""Activations that wait in host memory for the backward pass, so that the device has room for larger batches.

What autograd saves is more than activations. In a step of a tiny model without checkpointing, 86 % of the bytes of the
weights are among the saved tensors. Weights stay on the device anyway, so moving them would free nothing. What shares a
parameter's or a buffer's storage is kept, and so is what has the shape and the strides of a parameter or its transpose:
autocast saves casts of weights, which have a storage of their own.

Copies run on a stream of their own, into pinned memory, and nobody waits for them in Python: the device computes on
while they run. In the backward pass the activations saved before the one that is asked for are copied back ahead.

Given up: an activation that happens to have a weight's shape stays, too. On a CPU nothing is moved.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from holdfast.internals.torch import is_in_backward_pass, storage_number
from holdfast.policy.sharding import own_part

LEAST_BYTES = 2**20
"""Smaller tensors stay: a copy has a fixed cost."""

NUM_AHEAD = 2
"""How many tensors are copied back ahead of the one that the backward pass asks for."""


class Copies(Protocol):
    """How tensors are copied to host memory and back."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, complete before `to_device` reads it."""
        ...

    def to_device(self, host: Tensor, device: torch.device) -> "OnItsWay":
        """A copy on `device`, which `arrived` makes readable."""
        ...

    def arrived(self, copy: "OnItsWay") -> Tensor:
        """The copy, complete before whatever reads it from now on."""
        ...

    def end(self) -> None:
        """Called when nothing is copied any more."""
        ...


@final
@dataclass(frozen=True, slots=True)
class OnItsWay:
    """A tensor on the device, and the event after which it has its values; None where it has them."""

    tensor: Tensor
    event: Any


@contextlib.contextmanager
def offloaded(model: nn.Module) -> Iterator[None]:
    """A context in which the activations that `model` saves for the backward pass wait in host memory."""
    copies = StreamCopies()
    offloading = Offloading(model, copies)
    with torch.autograd.graph.saved_tensors_hooks(offloading.pack, offloading.unpack):
        try:
            yield
        finally:
            copies.end()


@final
class StreamCopies:
    """Copies on a stream of their own, from and to pinned memory.

    Memory of the device is freed on the stream that computes. So a tensor is held until its copy to host memory has
    ended, and the memory for a copy back is taken on the stream that computes, after what used it before.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._leaving: deque[tuple[Any, Tensor]] = deque()

    def to_host(self, tensor: Tensor) -> Tensor:
        """See `Copies.to_host`."""
        while self._leaving and self._leaving[0][0].query():
            self._leaving.popleft()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        event = self._copy(host, tensor, tensor.device)
        self._leaving.append((event, tensor))
        return host

    def to_device(self, host: Tensor, device: torch.device) -> OnItsWay:
        """See `Copies.to_device`. The copy to host memory was made on the same stream, so it is over by then."""
        tensor = torch.empty(host.shape, dtype=host.dtype, device=device)
        return OnItsWay(tensor, self._copy(tensor, host, device))

    def arrived(self, copy: OnItsWay) -> Tensor:
        """See `Copies.arrived`."""
        torch.accelerator.current_stream(copy.tensor.device).wait_event(copy.event)
        return copy.tensor

    def end(self) -> None:
        """See `Copies.end`: what computes next begins when all copies have ended, and their memory can be freed."""
        for device, stream in self._streams.items():
            torch.accelerator.current_stream(device).wait_stream(stream)
        self._leaving.clear()

    def _copy(self, target: Tensor, source: Tensor, device: torch.device) -> Any:
        """Begins a copy when what `device` was asked for before is done. Returns the event of its end."""
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.accelerator.current_stream(device))
        with stream:
            target.copy_(source, non_blocking=True)
        return stream.record_event()


@final
class Waiting:
    """A tensor that waits in host memory. `fetched` is its copy on the device between the time that it is asked for and
    the time that it is read."""

    __slots__ = ("__weakref__", "device", "fetched", "host", "is_read")

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host = host
        self.device = device
        self.fetched: OnItsWay | None = None
        self.is_read = False


@final
class Offloading:
    """What is done with each tensor that `model` saves for the backward pass. `least_bytes` bounds what is moved."""

    def __init__(self, model: nn.Module, copies: Copies, *, least_bytes: int = LEAST_BYTES) -> None:
        self._copies = copies
        self._least_bytes = least_bytes
        self._storages: set[int] = set()
        self._shapes: set[tuple[torch.Size, tuple[int, ...]]] = set()
        self._order: deque[weakref.ref[Waiting]] = deque()
        for parameter in model.parameters():
            self._storages.add(storage_number(own_part(parameter)))
            if parameter.ndim > 1:
                whole = torch.empty(parameter.shape, device="meta")
                self._shapes |= {(view.shape, view.stride()) for view in (whole, whole.transpose(-1, -2))}
        self._storages |= {storage_number(own_part(buffer)) for buffer in model.buffers()}

    def is_moved(self, tensor: Tensor) -> bool:
        """Whether a saved tensor is an activation that is worth a copy. What a recomputed layer saves is not: it is
        asked for at once."""
        return (
            tensor.is_floating_point()
            and not hasattr(tensor, "__tensor_flatten__")  # spread over processes, or quantised
            and tensor.layout == torch.strided
            and tensor.nbytes >= self._least_bytes
            and storage_number(tensor) not in self._storages
            and (tensor.shape, tensor.stride()) not in self._shapes
            and not is_in_backward_pass()
        )

    def pack(self, tensor: Tensor) -> Tensor | Waiting:
        """What autograd keeps in place of a tensor that it saves."""
        if isinstance(self._copies, StreamCopies) and tensor.device.type == "cpu":
            return tensor
        if not self.is_moved(tensor):
            return tensor
        waiting = Waiting(self._copies.to_host(tensor), tensor.device)
        self._order.append(weakref.ref(waiting))
        return waiting

    def unpack(self, saved: Tensor | Waiting) -> Tensor:
        """The tensor that autograd saved, with its values."""
        if not isinstance(saved, Waiting):
            return saved
        copy = self._fetched(saved)
        saved.fetched, saved.is_read = None, True  # autograd holds it now
        self._fetch_ahead()
        return self._copies.arrived(copy)

    def _fetched(self, saved: Waiting) -> OnItsWay:
        if saved.fetched is None:
            saved.fetched = self._copies.to_device(saved.host, saved.device)
        return saved.fetched

    def _fetch_ahead(self) -> None:
        """Starts the copies of what was saved last and is not read yet: the backward pass goes from the end to the
        beginning."""
        while self._order and _is_over(self._order[-1]()):
            self._order.pop()
        for number in range(1, min(NUM_AHEAD, len(self._order)) + 1):
            earlier = self._order[-number]()
            if earlier is not None and not earlier.is_read:
                self._fetched(earlier)


def _is_over(waiting: Waiting | None) -> bool:
    return waiting is None or waiting.is_read
