"""Which pairs a policy ranks rightly by log-prob, which it could, and how low a pair's loss must fall until it does.

Chen et al. 2024 (arXiv:2405.19534) compare a trained policy with the *idealised* one, the exact optimum of RLHF and
DPO for the preferences of the data. For a pair of which a share alpha of people prefers y_w, that policy has

    log pi*(y_w) - log pi*(y_l) = log pi_ref(y_w) - log pi_ref(y_l) + log(alpha / (1 - alpha)) / beta

where log(alpha / (1 - alpha)) is the difference of the true rewards (Bradley and Terry 1952). Even the idealised policy
leaves a pair wrong that the reference ranks wrongly by more than the second term.

Dimension: P pairs. `margins` are D = log pi(y_w) - log pi(y_l), `reference_margins` D_ref the same of the reference,
`rewards` r(y_w) - r(y_l); all in nats.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from science.settings import Setting, better_first, margins, true_margins
from science.training import Numbers, measured, train


def ranked(setting: Setting, options: Mapping[str, Any]) -> Numbers:
    """What is measured of the start policy trained with these options, and of the pairs that it ranks by log-prob.

    - `training_*`, of the training pairs as they were labelled. `training_wrong`: the share that the reference ranks
      wrongly; `training_ranking`: that the policy ranks rightly; `training_flipped`, `training_unflipped`: as in
      `measured`.
    - `true_*`, of the held-out pairs with the truly better text first, and `ideal_*`, the same of the exact optimum at
      this beta.
    - `reached_loss`, `needed_loss`, of the training pairs that the reference ranks wrongly: DPO's loss, and the loss at
      which they turn over; medians.
    - `rule`: the share of the training pairs whose loss is below the needed one if, and only if, the policy ranks them
      rightly. `accuracy_rule`: whose implicit reward is right if, and only if, the policy ranks them rightly.

    `ideal_*` and those of DPO's loss are at the run's own beta, so they say nothing of losses per token.
    """
    policy, beta = train(setting, setting.pairs, options), options["beta"]
    own, reference = margins(policy, setting.pairs), margins(setting.policy, setting.pairs)
    reached, needed = dpo_losses(own, reference, beta), needed_losses(reference, beta)
    better = better_first(setting.world, setting.held_out)
    own_better, reference_better = margins(policy, better), margins(setting.policy, better)
    ideal = idealised_margins(reference_better, true_margins(setting.world, better), beta)
    return measured(policy, setting, beta=beta) | {
        "training_wrong": share(reference < 0),
        "training_ranking": share(own > 0),
        "training_flipped": flipped_share(own, reference),
        "training_unflipped": unflipped_share(own, reference),
        "true_ranking": share(own_better > 0),
        "true_flipped": flipped_share(own_better, reference_better),
        "ideal_ranking": share(ideal > 0),
        "ideal_flipped": flipped_share(ideal, reference_better),
        "reached_loss": float(reached[reference < 0].median()),
        "needed_loss": float(needed[reference < 0].median()),
        "rule": share((reached < needed) == (own > 0)),
        "accuracy_rule": share((own > reference) == (own > 0)),
    }


def formula_and_optimum(setting: Setting, options: Mapping[str, Any]) -> Numbers:
    """The formula of the idealised policy beside the exact optimum, with the source as the reference.

    That optimum is `World.tilted_source`, found by dynamic programming without the formula. Of the held-out pairs, the
    truly better text first: `gap`, the largest difference between the two margins (nats); `agrees`, the share that both
    rank alike; `reference_agrees`, the share that the reference ranks as the optimum does.
    """
    world, beta = setting.world, options["beta"]
    pairs = better_first(world, setting.held_out)
    optimum, _ = world.tilted_source(beta)
    exact = optimum.token_logps(pairs.chosen).sum(1) - optimum.token_logps(pairs.rejected).sum(1)
    reference = world.source.token_logps(pairs.chosen).sum(1) - world.source.token_logps(pairs.rejected).sum(1)
    predicted = idealised_margins(reference, true_margins(world, pairs), beta)
    return {
        "gap": float((exact - predicted).abs().max()),
        "agrees": share((exact > 0) == (predicted > 0)),
        "reference_agrees": share((exact > 0) == (reference > 0)),
    }


def idealised_margins(
    reference_margins: Float[Tensor, "P"], rewards: Float[Tensor, "P"], beta: float
) -> Float[Tensor, "P"]:
    """`log pi*(y_w) - log pi*(y_l)` of the optimum at beta, by the formula above."""
    return reference_margins + rewards / beta


def dpo_losses(margins: Float[Tensor, "P"], reference_margins: Float[Tensor, "P"], beta: float) -> Float[Tensor, "P"]:
    """`-log sigmoid(beta (D - D_ref))`."""
    return -logsigmoid(beta * (margins - reference_margins))


def needed_losses(reference_margins: Float[Tensor, "P"], beta: float) -> Float[Tensor, "P"]:
    """`-log sigmoid(-beta D_ref)`: the loss below which the policy ranks the pair rightly, and else not.

    `D > 0` says the same as `beta (D - D_ref) > -beta D_ref`, and the loss falls as its argument grows (Chen et al.
    2024).
    """
    return -logsigmoid(-beta * reference_margins)


def share(which: Bool[Tensor, "P"], among: Bool[Tensor, "P"] | None = None) -> float:
    """The share of the pairs, or of those in `among`, that are in `which`; of no pairs it is 0."""
    among = torch.ones_like(which) if among is None else among
    return float((which & among).sum() / among.sum().clamp(min=1))


def flipped_share(margins: Float[Tensor, "P"], reference_margins: Float[Tensor, "P"]) -> float:
    """Of the pairs that the reference ranks wrongly (D_ref < 0), the share that the policy ranks rightly (D > 0)."""
    return share(margins > 0, reference_margins < 0)


def unflipped_share(margins: Float[Tensor, "P"], reference_margins: Float[Tensor, "P"]) -> float:
    """Of the pairs that the reference ranks rightly (D_ref > 0), the share that the policy ranks wrongly (D < 0)."""
    return share(margins < 0, reference_margins > 0)
