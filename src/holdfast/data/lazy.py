"""Batches of a dataset in its own order, made when they are asked for: what a reference that scores ahead reads."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from holdfast.batch import PairBatch


@dataclass(frozen=True, slots=True)
class LazyBatches:
    """`collate` of every `size` rows of this process's share of the dataset."""

    dataset: Dataset
    size: int
    collate: Callable[[list[dict[str, Any]]], PairBatch]
    accelerator: Accelerator

    def __len__(self) -> int:
        """Number of batches of this process."""
        return -(-len(self._rows()) // self.size)

    def __iter__(self) -> Iterator[PairBatch]:
        """The batches."""
        for index in self._rows()[:: self.size]:
            stop = min(index + self.size, self._rows().stop)
            yield self.collate([self.dataset[row] for row in range(index, stop)])

    def _rows(self) -> range:
        num_rows = len(self.dataset)
        share = -(-num_rows // self.accelerator.num_processes)
        first = min(self.accelerator.process_index * share, num_rows)
        return range(first, min(first + share, num_rows))


def by_name(datasets: Any, name: str = "eval") -> dict[str, Any]:
    """One dataset, a dict of them or None as a dict of names."""
    if datasets is None:
        return {}
    return {str(key): part for key, part in datasets.items()} if isinstance(datasets, Mapping) else {name: datasets}
