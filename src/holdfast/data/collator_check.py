"""Whether a user's own data collator heeds the masks of completions, and makes a pair of each row.

A collator that was written for rows without masks reads the token ids alone. It would score what the user and the tools
say, and no number would tell. So a row is collated with its mask and without. Given up: a collator that heeds masks of
some rows and not of others.

One that leaves rows out gives processes unlike numbers of pairs, which nobody expects: each would count its own pairs
as much as the others count theirs. With several processes its batches are counted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import numpy as np
import torch
from datasets import Dataset

from holdfast.data.columns import CHOSEN_IDS, CHOSEN_MASK, MASK_COLUMNS, REJECTED_IDS, REJECTED_MASK
from holdfast.data.completion_mask import read_mask
from holdfast.data.layouts.choose import layout_of
from holdfast.data.layouts.preference_collator import with_positions

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

_NUM_ROWS = 64
"""Rows of a dataset that are looked through for one with a mask. Of a stream it is the first row alone."""


@final
@dataclass(frozen=True, slots=True)
class PairOfEachRow:
    """A data collator: `collator`, with a ValueError where it returns another number of pairs than it got rows."""

    collator: Collator

    def __call__(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        batch = self.collator(rows)
        pairs: Sized = batch["chosen"] if "chosen" in batch else batch["input_ids"][::2]
        if len(pairs) != len(rows):
            raise ValueError(
                f"The data collator ({type(self.collator).__name__}) returned {len(pairs)} pairs for {len(rows)} rows. "
                "Several processes step together, each with as many pairs as rows, or their losses would count "
                "unequally. Return one pair for each row, and filter the dataset beforehand; or train in one process."
            )
        return batch


def pair_of_each_row(collator: Any, num_processes: int) -> Any:
    """`collator`; with several processes, and where it is a user's own, around it one that counts its pairs."""
    return collator if num_processes == 1 or layout_of(collator) is not None else PairOfEachRow(collator)


def check_masks_are_heeded(
    collator: Any, datasets: Mapping[str, Any], columns_read: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> None:
    """ValueError where a user's own `collator` scores tokens that a mask in one of the `datasets` says are only seen.
    `columns_read` makes of a row what the collator gets. A layout of this package heeds masks, and is not asked."""
    if layout_of(collator) is not None:
        return
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset) and not set(MASK_COLUMNS) & set(dataset.column_names):
            continue
        num_rows = _NUM_ROWS if isinstance(dataset, Dataset) else 1
        rows: Iterator[Any] = islice(dataset, num_rows)
        _check_rows(collator, map(columns_read, rows), name)


def _check_rows(collator: Collator, rows: Iterable[Mapping[str, Any]], name: str) -> None:
    """The same for the first rows of one dataset. The first one that shows it or disproves it decides."""
    for number, row in enumerate(rows):
        sides = ((CHOSEN_MASK, CHOSEN_IDS, "chosen"), (REJECTED_MASK, REJECTED_IDS, "rejected"))
        masks = {side: read_mask(row.get(mask), mask, ids, len(row[ids])) for mask, ids, side in sides}
        if all(mask is None for mask in masks.values()):
            continue
        with_masks = _num_scored(collator, dict(row))
        without = _num_scored(collator, {column: value for column, value in row.items() if column not in MASK_COLUMNS})
        if with_masks != without:
            return
        for side, mask in masks.items():
            if mask is not None and _must_differ(mask, without[side]):
                raise ValueError(
                    f"the column {f'{side}_mask'!r} of the {name} dataset says which tokens of a completion are "
                    f"scored, but the data collator ({type(collator).__name__}) does not heed it: in row {number} it "
                    f"scores {without[side]} tokens of {side} with the mask and without it, and the mask has "
                    f"{int(mask.sum())} of {len(mask)}. Make `completion_mask` 0 for the others, or leave "
                    "`data_collator` out; to score all tokens, drop the columns "
                    f"{list(MASK_COLUMNS)}."
                )


def _must_differ(mask: np.ndarray, num_scored: int) -> bool:
    """Whether a completion of which all tokens that a collator leaves are scored must be shorter under the mask,
    whichever end was cut."""
    return num_scored > 0 and not mask[:num_scored].all() and not mask[-num_scored:].all()


def _num_scored(collator: Collator, row: dict[str, Any]) -> dict[str, int]:
    """The number of scored tokens of both completions of one row."""
    batch = with_positions(collator([row]))
    lengths = torch.bincount(batch["sequence"].cpu())
    return {side: int(lengths[batch[side][0]]) for side in ("chosen", "rejected")}
