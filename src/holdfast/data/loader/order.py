"""The order of `train_sampling_strategy="group_by_length"`: pairs of like length in a batch, in a shuffled order.

Rows are shuffled, sorted by length within windows of `WINDOW_BATCHES`, and cut into batches, whose order is shuffled
again. Processes that step together get neighbours in the sorted order. So none waits long for the others, and padded
rows have little padding. The order of an epoch follows from the seed and the epoch's number, so a resumed run has the
same order.

Given up: batches that are independent draws of pairs. That is why it is an option and not the default.
"""

from collections.abc import Iterator
from typing import Any, final

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainingArguments

from holdfast.data.columns import columns_of_pairs
from holdfast.data.ragged import lengths_of_pairs

WINDOW_BATCHES = 50
"""Batches whose pairs are sorted together. With more, lengths in a batch are more alike, but the same pairs meet in
every epoch."""


@final
class OrderByLength(torch.utils.data.Sampler[int]):
    """Indices of rows with these `lengths`, `batch_size` of like length at a time; an incomplete batch comes last."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Draws the order of this epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The indices, each once."""
        draw = np.random.default_rng([self._seed, self._epoch])
        order = draw.permutation(len(self._lengths))
        whole = len(order) - len(order) % self._batch_size
        window = WINDOW_BATCHES * self._batch_size
        for start in range(0, whole, window):
            rows = order[start : min(start + window, whole)]
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
            yield from draw.permutation(rows.reshape(-1, self._batch_size)).ravel().tolist()
        yield from order[whole:].tolist()


def order_by_length(dataset: Any, args: TrainingArguments) -> OrderByLength | None:
    """The order for a run, with the batches of all processes as one; None for a stream, which has its own order.

    A row's length is that of its prompt and both completions, up to the last scored token of each, before truncation.
    """
    if not isinstance(dataset, Dataset):
        return None
    table: Any = dataset.select_columns(columns_of_pairs(dataset.column_names)).with_format("arrow")
    lengths = [sum(lengths_of_pairs(rows)) for rows in table.iter(1_000)]
    num_pairs = args.per_device_train_batch_size * args.world_size
    return OrderByLength(np.concatenate(lengths), num_pairs, args.seed if args.data_seed is None else args.data_seed)
