"""Pairs by source, and by length: the same counts again for each group."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from holdfast.data.mixing.source_column import NO_SOURCE
from holdfast.inspect.lengths import histogram
from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.counts import Counts, counts_of
from holdfast.inspect.ranking.flipping import Objective
from holdfast.inspect.ranking.movement import Movement, movement_of


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Pairs that have something in common. `reference` are their counts under the reference; `policy` those under the
    trained policy and `movement` what training did, both None without a policy."""

    name: str
    reference: Counts
    policy: Counts | None
    movement: Movement | None


def group_of(name: str, reference: PairNumbers, policy: PairNumbers | None, objective: Objective | None) -> Group:
    """The group of all these pairs."""
    beta = None if objective is None else objective.options.beta
    return Group(
        name=name,
        reference=counts_of(reference, objective),
        policy=None if policy is None else counts_of(policy, None),
        movement=None if policy is None else movement_of(reference, policy, beta),
    )


def by_source(reference: PairNumbers, policy: PairNumbers | None, objective: Objective | None) -> tuple[Group, ...]:
    """A group for each source that has a pair, in the order of the sources; none where no pair has a source."""
    if not len(reference) or reference.source.max() < 0:
        return ()
    names = [*reference.sources, NO_SOURCE]
    codes = np.where(reference.source < 0, len(reference.sources), reference.source)
    return tuple(
        group_of(names[code], *_both(reference, policy, codes == code), objective) for code in np.unique(codes)
    )


def by_length(reference: PairNumbers, policy: PairNumbers | None, objective: Objective | None) -> tuple[Group, ...]:
    """A group for each length of the longer completion in scored tokens: 1, 2 to 3, 4 to 7, ..."""
    longer = np.maximum(reference.chosen_tokens, reference.rejected_tokens)
    return tuple(group_of(name, *_both(reference, policy, is_in), objective) for name, is_in in _length_bins(longer))


def _length_bins(lengths: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    for each in histogram(lengths) if len(lengths) else ():
        if each.count:
            name = str(each.first) if each.first == each.last else f"{each.first} to {each.last}"
            yield name, (lengths >= each.first) & (lengths <= each.last)


def _both(
    reference: PairNumbers, policy: PairNumbers | None, is_meant: NDArray[np.bool_]
) -> tuple[PairNumbers, PairNumbers | None]:
    return reference.where(is_meant), None if policy is None else policy.where(is_meant)
