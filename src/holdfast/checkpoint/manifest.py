"""A checkpoint's `reference/manifest.json`: what the checkpoint holds, and that its save was finished.

It is written last, so a kill inside a save leaves a folder that no resume chooses. It records the size and the digest
of every other file, and a checksum of itself. Manifests of earlier versions have neither and are read unchecked. Given
up: resuming from checkpoints without a manifest, since their reference is not recorded; see `adoption` for those.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from holdfast.checkpoint.files import FOLDER, DamagedError, read_regular
from holdfast.checkpoint.foreign import writer_of

MANIFEST = "manifest.json"
FORMAT = 2

_NAME = re.compile(r"checkpoint-(\d+)")
_FILE = f"{FOLDER}/{MANIFEST}"
_TYPES: Mapping[str, tuple[type, ...]] = {
    "kind": (str,),
    "place": (dict,),
    "policy": (str, type(None)),
    "policy_base": (dict, type(None)),
    "template_date": (str, type(None)),
    "files": (dict,),
    "optimizer": (dict, type(None)),
    "engine": (dict,),
    "version": (int,),
    "drift": (int, float, type(None)),
    "state": (str, type(None)),
    "settings": (dict, type(None)),
    "numerics": (dict, type(None)),
}
_REQUIRED = ("kind", "place")
_REQUIRED_OF_A_REFERENCE = ("version", "drift", "state")


def to_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON, with a checksum of itself."""
    return json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=2) + "\n"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. DamagedError where there is none, or where it is not as it was written;
    ValueError for one of a newer format."""
    path = checkpoint / FOLDER / MANIFEST
    if not os.path.lexists(path):
        by = writer_of(checkpoint)
        how = f"it was written by {by}" if by else "it was never finished, or written by something else"
        raise DamagedError(
            f"it has no {_FILE}: {how}, so which reference it trained against is not recorded"
            if checkpoint.is_dir()
            else "there is no such folder"
        )
    try:
        manifest = json.loads(read_regular(path, _FILE))
    except DamagedError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its file {_FILE} is no JSON ({error}): it was cut or changed") from error
    if not isinstance(manifest, dict):
        raise DamagedError(f"its file {_FILE} holds {type(manifest).__name__}, and no mapping")
    number = manifest.get("format")
    if not isinstance(number, int) or isinstance(number, bool):
        raise DamagedError(f"its file {_FILE} has no number as `format`, but {number!r}")
    if number > FORMAT:
        raise ValueError(f"{path} has format {number}; this version of holdfast reads up to {FORMAT}. Update holdfast.")
    _check_content(manifest)
    return manifest


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder is a checkpoint whose save was finished: it has a manifest, damaged or not."""
    return os.path.lexists(checkpoint / FOLDER / MANIFEST)


def mark_incomplete(checkpoint: Path) -> None:
    """Deletes the manifest. To be called before any other file of the checkpoint is written over or deleted. OSError
    where that is not permitted."""
    path = checkpoint / FOLDER / MANIFEST
    if path.is_dir() and not path.is_symlink():
        os.replace(path, path.with_suffix(".damaged"))
    else:
        path.unlink(missing_ok=True)


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    complete = [path for path in run_folder.glob("checkpoint-*") if is_complete(path)]
    by_step = {step: path for path in complete if (step := step_of(path)) is not None}
    return [by_step[step] for step in sorted(by_step)]


def recorded(checkpoint: Path | None) -> dict[str, Any]:
    """The manifest of a checkpoint that is complete; empty for any other, which is about to be adopted, and for none.
    The errors of `read_manifest`."""
    return read_manifest(checkpoint) if checkpoint is not None and is_complete(checkpoint) else {}


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's name says; None for another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def _check_content(manifest: dict[str, Any]) -> None:
    checksum = manifest.get("checksum")
    if (checksum is not None or "files" in manifest) and checksum != _checksum(manifest):
        raise DamagedError(f"its file {_FILE} does not have the checksum that it records: it was changed")
    required = _REQUIRED if manifest.get("kind") == "none" else (*_REQUIRED, *_REQUIRED_OF_A_REFERENCE)
    for name in required:
        if name not in manifest:
            raise DamagedError(f"its file {_FILE} has no field `{name}`")
    for name, types in _TYPES.items():
        value = manifest.get(name)
        if name in manifest and (not isinstance(value, types) or isinstance(value, bool)):
            raise DamagedError(f"its file {_FILE} has {value!r} as `{name}`")
    place = manifest["place"]
    if place.keys() != {"num_passes", "num_batches"} or not all(_is_count(value) for value in place.values()):
        raise DamagedError(f"its file {_FILE} has {place!r} as `place`")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
