"""Margins of pairs, and whether a model ranks them wrongly: by the sum of log-probs, and per token.

A pair's margin is log pi(y_w|x) - log pi(y_l|x), in nats, of one model alone. It is no reward: rewards compare two
models. Both ways to rank are shown, since a sum prefers short completions whatever they say, and a mean long ones.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.shares import Share, Spread, Values


def margins(numbers: PairNumbers) -> Values:
    """[P], nats: log pi(y_w|x) - log pi(y_l|x), of the sums over scored tokens."""
    return numbers.chosen_logps - numbers.rejected_logps


def margins_per_token(numbers: PairNumbers) -> Values:
    """[P], nats per token: log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|."""
    chosen, rejected = logps_per_token(numbers)
    return chosen - rejected


def logps_per_token(numbers: PairNumbers) -> tuple[Values, Values]:
    """Mean log-probs of the scored tokens: chosen, rejected."""
    return numbers.chosen_logps / numbers.chosen_tokens, numbers.rejected_logps / numbers.rejected_tokens


def length_differences(numbers: PairNumbers) -> Values:
    """[P], scored tokens: |y_w| - |y_l|."""
    return (numbers.chosen_tokens - numbers.rejected_tokens).astype(np.float64)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """How a model ranks pairs by one of the two margins. A pair is `wrong` where the margin is below 0, and `tied`
    where it is 0: a tie counts as right, as in Chen et al. 2024, Definition 2.1, arXiv:2405.19534."""

    wrong: Share
    tied: Share
    margins: Spread

    @classmethod
    def of(cls, values: Values) -> "Ranked":
        """The ranking by these margins, of which there is at least one."""
        spread = Spread.of(values)
        assert spread is not None
        return cls(wrong=Share.of(values < 0), tied=Share.of(values == 0), margins=spread)
