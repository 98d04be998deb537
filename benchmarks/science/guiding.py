"""References that are policies of their own: a guide that was trained before, and rounds that each have a reference.

- Pan et al. 2025, arXiv:2504.15843 (Pre-DPO): the start policy is trained a second time, with the policy that the first
  training made as its reference.
- Dong et al. 2024, arXiv:2405.07863: rounds, each on pairs of texts that the policy of the round before wrote, against
  the first reference.
- Kim et al. 2024, arXiv:2403.19270 (sDPO): rounds on parts of one dataset, each against the policy of the round before.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from holdfast.demo.experiment import one_thread, sample_pairs
from holdfast.demo.world import Pairs
from science.settings import Scale, Setting, setting
from science.training import Numbers, measured, train


def guided(setting: Setting, options: Mapping[str, Any]) -> Numbers:
    """What is measured of the start policy trained against a guide on the pairs that the guide was trained on.

    `guide`: the options of `DPOConfig` that the guide is trained with; the others are those of the second training.
    """
    training = {name: value for name, value in options.items() if name != "guide"}
    guide = _trained(setting.seed, setting.scale, setting.folder, json.dumps(options["guide"]))
    return measured(train(setting, setting.pairs, training, ref_model=guide), setting, beta=options["beta"])


@functools.lru_cache(maxsize=1)
def _trained(seed: int, scale: Scale, folder: Path, options: str) -> PreTrainedModel:
    """The start policy trained on the setting's pairs; kept for further trainings against it."""
    of = setting(seed, scale, folder)
    return train(of, of.pairs, json.loads(options))


def in_rounds(setting: Setting, options: Mapping[str, Any]) -> Numbers:
    """What is measured of the policy after several rounds, which together have as many pairs as one run, or a few less.

    `num_rounds`; `pairs`: "fresh", drawn from the policy that begins the round, or "parts" of the setting's pairs;
    `reference`: "base", the start policy, or "before", the policy that begins the round. The other options are those of
    `DPOConfig`. Pairs of the first round are a part of the setting's in any case: the start policy drew them.
    """
    own = {"num_rounds", "pairs", "reference"}
    training = {name: value for name, value in options.items() if name not in own}
    scale = setting.scale
    num_pairs = scale.num_train_steps // options["num_rounds"] * scale.num_pairs_per_step
    policy = setting.policy
    for round_ in range(options["num_rounds"]):
        if options["pairs"] == "fresh" and round_ > 0:
            generator = torch.Generator().manual_seed(1000 * (setting.seed + 1) + round_)
            with one_thread():
                pairs = sample_pairs(policy, setting.world, num_pairs, generator)
        else:
            part = slice(round_ * num_pairs, (round_ + 1) * num_pairs)
            pairs = Pairs(chosen=setting.pairs.chosen[part], rejected=setting.pairs.rejected[part])
        reference = policy if options["reference"] == "before" else setting.policy
        policy = train(setting, pairs, training, start=policy, ref_model=reference)
    return measured(policy, setting, beta=options["beta"])
