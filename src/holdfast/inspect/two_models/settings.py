"""Which settings of two models differ: those that change log-probs, and those of their configs that change none.

What counts is what the identity of a reference counts (`reference.identity`), so a setting that nobody thought of
counts. Numerics are how the two were computed here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from holdfast.inspect.two_models.sides import Side
from holdfast.inspect.two_models.weights import pattern_of
from holdfast.reference.identity.identity import Identity, numerics
from holdfast.scoring.causal_lm import unwrap

_CONFIG = re.compile(r"^(?:.*\.)?config\.")
_SAID_ELSEWHERE = ("vocab_size", "architectures", "model_type", "tie_word_embeddings", "quantization_config")
"""Entries of a config that the tensors and modules say as well."""
_NEVER_SHOWN = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting with another value in each model, as text; None where a model lacks it. `count` modules have it so."""

    name: str
    model: str | None
    reference: str | None
    count: int = 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings that differ: those that change log-probs (`counting`), entries of the configs and generation
    configs that change none (`without_effect`), and how the two were computed here (`numerics`)."""

    counting: tuple[Setting, ...]
    without_effect: tuple[Setting, ...]
    numerics: tuple[Setting, ...]


def compare_settings(
    model: Side, reference: Side, identities: tuple[Identity, Identity], device: torch.device
) -> Settings:
    """The settings that differ between two models, whose identities these are."""
    counting = _differing(*(_counting(each.settings) for each in identities))
    counting = [each for each in counting if not _CONFIG.sub("", each.name).startswith(_SAID_ELSEWHERE)]
    named = {_CONFIG.sub("", each.name) for each in counting}
    configs = [_config(side) for side in (model, reference)]
    is_same_kind = model.facts.kind == reference.facts.kind
    without = [
        each
        for each in _differing(*configs)
        if is_same_kind and each.name not in named and not each.name.startswith(_SAID_ELSEWHERE)
    ]
    how = [numerics(each, device=device, mixed_precision="no", layout="padded") for each in identities]
    return Settings(counting=_grouped(counting), without_effect=tuple(without), numerics=tuple(_differing(*how)))


def _counting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the bare model, without those of adapters, whose products are compared as weights."""
    return {name.removeprefix("."): value for name, value in settings.items() if "|" not in name}


def _config(side: Side) -> dict[str, Any]:
    causal_lm: Any = unwrap(side.model)
    values = _flat(causal_lm.config.to_dict())
    generation = getattr(causal_lm, "generation_config", None)
    if generation is not None:
        values |= _flat({"generation": generation.to_dict()})
    return {name: value for name, value in values.items() if not name.endswith(_NEVER_SHOWN)}


def _flat(values: Mapping[Any, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Setting]:
    names = dict.fromkeys((*ours, *theirs))
    return [
        Setting(name=name, model=_text(ours, name), reference=_text(theirs, name))
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _text(values: Mapping[str, Any], name: str) -> str | None:
    return str(values[name]) if name in values else None


def _grouped(settings: list[Setting]) -> tuple[Setting, ...]:
    """One setting for all modules of the same name in several layers that have it so; the config's own first."""
    counts: dict[tuple[str, str | None, str | None], int] = {}
    for each in settings:
        key = (pattern_of(each.name), each.model, each.reference)
        counts[key] = counts.get(key, 0) + 1
    grouped = [
        Setting(name=name, model=ours, reference=theirs, count=count) for (name, ours, theirs), count in counts.items()
    ]
    return tuple(sorted(grouped, key=lambda each: not each.name.startswith("config.")))
