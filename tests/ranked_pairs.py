"""Eight pairs whose numbers are worked out by hand, under a reference and under a policy.

The reference's log-probs (nats) and tokens, the margin of the sums, and that of the means:

    row   chosen       rejected     sum             per token
    0     -10 in  5    -12 in  6    -10 + 12 =  2   -2 + 2 =  0  tied
    10    -20 in 10    -12 in  4    -20 + 12 = -8   -2 + 3 =  1  wrong by length alone
    20     -6 in  3     -2 in  2     -6 +  2 = -4   -2 + 1 = -1
    30     -4 in  2     -9 in  3     -4 +  9 =  5   -2 + 3 =  1
    40     -8 in  4     -8 in  2     -8 +  8 =  0   -2 + 4 =  2  tied by sum
    50    -30 in 10    -10 in 10    -30 + 10 = -20  -3 + 1 = -2
    60     -3 in  3    -15 in  5     -3 + 15 = 12   -1 + 3 =  2
    70    -12 in  4    -10 in  5    -12 + 10 = -2   -3 + 2 = -1
"""

from typing import Any

import numpy as np

from holdfast.inspect.pair_numbers import PairNumbers

NAN = float("nan")
CHOSEN = [-10, -20, -6, -4, -8, -30, -3, -12]
REJECTED = [-12, -12, -2, -9, -8, -10, -15, -10]
CHOSEN_TOKENS = [5, 10, 3, 2, 4, 10, 3, 4]
REJECTED_TOKENS = [6, 4, 2, 3, 2, 10, 5, 5]
AFTER_CHOSEN = [-12, -15, -9, -4, -10, -25, -0.3, -11]
AFTER_REJECTED = [-11, -18, -8, -19, -9, -30, -16, -9]


def eight_pairs(chosen: Any = CHOSEN, rejected: Any = REJECTED, **others: Any) -> PairNumbers:
    """The eight pairs with these log-probs."""
    values: dict[str, Any] = {
        "row": np.arange(8) * 10,
        "chosen_logps": np.array(chosen, dtype=np.float64),
        "rejected_logps": np.array(rejected, dtype=np.float64),
        "chosen_tokens": np.array(CHOSEN_TOKENS),
        "rejected_tokens": np.array(REJECTED_TOKENS),
        "prompt_tokens": np.full(8, 7),
        "source": np.array([0, 1, 0, 1, 0, 1, 0, 1]),
        "sources": ("maths", "prose"),
        "ches": np.array([1.0, -2, 3, -4, NAN, 6, -7, 8]),
        "normalised_ches": np.array([0.1, -0.2, 0.3, -0.4, NAN, 0.6, -0.7, 0.8]),
    }
    return PairNumbers(**(values | others))
