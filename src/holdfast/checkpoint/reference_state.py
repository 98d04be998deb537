"""A checkpoint's folder `reference/`: which reference the run had, and where it has moved.

`manifest.json` records what the reference was made from (its `Provenance`). A resumed run rebuilds a fixed reference
and compares; it restores a moved one from `state.safetensors`, bit for bit. The manifest is written last, so it also
marks the checkpoint as complete: a kill inside a save leaves a folder that no resume chooses. Given up: resuming from
checkpoints without a manifest, since their reference is not recorded.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from holdfast.checkpoint.provenance import Provenance
from holdfast.reference.identity.digests import digest
from holdfast.reference.reference import Reference

FOLDER, MANIFEST, STATE = "reference", "manifest.json", "state.safetensors"
FORMAT = 2


def save_reference(
    checkpoint: Path, reference: Reference | None, provenance: Provenance | None, run_record: Mapping[str, Any]
) -> None:
    """Writes the folder `reference/` of a checkpoint, its manifest last: from then on the checkpoint is complete.
    `run_record` is what the manifest says beside the reference: the position in the data, the policy's digest."""
    folder = checkpoint / FOLDER
    staged = checkpoint / f"{FOLDER}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    manifest: dict[str, Any] = {"format": FORMAT, "kind": "none", **run_record}
    if reference is not None and provenance is not None:
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in reference.state_dict().items()}
        if state:
            save_file(state, staged / STATE)
        manifest = {
            **manifest,
            "kind": reference.kind,
            "description": reference.describe(),
            "version": reference.version,
            "drift": reference.drift,
            "state": digest(state.items()) if state else None,
            **asdict(provenance),
        }
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*staged.iterdir(), staged):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)
    _flush(checkpoint)


def load_reference(checkpoint: Path, reference: Reference | None, provenance: Provenance | None) -> None:
    """Brings `reference` to where it was at the checkpoint.

    ValueError where this run's reference is made from anything else than that of the run that wrote the checkpoint,
    naming the difference; also where the saved state does not have its recorded digest.
    """
    manifest = read_manifest(checkpoint)
    if reference is None or provenance is None or manifest["kind"] == "none":
        if (reference is None) != (manifest["kind"] == "none"):
            raise ValueError(
                f"{checkpoint} was written by a run whose reference was of kind {manifest['kind']!r}; this run has "
                f"{'none' if reference is None else reference.kind}. Resume with the losses and `reference` "
                "of that run."
            )
        return
    differing = provenance.differing_from(Provenance.from_manifest(manifest, checkpoint))
    if differing:
        (name, (ours, recorded)), *others = differing.items()
        raise ValueError(
            f"{checkpoint} was written by a run that differs in {name}: recorded {recorded!r}, found {ours!r}"
            f"{f' (and in {[other for other, _ in others]})' if others else ''}. Resume with what that run had, or "
            "start a new run in another output_dir."
        )
    state = load_file(checkpoint / FOLDER / STATE) if manifest["state"] else {}
    if state and digest(state.items()) != manifest["state"]:
        raise ValueError(
            f"{checkpoint / FOLDER / STATE} does not have the digest that its manifest records: it was changed or "
            "damaged. Resume from an earlier checkpoint."
        )
    if not state and manifest["version"] == 0 < reference.version:
        raise ValueError(
            f"The reference was to go back to where it was at {checkpoint}, before its first move, but it has moved "
            f"{reference.version} times and that checkpoint does not hold it. Make the trainer again to load it."
        )
    reference.load_state_dict(state, manifest["version"], manifest["drift"])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. ValueError where there is none, or one of a newer format."""
    path = checkpoint / FOLDER / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"Resuming from {checkpoint} was asked for, but it has no {FOLDER}/{MANIFEST}: it was never finished, or "
            "written by something else, so which reference it trained against is not recorded. Use an earlier "
            "checkpoint (resume_from_checkpoint=True takes the last complete one)."
        )
    manifest = json.loads(path.read_text())
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']}; this version of holdfast reads up to {FORMAT}. Update holdfast."
        )
    return manifest


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder is a checkpoint whose save was finished: it has a manifest."""
    return (checkpoint / FOLDER / MANIFEST).is_file()


def mark_incomplete(checkpoint: Path) -> None:
    """Deletes the manifest. To be called before any other file of the checkpoint is written over or deleted."""
    (checkpoint / FOLDER / MANIFEST).unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Writes the file or folder through to the disk, not only to the operating system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
