"""What a resumed policy computes with besides the tensors that its checkpoint brings back.

These are the frozen weights under its adapters, the settings of model and adapters, and, where no reference records it,
the training data. A run that is made with others goes on with another policy, and nothing that is loaded would show it:
with `lora_alpha` twice as large, the very same factors are another model. Given up: the frozen weights where they are
spread over processes, or read already as those of the captured reference.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, final

from peft import PeftType
from peft.utils import CONFIG_NAME
from torch import nn

from holdfast.checkpoint.policy_state import frozen_digest
from holdfast.policy.adapters import is_adapted
from holdfast.reference.identity.contents import adapter_settings
from holdfast.reference.identity.identity import config_settings

_OF_TRAINING = {
    "init_lora_weights", "init_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
}  # fmt: skip
"""Entries of an adapter's config about how it begins, and about which layers have it; its tensors show these."""
_MOVING: Mapping[Any, set[str]] = {PeftType.ADALORA: {"rank_pattern", "total_step"}}
"""Entries that training itself changes."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBase:
    """`weights` is the digest of the frozen weights under adapters, `settings` are those of the model's configs by
    dotted name, `data` is the digest of the training data. What is None is not recorded, or recorded elsewhere."""

    weights: str | None
    settings: Mapping[str, Any]
    data: str | None

    @classmethod
    def of_run(cls, policy: nn.Module, *, reads_weights: bool, data: str | None) -> Self:
        """The base of a policy that is about to train, before a checkpoint is loaded."""
        weights = frozen_digest(policy) if reads_weights and is_adapted(policy) else None
        return cls(weights=weights, settings=config_settings(policy), data=data)

    def record(self) -> dict[str, Any]:
        """What a manifest records."""
        return asdict(self)

    def check(self, checkpoint: Path, recorded: Mapping[str, Any] | None) -> None:
        """ValueError where `checkpoint` records another base. One of an earlier version records none."""
        if recorded is None:
            return
        meanings = {"weights": "the frozen weights under the policy's adapters", "data": "the training data"}
        for name, meaning in meanings.items():
            ours, theirs = getattr(self, name), recorded[name]
            if None not in (ours, theirs) and ours != theirs:
                raise _differs(checkpoint, meaning, theirs, ours)
        for name in sorted({*self.settings, *recorded["settings"]}):
            ours, theirs = self.settings.get(name), recorded["settings"].get(name)
            if ours != theirs:
                raise _differs(checkpoint, f"the policy's setting `{name.removeprefix('.config.')}`", theirs, ours)


def check_adapters(policy: nn.Module, checkpoint: Path) -> None:
    """ValueError where an adapter of `policy` has settings with which the tensors in `checkpoint` are another model, or
    none at all. A checkpoint without the adapters' configs is not checked."""
    if not is_adapted(policy):
        return
    for adapter, config in policy.peft_config.items():
        path = (checkpoint if adapter == "default" else checkpoint / adapter) / CONFIG_NAME
        if not path.is_file():
            continue
        theirs = _settings(json.loads(path.read_text(encoding="utf-8")))
        ours = _settings(config.to_dict())
        for name in ours.keys() & theirs.keys() - _MOVING.get(config.peft_type, set()):
            if _are_unlike(ours[name], theirs[name]):
                raise _differs(checkpoint, f"{name} of the adapter {adapter!r}", theirs[name], ours[name])


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that change what an adapter computes, as JSON has them: sets are sorted lists."""
    entries = {name: value for name, value in adapter_settings(config).items() if name not in _OF_TRAINING}
    plain = json.loads(
        json.dumps(entries, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
    return {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in plain.items()}


def _are_unlike(ours: Any, theirs: Any) -> bool:
    """Whether two entries differ. A pattern of names and a list of names may mean the same layers."""
    if isinstance(ours, str) != isinstance(theirs, str) and None not in (ours, theirs):
        return False
    return (ours or None) != (theirs or None)


def _differs(checkpoint: Path, what: str, recorded: Any, found: Any) -> ValueError:
    return ValueError(
        f"{checkpoint} was written by a run that differs in {what}: recorded {recorded!r}, found {found!r}. Resume "
        "with what that run had, or start a new run in another output_dir."
    )
