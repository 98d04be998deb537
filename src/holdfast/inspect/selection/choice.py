"""Which pairs are chosen, from one number of each: the smallest, the largest, those in the middle, or any."""

import math

import numpy as np
from numpy.typing import NDArray

from holdfast.inspect.ranking.shares import Values
from holdfast.inspect.selection.request import Keep


def num_chosen(share: float, num_pairs: int) -> int:
    """How many of so many pairs a share is: the nearest whole number, a half upwards, and at least one."""
    return max(1, math.floor(share * num_pairs + 0.5))


def chosen(values: Values, share: float, keep: Keep, *, seed: int = 0) -> NDArray[np.int64]:
    """The places of the chosen values, in rising order. Of equal values the first ones count as smaller, except for
    `LARGEST`, which prefers them too. `MIDDLE` leaves out as many at either end, or one more of the largest. `seed` is
    that of `RANDOM`."""
    number = num_chosen(share, len(values))
    if keep is Keep.RANDOM:
        return np.sort(np.random.default_rng(seed).permutation(len(values))[:number])
    order = np.argsort(-values if keep is Keep.LARGEST else values, kind="stable")
    first = (len(values) - number) // 2 if keep is Keep.MIDDLE else 0
    return np.sort(order[first : first + number])
