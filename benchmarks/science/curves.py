"""Runs of several strengths as one curve, so that methods can be compared at the same KL.

What is interpolated is how far a run stays below the largest reward that its KL allows. That changes slowly along a
curve, while the reward itself bends: a straight line between two rewards would lie below the curve.
"""

from collections.abc import Sequence
from itertools import pairwise

from science.records import Results


def below_at(results: Results, runs: Sequence[str], kls: Sequence[float]) -> list[float]:
    """Of each seed, how far below the ceiling the runs are at `kls[place of the seed]`, nats.

    `runs` are ordered from the strongest anchor to the weakest. A curve begins at the start policy, with 0 below at a
    KL of 0, and ends where the KL no longer grows; beyond its end its last value counts (see `reach`).
    """
    curves = _curves(results, runs)
    return [interpolated(curve, kl) for curve, kl in zip(curves, kls, strict=True)]


def reach(results: Results, runs: Sequence[str]) -> list[float]:
    """The KL at which each seed's curve ends, nats."""
    return [curve[-1][0] for curve in _curves(results, runs)]


def rising(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (KL, below) up to the first fall of the KL, after that of the start policy."""
    found = [(0.0, 0.0)]
    for point in points:
        if point[0] <= found[-1][0]:
            break
        found.append(point)
    return found


def interpolated(curve: Sequence[tuple[float, float]], kl: float) -> float:
    """The straight line between the two points next to `kl`."""
    for (kl_before, before), (kl_after, after) in pairwise(curve):
        if kl <= kl_after:
            return before + (after - before) * (kl - kl_before) / (kl_after - kl_before)
    return curve[-1][1]


def _curves(results: Results, runs: Sequence[str]) -> list[list[tuple[float, float]]]:
    points = [list(zip(results.values(run, "kl"), results.values(run, "below"), strict=True)) for run in runs]
    return [rising(of_seed) for of_seed in zip(*points, strict=True)]
