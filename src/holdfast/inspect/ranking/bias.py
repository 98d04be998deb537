"""What the lengths of completions have to do with how a model ranks pairs.

A sum of log-probs falls with every token, so by sums a model prefers the shorter completion of most pairs, whatever
they say. DPO starts from these sums, so wrong pairs whose chosen completion is longer may be wrong about length alone.
"""

from dataclasses import dataclass
from typing import final

from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.margins import length_differences, margins, margins_per_token
from holdfast.inspect.ranking.shares import Share, correlation, rank_correlation, slope


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBias:
    """Lengths are in scored tokens, and the difference is chosen minus rejected.

    `prefers_shorter` is how often the model gives the shorter completion the higher sum, and `prefers_longer_per_token`
    how often the longer one has the higher mean, of pairs with different lengths. `wrong_where_longer` and
    `wrong_where_shorter` are wrong pairs (by sum) of those whose chosen completion is the longer or the shorter one.
    `wrong_by_length` are pairs that are wrong by sum and right per token. The correlations are of margins with the
    difference of lengths; `nats_per_token` is by how much a margin changes with a token more of difference (least
    squares). None where the difference or the margin is the same for all pairs."""

    mean_chosen: float
    mean_rejected: float
    mean_difference: float
    longer: Share
    equal: Share
    prefers_shorter: Share
    prefers_longer_per_token: Share
    wrong_where_longer: Share
    wrong_where_shorter: Share
    wrong_by_length: Share
    correlation: float | None
    rank_correlation: float | None
    correlation_per_token: float | None
    nats_per_token: float | None

    @classmethod
    def of(cls, numbers: PairNumbers) -> "LengthBias":
        """What lengths have to do with the ranking of these pairs, of which there is at least one."""
        difference, by_sum, per_token = length_differences(numbers), margins(numbers), margins_per_token(numbers)
        differs, is_longer, is_shorter = difference != 0, difference > 0, difference < 0
        return cls(
            mean_chosen=float(numbers.chosen_tokens.mean()),
            mean_rejected=float(numbers.rejected_tokens.mean()),
            mean_difference=float(difference.mean()),
            longer=Share.of(is_longer),
            equal=Share.of(~differs),
            prefers_shorter=Share.of((by_sum * difference < 0)[differs]),
            prefers_longer_per_token=Share.of((per_token * difference > 0)[differs]),
            wrong_where_longer=Share.of((by_sum < 0)[is_longer]),
            wrong_where_shorter=Share.of((by_sum < 0)[is_shorter]),
            wrong_by_length=Share.of((by_sum < 0) & (per_token >= 0)),
            correlation=correlation(by_sum, difference),
            rank_correlation=rank_correlation(by_sum, difference),
            correlation_per_token=correlation(per_token, difference),
            nats_per_token=slope(by_sum, difference),
        )
