"""Whether the reference is the one that a run recorded: the run that wrote the model.

Every checkpoint says by digest which weights its reference had (`checkpoint.manifest`). So where the model is a
checkpoint, or a run's folder with checkpoints in it, the question has an answer that needs no log-probs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from holdfast.checkpoint.files import DamagedError
from holdfast.checkpoint.manifest import complete_checkpoints, is_complete, read_manifest
from holdfast.checkpoint.provenance import Provenance
from holdfast.reference.identity.identity import Identity


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedReference:
    """What a checkpoint records of its run's reference, beside the reference that is compared.

    `is_it` says whether both have the same weights and settings; None where that cannot be told, which `why` explains.
    `num_syncs` is how often the run's reference had moved since.
    """

    checkpoint: str
    description: str
    weights_digest: str
    is_it: bool | None
    why: str | None
    num_syncs: int


def recorded_reference(path: str, identity: Identity) -> RecordedReference | None:
    """What the checkpoint at `path`, or the last one in that folder, records; None where there is none that does."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    checkpoint = folder if is_complete(folder) else next(reversed(complete_checkpoints(folder)), None)
    if checkpoint is None:
        return None
    try:
        manifest = read_manifest(checkpoint)
    except (DamagedError, ValueError):
        return None
    return _beside(checkpoint, manifest, identity) if Provenance.is_in(manifest) else None


def _beside(checkpoint: Path, manifest: dict[str, Any], identity: Identity) -> RecordedReference:
    is_it: bool | None = manifest["weights"] == identity.weights_digest and manifest["config"] == identity.config_digest
    why = None
    dtype = (manifest["numerics"] or {}).get("dtype")
    if not is_it and dtype is not None and dtype != identity.dtype:
        is_it, why = None, f"the run's had {dtype}, this one was loaded in {identity.dtype}; name that as --dtype"
    elif manifest["config"] is None:
        is_it, why = None, "the run was sharded, and recorded no digest"
    return RecordedReference(
        checkpoint=str(checkpoint),
        description=str(manifest.get("description", "")),
        weights_digest=str(manifest["weights"]),
        is_it=is_it,
        why=why,
        num_syncs=int(manifest["version"]),
    )
