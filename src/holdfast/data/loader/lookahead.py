"""Batches read ahead of their turn, a window at a time.

A data loader tells the trainer through accelerate which batch is its last. If batches were simply read ahead, it would
say so too early, and once exhausted it would no longer be the active loader. So a window stops at the last batch
without asking for another, and the flag is set again for each batch as it is handed out. Given up: the memory of a
window's batches.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from holdfast.agreement import any_of_all

Batch = dict[str, Any]


def read_ahead(
    batches: Iterator[Batch],
    accelerator: Accelerator,
    size: Callable[[], int],
    complete: Callable[[list[Batch]], None],
    *,
    unit: int = 1,
    most_bytes: int,
    in_lockstep: bool = False,
) -> Iterator[Batch]:
    """The `batches` in their order. Up to `size()` of them are read together as a window, which `complete` is called
    with before its first batch is handed out. A window is shorter where the data end, and where a multiple of `unit`
    batches holds `most_bytes`: `in_lockstep`, where a process's batches do, since all processes read windows of one
    length.
    """

    def is_full(num_bytes: int) -> bool:
        return any_of_all(num_bytes >= most_bytes) if in_lockstep else num_bytes >= most_bytes

    while True:
        window: list[Batch] = []
        num_bytes, is_over, limit = 0, False, size()
        while len(window) < limit and not is_over and (not window or len(window) % unit or not is_full(num_bytes)):
            batch = next(batches, None)
            if batch is None:
                break
            window.append(batch)
            num_bytes += _num_bytes(batch)
            is_over = accelerator.gradient_state.end_of_dataloader
        if not window:
            return
        loader: Any = accelerator.gradient_state.active_dataloader
        complete(window)
        for index, batch in enumerate(window, 1):
            if loader is not None:
                loader.end_of_dataloader = is_over and index == len(window)
            yield batch


def _num_bytes(batch: Mapping[str, Any]) -> int:
    return sum(value.numel() * value.element_size() for value in batch.values() if isinstance(value, Tensor))
