"""A covering array: few rows of a table that still hold every combination of a few of its factors' values.

A fault mostly needs two or three values together, so such rows find nearly all that the whole table finds, for a
fraction of its time. `make test` runs the covering rows, `make nightly` runs every row.

A test says `@pytest.mark.covering(strength)` above its parameters. With strength 1 each parameter's every value runs at
least once, with strength 2 every two values together, and so on; the other rows get the mark `nightly`.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest

Row = tuple[Hashable, ...]
Combination = tuple[tuple[int, Hashable], ...]


def combinations_of(row: Row, strength: int) -> Iterator[Combination]:
    """The combinations of `strength` of the row's values, each value with the number of its factor."""
    return combinations(enumerate(row), min(strength, len(row)))


def covered(rows: Sequence[Row], strength: int) -> set[Combination]:
    """Every combination of `strength` values that is in at least one of `rows`."""
    return {combination for row in rows for combination in combinations_of(row, strength)}


def covering(rows: Sequence[Row], strength: int) -> list[Row]:
    """Some of `rows`, in their order, that hold every combination of `strength` values that `rows` hold.

    The choice is greedy: the row with most combinations that are still missing comes next; among equals the one with
    most missing combinations of one value more, which spreads the other factors; among those the first. A row that the
    later ones made needless is left out in the end, so each row that is returned is needed. The result depends on the
    rows alone.
    """
    missing, missing_larger = covered(rows, strength), covered(rows, strength + 1)
    chosen: list[Row] = []

    def gain(row: Row) -> tuple[int, int]:
        larger = sum(combination in missing_larger for combination in combinations_of(row, strength + 1))
        return sum(combination in missing for combination in combinations_of(row, strength)), larger

    while missing:
        best = max(rows, key=gain)
        chosen.append(best)
        missing -= set(combinations_of(best, strength))
        missing_larger -= set(combinations_of(best, strength + 1))
    holders = Counter(combination for row in chosen for combination in combinations_of(row, strength))
    for row in list(chosen):
        if all(holders[combination] > 1 for combination in combinations_of(row, strength)):
            chosen.remove(row)
            holders.subtract(combinations_of(row, strength))
    return [row for row in dict.fromkeys(rows) if row in set(chosen)]


def mark_nightly(items: Sequence[Any]) -> None:
    """Marks those of pytest's items that covering rows of their own test's parameters stand for.

    Two rows have the same value of a parameter if it is the same object. An item that is
    collected alone, by its name, covers itself.
    """
    tables: dict[tuple[Any, int], list[tuple[Row, Any]]] = defaultdict(list)
    for item in items:
        if (marker := item.get_closest_marker("covering")) is not None:
            (strength,) = marker.args
            tables[item.function, strength].append((tuple(map(id, item.callspec.params.values())), item))
    for (_, strength), table in tables.items():
        chosen = set(covering([row for row, _ in table], strength))
        for row, item in table:
            if row not in chosen:
                item.add_marker(pytest.mark.nightly)
