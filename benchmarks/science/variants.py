"""Runs that are measured on the way, or trained on other labels: `perform` functions beside `trained_and_measured`.

They stand apart from the experiments, so that a run that is kept stays good while what is said of it is edited.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback

from science.settings import Setting, better_first
from science.training import Numbers, measured, train


def watched_halfway(setting: Setting, options: Mapping[str, Any]) -> Numbers:
    """As `trained_and_measured`, and `reward_halfway` and `kl_halfway`: after half of the steps."""
    halfway = _Halfway(setting)
    policy = train(setting, setting.pairs, options, callbacks=[halfway])
    return {**measured(policy, setting, beta=options["beta"]), **halfway.numbers}


def with_certain_labels(setting: Setting, options: Mapping[str, Any]) -> Numbers:
    """As `trained_and_measured`, on the same pairs, of which the text with the larger true reward is always chosen."""
    pairs = better_first(setting.world, setting.pairs)
    return measured(train(setting, pairs, options), setting, beta=options["beta"])


class _Halfway(TrainerCallback):
    """Measures the policy after half of the steps."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.numbers: Numbers = {}

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == state.max_steps // 2:
            found = measured(model, self.setting)
            self.numbers = {"reward_halfway": found["reward"], "kl_halfway": found["kl"]}
