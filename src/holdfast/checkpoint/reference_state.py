"""A checkpoint's folder `reference/`: which reference the run had, and where it has moved.

The manifest there records what the reference was made from (its `Provenance`). A resumed run rebuilds a fixed reference
and compares; it restores a moved one from `state.safetensors`, bit for bit.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.checkpoint.files import FOLDER, PARTIAL, DamagedError, flush, record_files
from holdfast.checkpoint.manifest import FORMAT, MANIFEST, read_manifest, to_text
from holdfast.checkpoint.provenance import Provenance
from holdfast.checkpoint.training_state import loading
from holdfast.reference.identity.digests import digest
from holdfast.reference.reference import Reference

STATE = "state.safetensors"


def state_of(reference: Reference | None) -> dict[str, Tensor]:
    """The tensors of a reference that a checkpoint must hold, in host memory. Collective where they are in parts."""
    if reference is None:
        return {}
    return {name: tensor.detach().contiguous().cpu() for name, tensor in reference.state_dict().items()}


def save_reference(
    checkpoint: Path,
    reference: Reference | None,
    provenance: Provenance | None,
    run_record: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> None:
    """Writes the folder `reference/` of a checkpoint, its manifest last: from then on the checkpoint is complete.
    `run_record` is what the manifest says beside the reference and the files: the position in the data, the policy's
    digest. `state` is the reference's `state_of`. OSError, or an error of safetensors, where the disk is full."""
    folder, staged = checkpoint / FOLDER, checkpoint / PARTIAL
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    manifest: dict[str, Any] = {"format": FORMAT, "kind": "none", **run_record}
    if reference is not None and provenance is not None:
        if state:
            save_file(dict(state), staged / STATE)
        manifest = {
            **manifest,
            "kind": reference.kind,
            "description": reference.describe(),
            "version": reference.version,
            "drift": reference.drift,
            "state": digest(state.items()) if state else None,
            **asdict(provenance),
        }
    manifest["files"] = record_files(checkpoint)
    (staged / MANIFEST).write_text(to_text(manifest), encoding="utf-8")
    for path in (staged / MANIFEST, staged):
        flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)
    flush(checkpoint)


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
    state = {}
    if manifest["state"]:
        with loading(checkpoint, "the reference", f"{FOLDER}/{STATE}"):
            state = load_file(checkpoint / FOLDER / STATE)
            if digest(state.items()) != manifest["state"]:
                raise DamagedError("it does not have the digest that the manifest records")
    if not state and manifest["version"] == 0 < reference.version:
        raise ValueError(
            f"The reference was to go back to where it was at {checkpoint}, before its first move, but it has moved "
            f"{reference.version} times and that checkpoint does not hold it. Make the trainer again to load it."
        )
    reference.load_state_dict(state, manifest["version"], manifest["drift"])
