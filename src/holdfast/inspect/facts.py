"""A few numbers for each row of a dataset, in one pass: all else that is counted is computed from them.

A row takes some two hundred bytes here, whatever its length, so that hundreds of thousands of rows fit. Token ids are
read a thousand rows at a time and forgotten. Rows are compared by 64-bit hashes of their ids: among a million rows, two
different ones are taken for equal once in thirty million datasets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import numpy as np
import xxhash
from datasets import Dataset
from datasets.utils import tqdm

from holdfast.data.columns import SOURCE
from holdfast.data.mixing.source_column import NO_SOURCE
from holdfast.data.usability import UNUSABLE_REASONS
from holdfast.inspect.near_rows import NUM_HASHES, signatures
from holdfast.inspect.pairs import Cutting, Pair, read_pairs

USABLE = -1
"""The reason of a row that is used; that of any other is its place in `UNUSABLE_REASONS`."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RowFacts:
    """Arrays with a number for each row.

    `index` is the row's number in the dataset. `prompt`, `chosen` and `rejected` are lengths before truncation, in
    tokens. The other counts are after it: `num_tokens` of both sequences, `chosen_scored` and `rejected_scored` of
    tokens that are scored, `num_unscored` of completion tokens that are only seen, `num_beyond` of those for which
    `max_length` has no room. `overlap` is the share of scored tokens that both completions have, in any order.
    `prompt_key`, `chosen_key` and `rejected_key` are hashes of the ids, and `signature` those of `near_rows`. `reason`
    is `USABLE` or why the row is left out, `source` the place of the row's source among all sources.
    """

    index: np.ndarray
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    num_tokens: np.ndarray
    chosen_scored: np.ndarray
    rejected_scored: np.ndarray
    num_unscored: np.ndarray
    num_beyond: np.ndarray
    overlap: np.ndarray
    prompt_key: np.ndarray
    chosen_key: np.ndarray
    rejected_key: np.ndarray
    signature: np.ndarray
    reason: np.ndarray
    source: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def where(self, is_meant: np.ndarray) -> "RowFacts":
        """The facts of the rows for which the array holds."""
        return RowFacts(**{field.name: getattr(self, field.name)[is_meant] for field in fields(self)})

    def usable(self) -> "RowFacts":
        """The facts of the rows that are used."""
        return self.where(self.reason == USABLE)


_COUNTED = ("prompt", "chosen", "rejected", "num_tokens", "chosen_scored", "rejected_scored", "num_unscored",
            "num_beyond")  # fmt: skip
_KEYS = ("prompt_key", "chosen_key", "rejected_key")


def collect(
    dataset: Dataset, unusable: Mapping[str, Sequence[int]], cutting: Cutting, *, description: str, is_quiet: bool
) -> tuple[RowFacts, tuple[str, ...]]:
    """The facts of all rows of a dataset with token ids, and the names of its sources in the order of their first rows;
    no names without a column `source`. `unusable` are rows by reason."""
    num_rows = len(dataset)
    counts = {name: np.zeros(num_rows, dtype=np.int64) for name in _COUNTED}
    keys = {name: np.zeros(num_rows, dtype=np.uint64) for name in _KEYS}
    overlap = np.zeros(num_rows, dtype=np.float32)
    signature = np.zeros((num_rows, NUM_HASHES), dtype=np.uint32)
    with tqdm(total=num_rows, desc=description, unit=" rows", disable=is_quiet, leave=False) as bar:
        for pairs in read_pairs(dataset, cutting):
            rows = slice(pairs[0].index, pairs[-1].index + 1)
            for name, values in zip(_COUNTED, zip(*map(_counts, pairs), strict=True), strict=True):
                counts[name][rows] = values
            for name, values in zip(_KEYS, zip(*map(_hashes, pairs), strict=True), strict=True):
                keys[name][rows] = values
            overlap[rows] = overlaps(pairs)
            signature[rows] = signatures(pairs)
            bar.update(len(pairs))
    reason = np.full(num_rows, USABLE, dtype=np.int8)
    for name, rows_of_reason in unusable.items():
        reason[list(rows_of_reason)] = UNUSABLE_REASONS.index(name)
    source, sources = _sources(dataset)
    compared = {**keys, "overlap": overlap, "signature": signature}
    return RowFacts(index=np.arange(num_rows), **counts, **compared, reason=reason, source=source), sources


def _counts(pair: Pair) -> tuple[int, ...]:
    """The values of `_COUNTED`."""
    chosen, rejected = pair.chosen, pair.rejected
    scored = int(chosen.scored.sum()), int(rejected.scored.sum())
    seen = sum(each.seen_completion.stop - each.seen_completion.start for each in (chosen, rejected))
    return (
        len(chosen.prompt),
        len(chosen.completion),
        len(rejected.completion),
        chosen.num_seen + rejected.num_seen,
        *scored,
        seen - sum(scored),
        chosen.num_beyond + rejected.num_beyond,
    )


def _hashes(pair: Pair) -> tuple[int, int, int]:
    chosen, rejected = (
        xxhash.xxh3_64_intdigest(each.completion.astype("<i4").tobytes() + each.scored.tobytes())
        for each in (pair.chosen, pair.rejected)
    )
    return xxhash.xxh3_64_intdigest(pair.chosen.prompt.astype("<i4").tobytes()), chosen, rejected


def overlaps(pairs: Sequence[Pair]) -> np.ndarray:
    """For each pair, 2 |A and B| / (|A| + |B|) over the multisets A and B of its scored tokens (the coefficient of
    Sorensen and Dice): 1 where both completions are made of the same tokens, 0 where they share none."""
    most = 1 + max((int(each.completion.max(initial=0)) for pair in pairs for each in _sides(pair)), default=0)
    counted = []
    sizes = np.zeros(len(pairs))
    for side in (0, 1):
        scored = [_sides(pair)[side].completion[_sides(pair)[side].scored] for pair in pairs]
        lengths = np.array([len(ids) for ids in scored])
        sizes += lengths
        token_of_row = np.repeat(np.arange(len(pairs)), lengths) * most + np.concatenate(scored)
        counted.append(np.unique(token_of_row, return_counts=True))
    (chosen, of_chosen), (rejected, of_rejected) = counted
    both, in_chosen, in_rejected = np.intersect1d(chosen, rejected, assume_unique=True, return_indices=True)
    shared = np.minimum(of_chosen[in_chosen], of_rejected[in_rejected])
    common = np.bincount((both // most).astype(np.int64), weights=shared, minlength=len(pairs))
    return np.divide(2 * common, sizes, out=np.zeros(len(pairs)), where=sizes > 0)


def _sides(pair: Pair) -> tuple[Any, Any]:
    return pair.chosen, pair.rejected


def _sources(dataset: Dataset) -> tuple[np.ndarray, tuple[str, ...]]:
    if SOURCE not in dataset.column_names:
        return np.zeros(len(dataset), dtype=np.int64), ()
    codes: dict[str, int] = {}
    column: Any = dataset.select_columns([SOURCE])
    found = [
        codes.setdefault(NO_SOURCE if value in (None, "") else str(value), len(codes))
        for rows in column.iter(10_000)
        for value in rows[SOURCE]
    ]
    return np.array(found, dtype=np.int64), tuple(codes)
