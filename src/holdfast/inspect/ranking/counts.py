"""All that is counted of how one model ranks a set of pairs: a dataset, one of its sources, or pairs of one length."""

from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.bias import LengthBias
from holdfast.inspect.ranking.flipping import AGREEMENTS, Objective, is_wrong_at_optimum, loss_to_flip
from holdfast.inspect.ranking.margins import Ranked, logps_per_token, margins, margins_per_token
from holdfast.inspect.ranking.shares import Share, Spread

LOW_LOSSES = (0.5, 0.1, 0.01)
"""For these losses it is counted how many wrong pairs flip only below them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Flipping:
    """What it takes to flip the pairs that the reference ranks wrongly by sum (see `flipping`).

    `loss` is the DPO loss at which each flips, and `only_below` how many of them flip only below a loss. `at_optimum`
    is how many of all pairs the optimum of DPO would still rank wrongly, by the share of raters that prefer chosen.
    `own_loss` is the loss of the run at which each wrong pair flips, where that is another than DPO's and can be
    stated; its wrong pairs are those per token where the run's losses compare means. `out_of_reach` are wrong pairs
    that are still wrong where the run's losses are least. None where there are no wrong pairs, or no such loss."""

    loss: Spread | None
    only_below: dict[float, Share]
    at_optimum: dict[float, Share]
    own_loss: Spread | None
    out_of_reach: Share | None

    @classmethod
    def of(cls, numbers: PairNumbers, objective: Objective) -> "Flipping":
        """What it takes under this objective."""
        beta = objective.options.beta
        by_sum = margins(numbers)
        to_flip = loss_to_flip(by_sum, beta)[by_sum < 0]
        own = margins_per_token(numbers) if objective.is_per_token else by_sum
        needed = -beta * own[own < 0]
        is_stated = objective.obstacle is None
        return cls(
            loss=Spread.of(to_flip),
            only_below={limit: Share.of(to_flip < limit) for limit in LOW_LOSSES},
            at_optimum={share: Share.of(is_wrong_at_optimum(by_sum, beta, share)) for share in AGREEMENTS},
            own_loss=Spread.of(objective.loss_at(needed)) if is_stated and not objective.is_plain else None,
            out_of_reach=Share.of(needed > objective.rest) if is_stated else None,
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How alike the completions of pairs are to the model: the CHES of those for which it is known, and normalised by
    lengths. The higher, the likelier training lowers the chosen completion's log-prob (Razin et al. 2024,
    arXiv:2410.08847). `above_zero` are pairs whose rejected completion reaches farther along the hidden states of the
    chosen one than the chosen one itself."""

    num_known: int
    ches: Spread
    normalised: Spread
    above_zero: Share

    @classmethod
    def of(cls, numbers: PairNumbers) -> "Likeness | None":
        """The likeness of these pairs; None where it is known of none."""
        is_known = np.isfinite(numbers.ches) & np.isfinite(numbers.normalised_ches)
        ches, normalised = Spread.of(numbers.ches[is_known]), Spread.of(numbers.normalised_ches[is_known])
        if ches is None or normalised is None:
            return None
        above_zero = Share.of(numbers.ches[is_known] > 0)
        return cls(num_known=ches.num_values, ches=ches, normalised=normalised, above_zero=above_zero)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How a model ranks pairs, of which there is at least one. `chosen` and `rejected` are log-probs per token, in
    nats. `flipping` is None where the run's losses compare with no reference, `likeness` where no CHES is known."""

    num_pairs: int
    by_sum: Ranked
    per_token: Ranked
    chosen: Spread
    rejected: Spread
    flipping: Flipping | None
    length: LengthBias
    likeness: Likeness | None


def counts_of(numbers: PairNumbers, objective: Objective | None) -> Counts:
    """The counts of these pairs. Without an objective nothing is said of flipping."""
    chosen, rejected = (Spread.of(values) for values in logps_per_token(numbers))
    assert chosen is not None, "there is a pair"
    assert rejected is not None
    return Counts(
        num_pairs=len(numbers),
        by_sum=Ranked.of(margins(numbers)),
        per_token=Ranked.of(margins_per_token(numbers)),
        chosen=chosen,
        rejected=rejected,
        flipping=None if objective is None else Flipping.of(numbers, objective),
        length=LengthBias.of(numbers),
        likeness=Likeness.of(numbers),
    )
