"""The same pairs under a reference and under the policy that was trained from it: what flipped, and what moved where.

A log-prob that falls is no fault by itself. DPO raises margins, and does so mostly by lowering the rejected completion
and the chosen one with it ("displacement", Razin et al. 2024, arXiv:2410.08847), so both are counted here by
themselves.
"""

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.flipping import dpo_loss
from holdfast.inspect.ranking.margins import length_differences, logps_per_token, margins, margins_per_token
from holdfast.inspect.ranking.shares import IsSo, Share, Spread, Values, correlation, rank_correlation

MEMORISED = 0.9
"""From this probability per token on (the geometric mean over its tokens), a completion counts as memorised."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """Where a ranking changed, as shares of all pairs: from wrong to right (`flipped`), from right to wrong
    (`unflipped`), or not. `flipped_of_wrong` is the share of pairs that the reference ranked wrongly. `towards` are
    pairs that are still wrong though their margin rose."""

    flipped: Share
    unflipped: Share
    still_wrong: Share
    still_right: Share
    flipped_of_wrong: Share
    towards: Share

    @classmethod
    def of(cls, before: Values, after: Values) -> "Flips":
        """The changes from these margins to those."""
        was_wrong, is_wrong = before < 0, after < 0
        return cls(
            flipped=Share.of(was_wrong & ~is_wrong),
            unflipped=Share.of(~was_wrong & is_wrong),
            still_wrong=Share.of(was_wrong & is_wrong),
            still_right=Share.of(~was_wrong & ~is_wrong),
            flipped_of_wrong=Share.of(~is_wrong[was_wrong]),
            towards=Share.of(was_wrong & is_wrong & (after > before)),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """What training did to pairs, of which there is at least one. Differences are policy minus reference.

    `rose` are pairs whose margin rose: the `rewards/accuracies` of the policy. `displaced` are those whose chosen
    completion lost log-prob, and `squeezed` those of them whose margin rose all the same; `both_fell` and
    `rejected_rose` say what the rejected one did. `memorised` are pairs whose chosen completion has a probability per
    token of at least `MEMORISED` under the policy and had less under the reference. `chosen`, `rejected` and `margins`
    are changes of sums, `chosen_per_token` and `rejected_per_token` of means, in nats. `loss` is the DPO loss; None
    without a beta. The correlations are of changes with the difference of lengths (margins), and of the chosen
    completion's change with CHES: of sums with `ches`, of means with the normalised one."""

    by_sum: Flips
    per_token: Flips
    rose: Share
    displaced: Share
    squeezed: Share
    both_fell: Share
    rejected_rose: Share
    memorised: Share
    chosen: Spread
    rejected: Spread
    margins: Spread
    chosen_per_token: Spread
    rejected_per_token: Spread
    loss: Spread | None
    length_correlation: float | None
    ches_correlation: float | None
    normalised_ches_correlation: float | None


def movement_of(reference: PairNumbers, policy: PairNumbers, beta: float | None) -> Movement:
    """The movement of these pairs, with the DPO loss at this beta. ValueError where they are not the same pairs."""
    check_same_pairs(reference, policy)
    chosen, rejected = changes(reference, policy)
    before, after = margins(reference), margins(policy)
    change = after - before
    of_tokens = [now - then for now, then in zip(logps_per_token(policy), logps_per_token(reference), strict=True)]
    is_known = np.isfinite(reference.ches) & np.isfinite(reference.normalised_ches)
    return Movement(
        by_sum=Flips.of(before, after),
        per_token=Flips.of(margins_per_token(reference), margins_per_token(policy)),
        rose=Share.of(change > 0),
        displaced=Share.of(chosen < 0),
        squeezed=Share.of((chosen < 0) & (change > 0)),
        both_fell=Share.of((chosen < 0) & (rejected < 0)),
        rejected_rose=Share.of(rejected > 0),
        memorised=Share.of(is_memorised(reference, policy)),
        chosen=_spread(chosen),
        rejected=_spread(rejected),
        margins=_spread(change),
        chosen_per_token=_spread(of_tokens[0]),
        rejected_per_token=_spread(of_tokens[1]),
        loss=None if beta is None else Spread.of(dpo_loss(before, after, beta)),
        length_correlation=correlation(change, length_differences(reference)),
        ches_correlation=rank_correlation(chosen[is_known], reference.ches[is_known]),
        normalised_ches_correlation=rank_correlation(of_tokens[0][is_known], reference.normalised_ches[is_known]),
    )


def changes(reference: PairNumbers, policy: PairNumbers) -> tuple[Values, Values]:
    """[P], nats: how much the log-prob of each completion rose: chosen, rejected."""
    return policy.chosen_logps - reference.chosen_logps, policy.rejected_logps - reference.rejected_logps


def is_memorised(reference: PairNumbers, policy: PairNumbers) -> IsSo:
    """[P]: whether exp(log pi(y_w|x) / |y_w|) is at least `MEMORISED` under the policy, and less under the
    reference."""
    limit = math.log(MEMORISED)
    return (logps_per_token(policy)[0] >= limit) & (logps_per_token(reference)[0] < limit)


def check_same_pairs(reference: PairNumbers, policy: PairNumbers) -> None:
    """ValueError where the two are not numbers of the same rows, scored on the same tokens."""
    for name in ("row", "chosen_tokens", "rejected_tokens"):
        of_reference, of_policy = getattr(reference, name), getattr(policy, name)
        if not np.array_equal(of_reference, of_policy):
            raise ValueError(
                f"reference and policy were to be compared on the same pairs, but their {name} differ: "
                f"{_difference(of_reference, of_policy)}. Inspect both with one run file, over the same data."
            )


def _difference(first: np.ndarray, second: np.ndarray) -> str:
    if len(first) != len(second):
        return f"{len(first):,} and {len(second):,} pairs"
    place = int(np.flatnonzero(first != second)[0])
    return f"{int(first[place]):,} and {int(second[place]):,} at pair {place:,}"


def _spread(values: Values) -> Spread:
    spread = Spread.of(values)
    assert spread is not None, "there is a pair"
    return spread
