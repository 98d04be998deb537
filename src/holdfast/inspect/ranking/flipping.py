"""How low a loss must go before the policy ranks a pair right that the reference ranks wrongly.

Chen et al. 2024, Theorem 4.1, arXiv:2405.19534. For a pair with c = log pi_ref(y_l|x) - log pi_ref(y_w|x), the policy
ranks it right, log pi_theta(y_w|x) >= log pi_theta(y_l|x), if and only if its DPO loss is at most

    -log sigma(beta c) = log(1 + exp(-beta c))

The loss starts at ln 2 = 0.693 for every pair. Where the reference is wrong by 50 nats and beta is 0.1, it must fall to
0.0067. The theorem follows from the loss being a falling function of m = beta (margin of the policy - margin of the
reference): the pair flips where m reaches beta c. So it holds for every loss of m, with that loss in place of DPO's.

A loss of m may stop pulling before m gets there: `ipo` has its least value at 1/2, `hinge` is 0 from 1 on, and label
smoothing eps puts it at log((1 - eps) / eps). A pair with beta c beyond that `rest` stays wrong where the loss is
least.

For `ipo` and `sigmoid_norm` m is of log-probs per token, and so is the ranking that flips.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from holdfast.inspect.ranking.shares import IsSo, Values
from holdfast.losses.modifiers import ModifierOptions
from holdfast.losses.objective import LossOptions, preference_loss
from holdfast.losses.table import LOSSES, PairLogps

OF_SUMS = ("sigmoid", "hinge", "exo_pair", "robust", "discopop")
"""Losses of m alone, with m of the sums of log-probs."""
OF_MEANS = ("ipo", "sigmoid_norm")
"""The same with log-probs per token."""
AGREEMENTS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Shares of raters that prefer the chosen completion, for which the optimum of DPO is ranked."""
_FARTHEST = 64.0
_STEP = 1e-3


def loss_to_flip(margins: Values, beta: float) -> Values:
    """[P]: the DPO loss -log sigma(beta c) below which the policy ranks a pair right; c is minus the reference's
    margin. Above ln 2 for pairs that the reference ranks right: their loss may rise that far before they are wrong."""
    return np.logaddexp(0.0, beta * margins)


def dpo_loss(reference: Values, policy: Values, beta: float) -> Values:
    """[P]: -log sigma(beta (policy's margin - reference's margin)) (Rafailov et al. 2023, Eq. 7, arXiv:2305.18290)."""
    return np.logaddexp(0.0, -beta * (policy - reference))


def is_wrong_at_optimum(margins: Values, beta: float, agreement: float) -> IsSo:
    """[P]: whether the policy that minimises the DPO loss over all policies ranks a pair wrongly, where a share
    `agreement` of raters prefers the chosen completion. That policy has (Chen et al. 2024, Theorem 3.1)

        log pi(y_w|x) - log pi(y_l|x) = margin of the reference + log(agreement / (1 - agreement)) / beta
    """
    return margins + math.log(agreement / (1 - agreement)) / beta < 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a run minimises, seen as a function of m. `losses` are the losses of m with their weights, and
    `is_per_token` says of which log-probs m is. `rest` is the m from which on they no longer fall, infinite if they
    always do. `obstacle` says, as a clause, why the loss at which a pair flips cannot be stated; None where it can."""

    losses: tuple[tuple[str, float], ...]
    options: LossOptions
    is_per_token: bool
    rest: float
    obstacle: str | None

    @classmethod
    def of(
        cls,
        options: LossOptions,
        loss_types: Sequence[str],
        loss_weights: Sequence[float] | None = None,
        modifiers: ModifierOptions | None = None,
    ) -> "Objective":
        """The objective of these losses. Without weights each counts once."""
        weights = loss_weights or [1.0] * len(loss_types)
        weighted = [(name, weight) for name, weight in zip(loss_types, weights, strict=True) if weight]
        terms = tuple((name, weight) for name, weight in weighted if name in (*OF_SUMS, *OF_MEANS))
        obstacle = _obstacle(options, [name for name, _ in weighted], modifiers or ModifierOptions())
        return cls(
            losses=terms,
            options=options,
            is_per_token=bool(terms) and terms[0][0] in OF_MEANS,
            rest=math.inf if obstacle else _rest(terms, options),
            obstacle=obstacle,
        )

    @property
    def is_plain(self) -> bool:
        """Whether it is the DPO loss itself."""
        return self.losses == (("sigmoid", 1.0),) and self.options.label_smoothing == 0

    def loss_at(self, m: Values) -> Values:
        """[P]: the weighted sum of the losses of m."""
        return _losses(self.losses, self.options, torch.from_numpy(np.ascontiguousarray(m))).numpy()


def _obstacle(options: LossOptions, names: Sequence[str], modifiers: ModifierOptions) -> str | None:
    preferences = [name for name in names if name != "sft"]
    if not any(LOSSES[name].needs_reference for name in preferences):
        return f"{' and '.join(names)} compares with no reference"
    for name in preferences:
        if name not in (*OF_SUMS, *OF_MEANS):
            return f"{name} is no function of the two margins of one pair"
    if len({name in OF_MEANS for name in preferences}) > 1:
        return f"{' and '.join(preferences)} compare sums with means"
    if options.f_divergence_type != "reverse_kl":
        return f"f_divergence_type {options.f_divergence_type} sees each completion's log ratio by itself"
    if modifiers.ld_alpha not in (None, 1):
        return "LD-DPO (ld_alpha) weighs the tokens of a pair differently"
    if modifiers.use_weighting:
        return "WPO (use_weighting) weighs each pair's loss by the policy's own likelihood"
    return None


def _losses(terms: Sequence[tuple[str, float]], options: LossOptions, m: torch.Tensor) -> torch.Tensor:
    """The losses of m in fp64, of pairs of single tokens whose reference is indifferent."""
    none, one = torch.zeros_like(m), torch.ones(len(m), dtype=torch.long)
    policy, reference = (
        PairLogps(chosen=chosen, rejected=none, chosen_lengths=one, rejected_lengths=one, chosen_likelihood=chosen)
        for chosen in (m / options.beta, none)
    )
    return preference_loss(
        policy,
        reference,
        loss_types=[name for name, _ in terms],
        loss_weights=[weight for _, weight in terms],
        options=options,
    )


def _rest(terms: Sequence[tuple[str, float]], options: LossOptions) -> float:
    """The m >= 0 from which on the losses no longer fall; infinite where they fall as far as is looked."""

    def falls(points: list[float]) -> list[bool]:
        m = torch.tensor(points, dtype=torch.float64, requires_grad=True)
        _losses(terms, options, m).sum().backward()
        assert m.grad is not None
        return (m.grad < 0).tolist()

    found = falls(np.arange(0.0, _FARTHEST, _STEP).tolist())
    if found[-1]:
        return math.inf
    high = (len(found) - found[::-1].index(True)) * _STEP if True in found else 0.0
    low = max(0.0, high - _STEP)
    for _ in range(50 if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if falls([middle])[0] else (low, middle)
    return high
