"""Which pairs to look at: those that are extreme in something, with the reason why that matters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.margins import logps_per_token, margins, margins_per_token
from holdfast.inspect.ranking.movement import changes, is_memorised
from holdfast.inspect.ranking.shares import IsSo, Values


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """Some pairs of a dataset: what they have in common, why one should look at them, how many there are of the kind,
    and the places of the first of them among the dataset's used pairs, the most extreme first."""

    title: str
    reason: str
    num_pairs: int
    places: tuple[int, ...]


def picks_before(numbers: PairNumbers, most: int) -> tuple[Pick, ...]:
    """What to look at before training: at most so many pairs of each kind, of kinds that have any."""
    by_sum, per_token = margins(numbers), margins_per_token(numbers)
    known = np.isfinite(numbers.normalised_ches)
    made = (
        _pick("ranked wrongly by the most, by sum", "a label that is wrong, or a long chosen completion?",
              by_sum, by_sum < 0, most),
        _pick("ranked wrongly by the most, per token", "length is no excuse here: are the labels right?",
              per_token, per_token < 0, most),
        _pick("likeliest to lose the chosen completion's log-prob (normalised CHES)",
              "both completions look alike to the model: are they different enough to be learnt from?",
              -numbers.normalised_ches, known, most),
    )  # fmt: skip
    return tuple(pick for pick in made if pick.places)


def picks_after(reference: PairNumbers, policy: PairNumbers, most: int) -> tuple[Pick, ...]:
    """What to look at after training."""
    return tuple(pick for pick in _picks_after(reference, policy, most) if pick.places)


def _picks_after(reference: PairNumbers, policy: PairNumbers, most: int) -> Iterator[Pick]:
    before, after = margins(reference), margins(policy)
    change, (chosen, _) = after - before, changes(reference, policy)
    was_wrong, is_wrong = before < 0, after < 0
    chosen_per_token = logps_per_token(policy)[0]
    yield _pick("moved the most", "the margin changed by the most, up or down", -np.abs(change), change != 0, most)
    yield _pick("flipped", "wrong under the reference, right under the policy", -change, was_wrong & ~is_wrong, most)
    yield _pick("unflipped", "right under the reference, wrong under the policy: what was unlearnt?",
                change, ~was_wrong & is_wrong, most)  # fmt: skip
    yield _pick("still wrong by the most", "training did not get there", after, was_wrong & is_wrong, most)
    yield _pick("displaced by the most", "the chosen completion lost the most log-prob", chosen, chosen < 0, most)
    yield _pick("memorised", "nearly certain now, token by token, and was not before",
                -chosen_per_token, is_memorised(reference, policy), most)  # fmt: skip


def _pick(title: str, reason: str, order: Values, is_meant: IsSo, most: int) -> Pick:
    """The pairs that are meant, the least of `order` first; of equal ones the earlier."""
    places: NDArray[np.int64] = np.flatnonzero(is_meant)
    ordered = places[np.argsort(order[places], kind="stable")]
    return Pick(title=title, reason=reason, num_pairs=len(places), places=tuple(map(int, ordered[:most])))
