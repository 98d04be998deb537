"""An inspection of a run's pairs: every dataset counted under the reference and, after training, under the policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.flipping import Objective
from holdfast.inspect.ranking.groups import Group, by_length, by_source, group_of
from holdfast.inspect.ranking.movement import check_same_pairs
from holdfast.inspect.ranking.picks import Pick, picks_after, picks_before
from holdfast.inspect.ranking.texts import PairText, TextReader

_SHOWN = 5


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredDataset:
    """What an inspection is made of: a dataset's name, its pairs under the reference and under the policy (None before
    training), and what reads their text."""

    name: str
    reference: PairNumbers
    policy: PairNumbers | None
    texts: TextReader


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRanking:
    """A dataset's pairs: all of them, each source, each length, and those to look at, with their texts by place."""

    name: str
    reference: PairNumbers
    policy: PairNumbers | None
    whole: Group
    by_source: tuple[Group, ...]
    by_length: tuple[Group, ...]
    picks: tuple[Pick, ...]
    texts: dict[int, PairText]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankingInspection:
    """The pairs of a run. `reference` and `policy` say in words which models these are; `policy` is None before
    training. `objective` is None where the run's losses compare with no reference. `notes` is what else is to be said,
    and `not_read` has the reason for each dataset that is not shown, by name."""

    reference: str
    policy: str | None
    loss_types: tuple[str, ...]
    objective: Objective | None
    datasets: tuple[DatasetRanking, ...]
    notes: tuple[str, ...] = ()
    not_read: Mapping[str, str] = field(default_factory=dict)


def inspect_ranking(
    datasets: Sequence[ScoredDataset],
    *,
    reference: str,
    policy: str | None = None,
    loss_types: Sequence[str] = ("sigmoid",),
    objective: Objective | None = None,
    num_shown: int = _SHOWN,
    notes: Sequence[str] = (),
    not_read: Mapping[str, str] | None = None,
) -> RankingInspection:
    """The inspection of these datasets, with the texts of `num_shown` pairs of each kind. ValueError where a log-prob
    is no finite number, or where reference and policy were not asked about the same pairs."""
    return RankingInspection(
        reference=reference,
        policy=policy,
        loss_types=tuple(loss_types),
        objective=objective,
        datasets=tuple(_ranking(dataset, objective, num_shown) for dataset in datasets),
        notes=tuple(notes),
        not_read=dict(not_read or {}),
    )


def _ranking(dataset: ScoredDataset, objective: Objective | None, num_shown: int) -> DatasetRanking:
    reference, policy = dataset.reference, dataset.policy
    _check(dataset.name, "reference", reference)
    if policy is not None:
        _check(dataset.name, "policy", policy)
        check_same_pairs(reference, policy)
    picks = picks_before(reference, num_shown)
    if policy is not None:
        picks = (*picks_after(reference, policy, num_shown), *picks)
    places = sorted({place for pick in picks for place in pick.places})
    return DatasetRanking(
        name=dataset.name,
        reference=reference,
        policy=policy,
        whole=group_of(dataset.name, reference, policy, objective),
        by_source=by_source(reference, policy, objective),
        by_length=by_length(reference, policy, objective),
        picks=picks,
        texts={place: dataset.texts.text(place, int(reference.row[place])) for place in places},
    )


def _check(name: str, model: str, numbers: PairNumbers) -> None:
    """ValueError where there is no pair, or where one has no finite log-prob or no scored token."""
    if not len(numbers):
        raise ValueError(
            f"the pairs of the {name} dataset were to be ranked, but it has no usable pair. Add rows to it."
        )
    is_bad = ~(np.isfinite(numbers.chosen_logps) & np.isfinite(numbers.rejected_logps))
    is_bad |= (numbers.chosen_tokens < 1) | (numbers.rejected_tokens < 1)
    if is_bad.any():
        place = int(np.flatnonzero(is_bad)[0])
        raise ValueError(
            f"the pairs of the {name} dataset were to be ranked by the {model}'s log-probs, but {int(is_bad.sum()):,} "
            f"of {len(numbers):,} pairs have none that are finite. The first is row {int(numbers.row[place]):,}: "
            f"chosen {numbers.chosen_logps[place]}, rejected {numbers.rejected_logps[place]}. Look at that row, and at "
            "the model's precision."
        )
