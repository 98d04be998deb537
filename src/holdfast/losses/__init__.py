"""The preference losses: pure functions from the log-probs of pairs to one value per pair, in one table, `LOSSES`.

`table` says what a loss is. The losses are in `pairwise`, `reference_margin` and `reference_free`, each beside its
equation and below the options that it alone reads. `moments` is what some of them know of the batches before.
`modifiers` has f-divergences, LD-DPO and WPO, `objective` the weighted sum of losses and the logged rewards, `checks`
the refusal of meaningless combinations. A run finds a loss by its name in `LOSSES`, so a new one need not be listed
here.
"""

from holdfast.losses.checks import check_losses
from holdfast.losses.modifiers import (
    F_DIVERGENCES,
    MAX_EXPONENT,
    ModifierOptions,
    f_divergence_score,
    pair_logps,
    wpo_weights,
)
from holdfast.losses.moments import MarginMoments
from holdfast.losses.objective import (
    LossOptions,
    implicit_rewards,
    loss_terms,
    moments_after,
    preference_loss,
    sum_of_terms,
)
from holdfast.losses.pairwise import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    robust,
    sigmoid,
    sigmoid_norm,
    sppo_hard,
)
from holdfast.losses.reference_free import cpo, orpo, sft, simpo
from holdfast.losses.reference_margin import alpha_dpo, beta_dpo, dpop, hypo, hypo_norm, rainbow
from holdfast.losses.table import LOSSES, Loss, LossFunction, LossInputs, PairLogps

__all__ = [
    "F_DIVERGENCES",
    "LOSSES",
    "MAX_EXPONENT",
    "Loss",
    "LossFunction",
    "LossInputs",
    "LossOptions",
    "MarginMoments",
    "ModifierOptions",
    "PairLogps",
    "alpha_dpo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "beta_dpo",
    "check_losses",
    "cpo",
    "discopop",
    "dpop",
    "exo_pair",
    "f_divergence_score",
    "hinge",
    "hypo",
    "hypo_norm",
    "implicit_rewards",
    "ipo",
    "loss_terms",
    "moments_after",
    "nca_pair",
    "orpo",
    "pair_logps",
    "preference_loss",
    "rainbow",
    "robust",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
    "sum_of_terms",
    "wpo_weights",
]
