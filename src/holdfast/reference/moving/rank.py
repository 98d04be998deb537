"""The rank of a pair of factors: how far it may grow, and the cut that lowers it.

A pair `up [out R]`, `down [R in]` stands for the product `up down`. Every sync adds ranks, so a pair is cut to its
numerical rank from time to time, or replaced by its product where that takes less memory. Cuts are rare because they
are costly. Given up: the least memory at every moment.
"""

import torch
from torch import Tensor

TOLERANCE = 5e-5
"""The largest relative error of the product (Frobenius) that all cuts together may make. One cut is allowed a share of
it: two cuts are at least four syncs apart, and every sync multiplies the error of earlier cuts by `1 - alpha`."""

RANKS = 8
"""A pair is first cut at this many times the policy's rank, then at twice that rank, and so on."""

LARGEST_CUT = 512
"""The highest rank at which a cut is tried (8 r if that is higher), since its cost is cubic in the rank."""


def bound_rank(
    up: Tensor, down: Tensor, rank_before: int, rank_of_policy: int, tolerance: float
) -> tuple[Tensor, Tensor | None]:
    """The pair `up [out R]`, `down [R in]`, which is cut where R is above a limit, and `(product, None)` where R is so
    high that the product is smaller. `rank_before` is the rank before the sync."""
    rank = down.shape[0]
    break_even = break_even_rank(up, down)
    first = RANKS * rank_of_policy
    limit = first
    while limit < rank_before:
        limit *= 2
    limit = min(limit, break_even)
    if rank <= limit:
        return up, down
    if first <= limit <= max(LARGEST_CUT, first):
        cut = cut_rank(up, down, tolerance)
        if cut[1].shape[0] <= limit // 2:
            return cut
    return (up @ down, None) if rank > break_even else (up, down)


def cut_rank(up: Tensor, down: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The pair of least rank whose product is within `tolerance` of `up down` (Eckart and Young 1936).

    QR gives an orthonormal basis of the shorter factor's rows, and the Gram matrix of the other factor in that basis
    gives the principal directions. In fp64, since a Gram matrix resolves only the square root of a dtype's precision.
    """
    if up.shape[0] < down.shape[1]:
        transposed = cut_rank(down.T, up.T, tolerance)
        return transposed[1].T, transposed[0].T
    basis, triangle = torch.linalg.qr(down.T.double())  # [in K], [K R]
    rest = up.double() @ triangle.T  # [out K]
    squares, vectors = torch.linalg.eigh(rest.T @ rest)  # ascending
    squares = squares.clamp_min(0)
    dropped = int((squares.cumsum(0) <= tolerance**2 * squares.sum()).sum())
    vectors = vectors[:, min(dropped, len(squares) - 1) :]
    return (rest @ vectors).float(), (basis @ vectors).T.float()


def break_even_rank(up: Tensor, down: Tensor) -> int:
    """The rank R at which the pair `up [out R]`, `down [R in]` has as many numbers as its product."""
    out_features, in_features = up.shape[0], down.shape[1]
    return in_features * out_features // (in_features + out_features)
