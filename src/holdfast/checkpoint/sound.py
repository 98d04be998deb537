"""Whether a checkpoint is as it was saved; where it is not, which one a run can go on from instead.

One message names the checkpoint, its file and what is wrong, and the newest complete checkpoint beside it of which
every file has its digest. An older checkpoint is never taken silently in place of a damaged one. Only then are the
other checkpoints read, since that takes as long as reading their files.
"""

import json
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from holdfast.checkpoint.files import DamagedError, check_files, check_kinds, read_regular
from holdfast.checkpoint.foreign import writer_of
from holdfast.checkpoint.manifest import complete_checkpoints, is_complete, read_manifest, step_of

logger = logging.getLogger(__name__)

_NUMBER = (int, float)
_STATE_TYPES: Mapping[str, tuple[type, ...]] = {
    "global_step": (int,),
    "max_steps": (int,),
    "log_history": (list,),
    "epoch": (*_NUMBER, type(None)),
    "total_flos": _NUMBER,
    "num_train_epochs": _NUMBER,
    "num_input_tokens_seen": _NUMBER,
    "best_metric": (*_NUMBER, type(None)),
    "best_global_step": (int, type(None)),
    "best_model_checkpoint": (str, type(None)),
    "stateful_callbacks": (dict, type(None)),
    "train_batch_size": (int, type(None)),
}
"""Fields of `trainer_state.json` that are read again."""


def check_together(checkpoint: Path, request: str, *, reads_all: bool, adopts: bool = False) -> None:
    """`check_sound` on all processes: where one of them finds damage, all raise its error. Those with `reads_all` read
    the files, which one process a machine is enough for. They also say where there are no digests to compare."""
    message: str | None = None
    try:
        manifest = check_sound(checkpoint, request, reads_all=reads_all, adopts=adopts)
        if reads_all and manifest and "files" not in manifest:
            logger.warning(
                "%s was written by an earlier version of holdfast, which recorded no digests of its files: they are "
                "read as they are.", checkpoint,
            )  # fmt: skip
    except ValueError as error:
        message = str(error)
    message = next(filter(None, gather_object([message])), None)
    if message is not None:
        raise ValueError(message)


def check_sound(checkpoint: Path, request: str, *, reads_all: bool = True, adopts: bool = False) -> dict[str, Any]:
    """The manifest of a checkpoint that is as it was saved. ValueError where it is not; the message begins with
    `request`, a sentence without its end. Without `reads_all`, only sizes are compared, not contents. With `adopts`,
    a checkpoint of another trainer may have none: then it is empty."""
    try:
        if adopts and not is_complete(checkpoint) and writer_of(checkpoint) is not None:
            check_kinds(checkpoint)
            _check_trainer_state(checkpoint)
            return {}
        return _checked(checkpoint, reads_all=reads_all)
    except DamagedError as damage:
        raise refused(checkpoint, request, damage) from damage


def refused(checkpoint: Path, request: str, problem: object) -> ValueError:
    """The error for a checkpoint that has a `problem`, with the way on."""
    for other in reversed(complete_checkpoints(checkpoint.parent)):
        if other.name == checkpoint.name:
            continue
        try:
            _checked(other, reads_all=True)
        except ValueError:
            continue
        way_on = (
            f"The newest complete checkpoint beside it that is as it was saved is {other}; go on from there: "
            f"{how_to_resume(other)}."
        )
        break
    else:
        way_on = (
            f"{checkpoint.parent.absolute()} holds no other complete checkpoint that is as it was saved. Put the file "
            "back from a copy, or start again without resume_from_checkpoint."
        )
    if not is_complete(checkpoint) and writer_of(checkpoint) is not None:
        way_on = f"{HOW_TO_ADOPT} {way_on}"
    return ValueError(f"{request}, but {problem}. {way_on}")


HOW_TO_ADOPT = (
    "To go on from it, pass as `model` (and `ref_model`) what its run began with, and set adopt_checkpoint=True: "
    "policy, optimizer, schedule and random state are taken from it, and the reference is captured from `model`."
)


def resuming(checkpoint: Path) -> str:
    """The beginning of the message where a checkpoint is to be resumed or read."""
    return f"Resuming from {checkpoint} was asked for"


def how_to_resume(checkpoint: Path) -> str:
    """The option that resumes `checkpoint`, in Python and on the command line."""
    value = shlex.quote(f"training.resume_from_checkpoint={checkpoint}")
    return f"resume_from_checkpoint={str(checkpoint)!r} (or `--set {value}`)"


def last_complete(run_folder: Path, *, none: str) -> str:
    """A clause that says how to resume the last complete checkpoint in `run_folder`; `none` where there is none."""
    complete = complete_checkpoints(run_folder)
    if not complete:
        return none
    return f"resume from {complete[-1]}, the last complete checkpoint: {how_to_resume(complete[-1])}"


def _checked(checkpoint: Path, *, reads_all: bool) -> dict[str, Any]:
    manifest = read_manifest(checkpoint)
    if "files" in manifest:
        check_files(checkpoint, manifest["files"], reads_all=reads_all)
    else:
        check_kinds(checkpoint)
    _check_trainer_state(checkpoint)
    return manifest


def _check_trainer_state(checkpoint: Path) -> None:
    """DamagedError where `trainer_state.json` cannot be read, or is of another step than the folder's name says."""
    name, path = f"its file {TRAINER_STATE_NAME}", checkpoint / TRAINER_STATE_NAME
    try:
        content = json.loads(read_regular(path, TRAINER_STATE_NAME))
        if not isinstance(content, dict):
            raise TypeError(f"it holds {type(content).__name__}, and no mapping")
        state = TrainerState(**content)
    except DamagedError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{name} was cut or changed ({error})") from error
    for field, types in _STATE_TYPES.items():
        value = getattr(state, field)
        if not isinstance(value, types) or isinstance(value, bool):
            raise DamagedError(f"{name} has {value!r} as `{field}`")
    wrong = next((entry for entry in state.log_history if not isinstance(entry, dict)), None)
    if wrong is not None:
        raise DamagedError(f"{name} has {wrong!r} in `log_history`")
    callbacks: Any = state.stateful_callbacks or {}
    for callback, saved in callbacks.items():
        if not isinstance(saved, dict | list):
            raise DamagedError(f"{name} has {saved!r} as the state of {callback}")
    if state.global_step < 0 or step_of(checkpoint) not in (None, state.global_step):
        raise DamagedError(f"{name} is of step {state.global_step}")
