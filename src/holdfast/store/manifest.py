"""The manifest of a store: a JSON file in its folder that says in words and values what the folder's name stands for.

The folder is named by a digest, which does not show what the numbers were computed with. The manifest holds the key
itself, so a folder can be understood years later, and a checksum of its own bytes. Given up: a count of what is stored,
for which the manifest would have to be rewritten with every shard.
"""

import contextlib
import datetime
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from holdfast.store.files import (
    FORMAT,
    DamagedError,
    NewerFormatError,
    is_newer,
    newer_format,
    parsed_json,
    read_file,
    write_durably,
)
from holdfast.store.key import FOLDER_NAME, StoreKey

MANIFEST = "manifest.json"
MOST_BYTES = 1 << 18
"""A manifest is smaller by far."""
# The checksum must stay at this place and in this form in all formats: it tells a newer manifest from a damaged one.
_CHECKSUM = b',\n  "checksum": "'
_END = b'"\n}\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A store's key, and when its first shard was about to be written (UTC, ISO 8601)."""

    key: StoreKey
    created: str

    @classmethod
    def new(cls, key: StoreKey) -> Self:
        """The manifest of a store that begins now."""
        return cls(key=key, created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def to_bytes(self) -> bytes:
        """The manifest as JSON. Its last entry is the BLAKE2b-128 of all bytes before it."""
        facts = {
            "format": FORMAT,
            "key": self.key.facts(),
            "description": self.key.description,
            "created": self.created,
        }
        body = json.dumps(facts, indent=2).encode().removesuffix(b"\n}")
        return body + _CHECKSUM + _checksum(body) + _END

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Self:
        """The manifest whose `to_bytes` are `data`; `path` is for messages.

        DamagedError if no manifest has these bytes, NewerFormatError if their format is newer.
        """
        body, separator, end = data.rpartition(_CHECKSUM)
        if not separator or end != _checksum(body) + _END:
            raise DamagedError("its checksum is not that of its content")
        facts = parsed_json(data)
        if is_newer(facts.get("format"), FORMAT):
            raise NewerFormatError(newer_format(path, facts["format"]))
        try:
            key, created = StoreKey.from_facts(facts["key"], facts["description"]), facts["created"]
        except (KeyError, TypeError) as error:
            raise DamagedError("it is something else") from error
        if not isinstance(created, str):
            raise DamagedError("it is something else")
        return cls(key=key, created=created)


def manifest_in(folder: Path) -> Manifest:
    """The manifest in a folder, whatever the folder's name. The errors of `read_manifest`."""
    path = folder / MANIFEST
    return Manifest.from_bytes(read_file(path, MOST_BYTES), path)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a store's folder.

    DamagedError if it is not as it was written or is another store's, FileNotFoundError where there is none,
    NewerFormatError if its format is newer.
    """
    manifest = manifest_in(folder)
    if manifest.key.digest() != folder.name:
        raise DamagedError(f"it is that of another store, {manifest.key.digest()}")
    return manifest


def keys_alike(root: Path, key: StoreKey) -> list[StoreKey]:
    """The keys of other stores in `root` that hold the same numbers: they differ from `key` in the version alone."""
    alike: list[StoreKey] = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if FOLDER_NAME.fullmatch(folder.name) and folder.name != key.digest():
            with contextlib.suppress(
                DamagedError, NewerFormatError, OSError
            ):  # reported when that store itself is opened
                other = read_manifest(folder).key
                if replace(other, version=key.version) == key:
                    alike.append(other)
    return alike


def write_manifest(folder: Path, key: StoreKey) -> None:
    """Writes a new manifest into a store's folder, in one piece. OSError."""
    write_durably(folder / MANIFEST, Manifest.new(key).to_bytes())


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).hexdigest().encode()
