"""What a store key is made of: all that a stored log-prob depends on, beside the tokens and other model inputs.

Everything that changes a log-prob is in the key or in the completion's content id, and nothing else is: no learning
rate, no loss, no path. So every run that would compute the same number finds it. Weights and config come as digests,
which makes a key short and known before any number is. `holdfast.reference.identity` computes them from a model.

Given up: reading from two keys what differs; digests only say that something does.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

Fact = str | int | float | bool | None

FOLDER_NAME = re.compile(r"[0-9a-f]{32}")
"""What the name of a store's folder looks like: the digest of its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKey:
    """What, beside the model's inputs, a stored log-prob depends on.

    `weights_digest` is that of the reference's tensors when they score; it changes when the reference moves.
    `config_digest` is that of the settings that change numbers. `numerics` holds what else does: dtype, autocast,
    attention family, ... `version` is the number of syncs of a moving reference, None for a fixed one. It changes no
    number, and stores that differ in it alone are read together. It says which stores the run that moves the reference
    may remove. `description` is for people, and not part of the digest.
    """

    weights_digest: str
    config_digest: str
    numerics: Mapping[str, Fact]
    version: int | None = None
    description: str = field(default="", compare=False)

    def facts(self) -> dict[str, Any]:
        """The key as a manifest holds it. The names are part of the disk format."""
        return {
            "weights": self.weights_digest,
            "config": self.config_digest,
            "numerics": dict(sorted(self.numerics.items())),
            "version": self.version,
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], description: str) -> Self:
        """The key whose `facts()` these are. KeyError or TypeError where no key has such facts."""
        texts = (facts["weights"], facts["config"], description)
        numerics, version = facts["numerics"], facts["version"]
        is_right = all(isinstance(text, str) for text in texts) and isinstance(numerics, dict)
        if not is_right or not all(map(_is_fact, numerics.values())):
            raise TypeError("weights, config and description are texts, and numerics are facts by name")
        if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
            raise TypeError("the version is a whole number or None")
        return cls(
            weights_digest=facts["weights"],
            config_digest=facts["config"],
            numerics=dict(numerics),
            version=version,
            description=description,
        )

    def digest(self) -> str:
        """BLAKE2b-128 of the facts, in hexadecimal: the name of the store's folder."""
        wrong = {name: value for name, value in self.numerics.items() if not isinstance(value, Fact)}
        if wrong:
            raise TypeError(
                f"the numerics of a store's key must be text, numbers, booleans or None; found {wrong}. Write what "
                "changes the numbers as text, such as str(dtype)."
            )
        text = json.dumps(self.facts(), sort_keys=True, allow_nan=False)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _is_fact(value: Any) -> bool:
    return isinstance(value, Fact) and not (isinstance(value, float) and not math.isfinite(value))
