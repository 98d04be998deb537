"""The optimizer, the learning rate's schedule and the random state of a checkpoint: what of them starts afresh.

transformers loads what is there and says nothing of what is not. A checkpoint of `save_only_model=True` has none of
these, and one of a run with other processes has other random states. So what starts afresh is listed here before the
first step. Another optimizer than that of the run that wrote the checkpoint is refused: its state fits no other. Given
up: comparing the optimizers of FSDP and DeepSpeed, which check their own.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import SCALER_NAME, SCHEDULER_NAME

from holdfast.checkpoint.files import DamagedError
from holdfast.checkpoint.sound import refused, resuming


def optimizer_record(optimizer: Any) -> dict[str, Any] | None:
    """What a checkpoint's manifest records of an optimizer: its class, and how many parameters each group has."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(inner, torch.optim.Optimizer):
        return None
    return {"class": type(inner).__name__, "groups": [len(group["params"]) for group in inner.param_groups]}


def check_same_optimizer(checkpoint: Path, recorded: Mapping[str, Any] | None, optimizer: Any) -> None:
    """ValueError where the optimizer is another than the one that a checkpoint records, if it records one."""
    found = optimizer_record(optimizer)
    if recorded is None or found is None or found == recorded:
        return
    raise ValueError(
        f"Resuming from {checkpoint} was asked for, whose optimizer state is of {_words(recorded)}; this run's "
        f"optimizer is {_words(found)}. Resume with the optimizer (`optim`) and the trainable parameters of that run, "
        "or start a new run in another output_dir."
    )


def starting_afresh(names: Collection[str], *, num_processes: int, process: int, has_scaler: bool) -> list[str]:
    """What starts afresh on this process where a checkpoint has the files `names`, as clauses."""
    top = {name.partition("/")[0] for name in names}
    afresh: list[str] = []
    has_engine_state = any(name.startswith("global_step") for name in top)  # DeepSpeed's own folder
    has_optimizer = has_engine_state or any("optimizer" in name for name in top)
    has_schedule = has_engine_state or SCHEDULER_NAME in top
    if not (has_optimizer and has_schedule):  # transformers loads both or none
        missing = [*(["optimizer.pt"] if not has_optimizer else []), *([SCHEDULER_NAME] if not has_schedule else [])]
        afresh.append(f"the optimizer's state and the learning rate's schedule (no {' and no '.join(missing)})")
    if has_scaler and SCALER_NAME not in top and not has_engine_state:
        afresh.append(f"the scale of fp16's gradients (no {SCALER_NAME})")
    random = f"rng_state_{process}.pth" if num_processes > 1 else "rng_state.pth"
    if random not in top:
        others = sorted(name for name in top if name.startswith("rng_state"))
        afresh.append(f"the random state of process {process} (no {random}{f', but {others}' if others else ''})")
    return afresh


def saved_names(checkpoint: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The files that the checkpoint was saved with; for one of an earlier version those that are there."""
    return list(manifest["files"]) if "files" in manifest else os.listdir(checkpoint)


@contextmanager
def loading(checkpoint: Path, content: str, files: str) -> Iterator[None]:
    """Turns an error of a library that loads `files` of a checkpoint into a ValueError that names the checkpoint and
    another one to go on from. Memory that is not there stays an error of its own."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # pickle, torch, safetensors and json have errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = DamagedError(
            f"{content} cannot be loaded from its {files} ({reason}): a file is damaged or missing, or of another run"
        )
        raise refused(checkpoint, resuming(checkpoint), problem) from error


def _words(record: Mapping[str, Any]) -> str:
    return f"{record.get('class')} with groups of {record.get('groups')} parameters"
