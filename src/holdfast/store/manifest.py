"""What a store's numbers were computed with: its key, whose digest names its folder, and the manifest in that folder.

Everything that changes a log-prob is in the key or in the content id, and nothing else is. Weights and config come as
digests, so a key is known before any number is; the manifest says in words and values what the digest stands for, so
that a folder can be understood years later, and carries a checksum of its own bytes.
"""

import contextlib
import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from holdfast.store.shard import FORMAT, Damaged, newer_format, write_durably

MANIFEST = "manifest.json"
KEY_NAME = re.compile(r"[0-9a-f]{32}")
# The checksum's place and scheme must stay in all formats: it tells a newer manifest from a damaged one.
_CHECKSUM = b',\n  "checksum": "'
_END = b'"\n}\n'

Fact = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKey:
    """What, beside the model's inputs, a stored log-prob depends on.

    `weights` is the digest of the reference's tensors as they are when asked (of a moved one: as moved), `config` that
    of the settings that change numbers, `numerics` the rest that does: dtype, autocast, attention family, ... `version`
    is the number of syncs of a moving reference, None for a fixed one. It changes no number, and stores that differ in
    nothing else are read together; it says which store the run that moves it may remove. `description` is for people.
    """

    weights: str
    config: str
    numerics: Mapping[str, Fact]
    version: int | None = None
    description: str = field(default="", compare=False)

    def facts(self) -> dict[str, Any]:
        """The parts of the key, as a manifest holds them."""
        facts = {"weights": self.weights, "config": self.config, "numerics": dict(sorted(self.numerics.items()))}
        return facts | {"version": self.version}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], description: str) -> Self:
        """The key that gave `facts`. KeyError or TypeError where none can have."""
        return cls(
            weights=facts["weights"],
            config=facts["config"],
            numerics=dict(facts["numerics"]),
            version=facts["version"],
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A store's key, and when it was begun (UTC, ISO 8601)."""

    key: StoreKey
    created: str

    @classmethod
    def new(cls, key: StoreKey) -> Self:
        """The manifest of a store that begins now."""
        return cls(key=key, created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def to_bytes(self) -> bytes:
        """The manifest as JSON whose last entry is the BLAKE2b-128 of all bytes before it."""
        facts = {"format": FORMAT, "key": self.key.facts(), "description": self.key.description}
        facts["created"] = self.created
        body = json.dumps(facts, indent=2).encode().removesuffix(b"\n}")
        return body + _CHECKSUM + _checksum(body) + _END

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Self:
        """The manifest whose `to_bytes` gave `data`; `path` is for messages. Damaged if none did, ValueError if its
        format is newer."""
        body, separator, end = data.rpartition(_CHECKSUM)
        if not separator or end != _checksum(body) + _END:
            raise Damaged("its checksum is not that of its content")
        try:
            facts = json.loads(data)
            found = facts["format"]
            if found <= FORMAT:
                key = StoreKey.from_facts(facts["key"], facts["description"])
                return cls(key=key, created=facts["created"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Damaged("it is something else") from error
        raise ValueError(newer_format(path, found))


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a store's folder. Damaged if it is not as it was written or another store's, FileNotFoundError
    where there is none, ValueError if its format is newer."""
    path = folder / MANIFEST
    manifest = Manifest.from_bytes(path.read_bytes(), path)
    if manifest.key.digest() != folder.name:
        raise Damaged(f"it is that of another store, {manifest.key.digest()}")
    return manifest


def keys_alike(root: Path, key: StoreKey) -> list[StoreKey]:
    """The keys of the other stores in `root` whose numbers are those of `key`: they differ in the version alone."""
    found: list[StoreKey] = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if KEY_NAME.fullmatch(folder.name) and folder.name != key.digest():
            with contextlib.suppress(Damaged, ValueError, OSError):  # said where that store itself is opened
                other = read_manifest(folder).key
                if replace(other, version=key.version) == key:
                    found.append(other)
    return found


def write_manifest(folder: Path, key: StoreKey) -> None:
    """Writes a new manifest into a store's folder, in one piece. OSError."""
    write_durably(folder / MANIFEST, Manifest.new(key).to_bytes())


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).hexdigest().encode()
