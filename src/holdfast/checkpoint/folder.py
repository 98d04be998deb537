"""The checkpoint folders of a run: which are complete, which one is resumed, which are deleted.

transformers deletes old checkpoints inside a save, before the reference of the new one is written. A kill in between
could leave no complete checkpoint at all. So transformers' deletion is switched off during a save, and `rotate` deletes
only once the new checkpoint is complete. The cost is room on the disk for one checkpoint more.
"""

import contextlib
import copy
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from holdfast.agreement import raised_together
from holdfast.checkpoint.disk_error import writing
from holdfast.checkpoint.foreign import OWN, foreign_checkpoints
from holdfast.checkpoint.manifest import complete_checkpoints, mark_incomplete, step_of
from holdfast.checkpoint.provenance import Provenance
from holdfast.checkpoint.reference_state import save_reference, state_of
from holdfast.checkpoint.sound import last_complete
from holdfast.reference.reference import Reference
from holdfast.secrets import without_secrets_on_disk

logger = logging.getLogger(__name__)


def checkpoint_to_resume(resume_from_checkpoint: str | os.PathLike[str] | bool | None, output_dir: Any) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, or the last one where it is True; None where nothing is to be
    resumed. The last one is complete, unless another trainer has written a later one, or nothing else is there. Whether
    it is sound is not looked at. ValueError where there is none."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        return Path(resume_from_checkpoint)
    complete = complete_checkpoints(Path(output_dir))
    foreign = {path: by for path, by in foreign_checkpoints(Path(output_dir)).items() if path not in complete}
    candidates = complete + [path for path, by in foreign.items() if by != OWN] or list(foreign)
    if not candidates:
        raise ValueError(
            f"Resuming was asked for, but {output_dir} holds no complete checkpoint. Start without "
            "resume_from_checkpoint, or name the checkpoint's folder."
        )
    return max(candidates, key=lambda path: step_of(path) or 0)


def best_checkpoint(state: Any, folder: Path, resumed: Path | None = None) -> Path | None:
    """The checkpoint in `folder` that `state` (a `TrainerState`) records as the best one; None where none is recorded.

    It is found by its name, so that the folder may be a copy. A checkpoint that was `resumed` and records none means
    that none was saved at the best step. ValueError where the best one is not complete or not there.
    """
    recorded: str | None = state.best_model_checkpoint
    step: int | None = state.best_global_step
    if recorded is None and (not step or _records_no_best(resumed)):
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


def _records_no_best(resumed: Path | None) -> bool:
    """Whether `trainer_state.json` of a checkpoint says that no best one was saved; transformers forgets one that is
    not there."""
    if resumed is None:
        return False
    return TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME)).best_model_checkpoint is None


def save_complete(
    trainer: Trainer,
    checkpoint: Path,
    save: Callable[[], None],
    *,
    reference: Reference | None,
    provenance: Provenance | None,
    run_record: Callable[[], Mapping[str, Any]],
    is_sharded: bool = False,
    uploading: Collection[str] = (),
) -> None:
    """Writes `checkpoint`: first what `save()` of the trainer writes, then the reference and the manifest. Older
    checkpoints are deleted once this one is complete, except for those named in `uploading`.

    `run_record()` is what the manifest says beside the reference. ValueError on all processes where the disk is full or
    cannot be written to: then, as after any other error, this checkpoint is removed and older ones are as they were.
    With `is_sharded` every process gathers what one of them writes.
    """
    args: Any = trainer.args
    with _removed_on_error(checkpoint, is_writer=args.should_save), _writing(checkpoint):
        with raised_together():
            if args.should_save:
                remove(checkpoint)  # files of an earlier run would count as part of this checkpoint
        with raised_together(), keeping_checkpoints(trainer):
            save()
        is_needed = args.should_save or is_sharded
        state = state_of(reference) if is_needed else {}  # the manifest also speaks for what the other processes wrote
        record = run_record() if is_needed else {}
        with raised_together():
            if args.should_save:
                if (checkpoint / TRAINING_ARGS_NAME).is_file():
                    with without_secrets_on_disk(args):
                        torch.save(args, checkpoint / TRAINING_ARGS_NAME)
                save_reference(checkpoint, reference, provenance, record, state)
    if args.should_save:
        best = trainer.state.best_model_checkpoint
        rotate(checkpoint.parent, limit=args.save_total_limit, best=best, uploading=uploading)


@contextmanager
def keeping_checkpoints(trainer: Trainer) -> Iterator[None]:
    """A context in which transformers deletes no checkpoint. The user's own options stay as they are."""
    args: Any = trainer.args
    trainer.args = copy.copy(args)
    trainer.args.save_total_limit = None
    try:
        yield
    finally:
        trainer.args = args


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
        _remove_older(checkpoint)


def leave_only(best: Path) -> None:
    """Deletes all complete checkpoints beside `best`."""
    for checkpoint in complete_checkpoints(best.parent):
        if checkpoint.name != best.name:
            _remove_older(checkpoint)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint, if it is there. OSError where it stays complete."""
    if checkpoint.is_dir():
        mark_incomplete(checkpoint)  # a kill during the deletion leaves no half of it to resume from
        shutil.rmtree(checkpoint, ignore_errors=True)


def _remove_older(checkpoint: Path) -> None:
    try:
        remove(checkpoint)
    except OSError as error:
        logger.warning("%s was to be deleted, and cannot be (%s): it stays.", checkpoint, error.strerror or error)


@contextmanager
def _removed_on_error(checkpoint: Path, *, is_writer: bool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if is_writer:
            with contextlib.suppress(OSError):
                remove(checkpoint)
        raise


def _writing(checkpoint: Path) -> AbstractContextManager[None]:
    folder = checkpoint.parent
    none = f"start again: there is no complete checkpoint in {folder}"
    return writing(f"the checkpoint {checkpoint.name}", folder, lambda: last_complete(folder, none=none))
