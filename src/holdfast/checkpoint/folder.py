"""The checkpoint folders of a run: which are complete, which one is resumed, which are deleted.

transformers deletes old checkpoints inside a save, before the reference of the new one is written. A kill in between
could leave no complete checkpoint at all. So transformers' deletion is switched off during a save, and `rotate` deletes
only once the new checkpoint is complete. The cost is room on the disk for one checkpoint more.
"""

import copy
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from holdfast.checkpoint.provenance import Provenance
from holdfast.checkpoint.reference_state import is_complete, mark_incomplete, read_manifest, save_reference
from holdfast.reference.reference import Reference
from holdfast.secrets import without_secrets_on_disk

_NAME = re.compile(r"checkpoint-(\d+)")


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    complete = [path for path in run_folder.glob("checkpoint-*") if is_complete(path)]
    by_step = {int(match[1]): path for path in complete if (match := _NAME.fullmatch(path.name))}
    return [by_step[step] for step in sorted(by_step)]


def checkpoint_to_resume(resume_from_checkpoint: str | os.PathLike[str] | bool | None, output_dir: Any) -> Path | None:
    """The complete checkpoint that `resume_from_checkpoint` names, or the last complete one where it is True; None
    where nothing is to be resumed. ValueError where there is none."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        read_manifest(Path(resume_from_checkpoint))
        return Path(resume_from_checkpoint)
    complete = complete_checkpoints(Path(output_dir))
    if not complete:
        raise ValueError(
            f"Resuming was asked for, but {output_dir} holds no complete checkpoint. Start without "
            "resume_from_checkpoint, or name the checkpoint's folder."
        )
    return complete[-1]


def best_checkpoint(state: Any, folder: Path) -> Path | None:
    """The checkpoint in `folder` that `state` (a `TrainerState`) records as the best one; None where none is recorded.

    It is found by its name, so that the folder may be a copy. ValueError where it is not complete or not there.
    """
    recorded: str | None = state.best_model_checkpoint
    step: int | None = state.best_global_step
    if recorded is None and not step:
        return None
    name = Path(recorded).name if recorded is not None else f"checkpoint-{step}"
    for path in complete_checkpoints(folder):
        if path.name == name:
            return path
    if recorded is not None and Path(recorded) in complete_checkpoints(Path(recorded).parent):
        return Path(recorded)
    raise ValueError(
        f"load_best_model_at_end=True was asked for, and the best checkpoint is {name}; {folder} has no complete one "
        f"of that name, but {[path.name for path in complete_checkpoints(folder)]}. Put it back, or set "
        "load_best_model_at_end=False."
    )


def save_complete(
    trainer: Trainer,
    checkpoint: Path,
    save: Callable[[], None],
    *,
    reference: Reference | None,
    provenance: Provenance | None,
    run_record: Callable[[], Mapping[str, Any]],
    uploading: Collection[str] = (),
) -> None:
    """Writes `checkpoint`: first what `save()` of the trainer writes, then the reference and the manifest. Older
    checkpoints are deleted once this one is complete, except for those named in `uploading`.

    `run_record()` is what the manifest says beside the reference.
    """
    args: Any = trainer.args
    if args.should_save:
        mark_incomplete(checkpoint)
    trainer.args = copy.copy(args)  # the user's own stay as they are
    trainer.args.save_total_limit = None
    try:
        save()
    finally:
        trainer.args = args
    trainer.accelerator.wait_for_everyone()  # the manifest also speaks for what the other processes write
    if args.should_save:
        if (checkpoint / TRAINING_ARGS_NAME).is_file():
            with without_secrets_on_disk(args):
                torch.save(args, checkpoint / TRAINING_ARGS_NAME)
        save_reference(checkpoint, reference, provenance, run_record())
        best = trainer.state.best_model_checkpoint
        rotate(checkpoint.parent, limit=args.save_total_limit, best=best, uploading=uploading)


def rotate(run_folder: Path, *, limit: int | None, best: str | None, uploading: Collection[str] = ()) -> None:
    """Deletes the oldest complete checkpoints beyond `limit`. The last one, the best one and those named in
    `uploading`, which are on their way to the hub, always stay."""
    complete = complete_checkpoints(run_folder)
    if not limit or limit < 1:
        return
    names = {*uploading, *([Path(best).name] if best is not None else [])}
    protected = {complete[-1]} | {path for path in complete if path.name in names}
    num_deleted = max(0, len(complete) - max(limit, len(protected)))
    for checkpoint in [path for path in complete if path not in protected][:num_deleted]:
        mark_incomplete(checkpoint)  # a kill during the deletion leaves no half of it to resume from
        shutil.rmtree(checkpoint, ignore_errors=True)
