"""A part of the pairs to train on: the scores of papers that contradict each other, and the part that they choose.

A pair's *explicit* margin is the difference of an external reward between chosen and rejected (here the true one), its
*implicit* margin that of a trained policy, `D - D_ref`, its *reference* margin `D_ref` alone; all with their sign.

- Qi et al. 2025, arXiv:2508.04149: the smallest implicit margins, with their sign in the authors' code.
- Deng et al. 2025, arXiv:2502.14560: large explicit and large implicit margins (`joint_probabilities`).
- Huang et al. 2025, arXiv:2503.01864: large explicit and small implicit margins (`alignment_potentials`).

Dimension: P pairs, K chosen ones.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.demo.world import Pairs
from science.settings import Scale, Setting, better_first, margins, setting, true_margins
from science.training import Numbers, measured, train

ALL = "all"
"""Every pair, without a choice."""


def trained_on_chosen(setting: Setting, options: Mapping[str, Any]) -> Numbers:
    """What is measured of the start policy trained with these options on a part of the setting's pairs.

    `labels`: "noisy", as they are, or "certain", the truly better text chosen. `by`: a score of `scores`, or `ALL`;
    `keep`: "smallest" or "largest"; `share`: of the pairs. The other options are those of `DPOConfig`. Besides, of the
    pairs of that part: `right_labels`, the share whose chosen text is truly better; `explicit`, `implicit` and
    `reference`, the means of their margins, nats.
    """
    training = {name: value for name, value in options.items() if name not in {"labels", "by", "keep", "share"}}
    pairs = labelled(setting, options["labels"])
    found = pair_margins(setting, options["labels"])
    if options["by"] != ALL:
        places = chosen_pairs(scores(found, options["by"], setting.seed), options["share"], options["keep"])
        pairs = Pairs(chosen=pairs.chosen[places], rejected=pairs.rejected[places])
        found = {name: of_pairs[places] for name, of_pairs in found.items()}
    policy = train(setting, pairs, training)
    return measured(policy, setting, beta=options["beta"]) | {
        "right_labels": float((found["explicit"] > 0).double().mean()),
        **{name: float(of_pairs.mean()) for name, of_pairs in found.items()},
    }


def labelled(setting: Setting, labels: str) -> Pairs:
    """The setting's pairs with labels of this kind."""
    return better_first(setting.world, setting.pairs) if labels == "certain" else setting.pairs


def pair_margins(of: Setting, labels: str) -> dict[str, Float[Tensor, "P"]]:
    """The explicit, implicit and reference margins of the setting's pairs with these labels, nats.

    The policy of the implicit ones is DPO's at beta 1, trained on all of these pairs.
    """
    return _pair_margins(of.seed, of.scale, of.folder, labels)


@functools.lru_cache(maxsize=2)
def _pair_margins(seed: int, scale: Scale, folder: Path, labels: str) -> dict[str, Tensor]:
    """As `pair_margins`; kept, since every choice from the same pairs reads them."""
    of = setting(seed, scale, folder)
    pairs = labelled(of, labels)
    reference = margins(of.policy, pairs)
    own = margins(train(of, pairs, {"loss_type": "sigmoid", "beta": 1.0}), pairs)
    return {"explicit": true_margins(of.world, pairs), "implicit": own - reference, "reference": reference}


def scores(found: Mapping[str, Float[Tensor, "P"]], by: str, seed: int) -> Float[Tensor, "P"]:
    """The score of each pair, by the name of a margin, "potential", "joint" or "random"."""
    if by == "potential":
        return alignment_potentials(found["explicit"], found["implicit"])
    if by == "joint":
        return joint_probabilities(found["explicit"], found["implicit"])
    if by == "random":
        return torch.rand(len(found["explicit"]), generator=torch.Generator().manual_seed(seed))
    return found[by]


def chosen_pairs(scores: Float[Tensor, "P"], share: float, keep: str) -> Int[Tensor, "K"]:
    """The places of the share of the pairs with the "smallest" or the "largest" scores, in the order of the pairs.

    K is `round(share * P)`, at least 1. Of equal scores those of earlier pairs are taken.
    """
    num_chosen = max(1, round(share * len(scores)))
    order = torch.argsort(scores, stable=True, descending={"smallest": False, "largest": True}[keep])
    return order[:num_chosen].sort().values


def alignment_potentials(explicit: Float[Tensor, "P"], implicit: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """`z(explicit) - z(|implicit|)`, z the standard score over the pairs, as the authors of arXiv:2503.01864 do."""
    return _standard_scores(explicit) - _standard_scores(implicit.abs())


def joint_probabilities(explicit: Float[Tensor, "P"], implicit: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """`p q / (p q + (1 - p) (1 - q))`: how sure both margins together are of the label (arXiv:2502.14560).

    p and q are the two margins mapped to [0, 1], where the ends are their quantiles at 5 and 95 %: our choice. Where
    one is 0 and the other 1, it is 1/2.
    """
    p, q = _between_quantiles(explicit), _between_quantiles(implicit)
    agreement, doubt = p * q, (1 - p) * (1 - q)
    return torch.where(agreement + doubt > 0, agreement / (agreement + doubt), 0.5)


def _standard_scores(values: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    return (values - values.mean()) / values.std(correction=0)


def _between_quantiles(values: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    low, high = torch.quantile(values, torch.tensor([0.05, 0.95], dtype=values.dtype))
    return ((values - low) / (high - low)).clamp(0, 1)
