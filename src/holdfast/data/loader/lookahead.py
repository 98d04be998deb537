"""Batches read ahead of their turn, a window at a time, with what is said of them when the window is full.

A data loader tells the trainer through accelerate which batch is its last. Read ahead, it would say so too early, and
once it is exhausted it would be no active loader any more. So a window stops at the last batch without asking for
another, and the flag is set again for each batch as it is handed out.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor

Batch = dict[str, Any]


def read_ahead(
    batches: Iterator[Batch],
    accelerator: Accelerator,
    size: Callable[[], int],
    complete: Callable[[list[Batch]], None],
    *,
    unit: int = 1,
    most_bytes: int,
) -> Iterator[Batch]:
    """The `batches`, in order. `size()` of them are read together, fewer where the data end or once a multiple of
    `unit` of them holds `most_bytes`; `complete` gets to see them before the first is handed out."""
    while True:
        window: list[Batch] = []
        num_bytes, is_over, limit = 0, False, size()
        while len(window) < limit and not is_over and (num_bytes < most_bytes or len(window) % unit):
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
