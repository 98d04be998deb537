"""The margins by which pairs are chosen. Each is a number of a pair, from log-probs that a store holds.

Papers disagree about which pairs are worth most: those with a small implicit margin (Qi et al. 2025, arXiv:2508.04149)
or with a large one (Deng et al. 2025, arXiv:2502.14560). So the choice is the user's. A small margin can mean a hard
pair or a wrong label; only the pair itself tells.
"""

import numpy as np

from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.margins import margins, margins_per_token
from holdfast.inspect.ranking.shares import Values
from holdfast.inspect.selection.request import By
from holdfast.scoring.tolerance import TOLERANCE_NATS_MEAN


def margins_by(
    by: By, reference: PairNumbers, policy: PairNumbers | None, *, beta: float, per_token: bool = False
) -> Values:
    """[P]: the margin of each pair. With D = log pi(y_w|x) - log pi(y_l|x), of the mean per token where `per_token`:

    implicit_margin     beta * (D_policy - D_reference)   (Rafailov et al. 2023, arXiv:2305.18290: the difference of
                                                          implicit rewards, as in the metric `rewards/margins`)
    reference_margin    D_reference, nats
    policy_margin       D_policy, nats
    """
    margin = margins_per_token if per_token else margins
    if by is By.REFERENCE:
        return margin(reference)
    assert policy is not None, "a margin of the policy was asked for, and there is none"
    return margin(policy) if by is By.POLICY else beta * (margin(policy) - margin(reference))


def are_one_model(reference: PairNumbers, policy: PairNumbers) -> bool:
    """Whether rounding explains the mean difference per token between the log-probs of the two."""
    moved = sum(
        float(np.abs(ours - theirs).sum())
        for ours, theirs in (
            (policy.chosen_logps, reference.chosen_logps),
            (policy.rejected_logps, reference.rejected_logps),
        )
    )
    return moved <= TOLERANCE_NATS_MEAN * float((reference.chosen_tokens + reference.rejected_tokens).sum())
