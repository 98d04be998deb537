"""Hosts that share no output folder: each writes its checkpoints into its own, and all resume the same one.

Every process reads the checkpoint that a run resumes, so one that lies on the first host alone resumes nothing. Where
the hosts' folders are not one, each host's first process writes all of it, as with `save_on_each_node=True`. Whether
they are one is found out by a file, before anything is loaded. Given up: engines that shard weights, whose processes
each write a part: there a warning says what would be missing.
"""

import copy
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from holdfast.checkpoint.folder import checkpoint_to_resume
from holdfast.checkpoint.manifest import complete_checkpoints, step_of
from holdfast.config import DPOConfig

logger = logging.getLogger(__name__)

_SECONDS = 3.0
"""How long a file of another host may take to be seen, on network file systems that remember what a folder held."""


def heed_hosts(args: DPOConfig) -> DPOConfig:
    """The options with which each host keeps what it needs: `args`, or a copy with `save_on_each_node`. Collective.

    ValueError on all processes where `save_on_each_node=True` was asked for, and the hosts share the folder.
    """
    if PartialState().num_processes == 1:
        return args
    is_shared, num_hosts = _shared(Path(str(args.output_dir)))
    if is_shared:
        if args.save_on_each_node and num_hosts > 1:
            raise ValueError(
                f"save_on_each_node=True was asked for, but output_dir={args.output_dir!r} is one folder for all "
                f"{num_hosts} hosts, so they would write the same files at once. Leave save_on_each_node out."
            )
        return args
    if args.save_on_each_node or args.save_strategy == "no":
        return args
    is_divided = bool(args.fsdp or args.deepspeed or args.fsdp_plugin_args or args.deepspeed_plugin)
    if PartialState().is_main_process:
        logger.warning(
            "output_dir=%r is not one folder for all hosts. %s", args.output_dir, _DIVIDED if is_divided else _EACH
        )
    if is_divided:
        return args
    args = copy.copy(args)
    args.save_on_each_node = True
    return args


_EACH = "Each host writes its checkpoints into its own, and resumes from there (save_on_each_node)."
_DIVIDED = (
    "Each process writes its part of a checkpoint on its own host, so no host has a whole one, and no run could "
    "resume. Use a folder that all hosts share."
)


def _shared(folder: Path) -> tuple[bool, int]:
    """Whether all processes see one folder, and on how many hosts they are."""
    names = [f".{secrets.token_hex(8)}.shared"]
    name: str = broadcast_object_list(names)[0]
    is_main = PartialState().is_main_process
    if is_main:
        (folder / name).touch()
    PartialState().wait_for_everyone()
    until = time.monotonic() + _SECONDS
    while not (found := name in os.listdir(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    seen = gather_object([(found, PartialState().local_process_index)])
    if is_main:
        (folder / name).unlink()
    return all(each for each, _ in seen), sum(index == 0 for _, index in seen)


def agreed_checkpoint(resume_from_checkpoint: Any, output_dir: Any) -> Path | None:
    """`checkpoint_to_resume`, the same step on all processes: the newest that each of them has. Collective.

    ValueError on all processes where one of them has none, or where they have none of one step.
    """
    found, message = None, None
    try:
        found = checkpoint_to_resume(resume_from_checkpoint, output_dir)
    except ValueError as error:
        message = str(error)
    if PartialState().num_processes == 1:
        if message is not None:
            raise ValueError(message)
        return found
    steps = None if found is None else sorted({step_of(path) or 0 for path in complete_checkpoints(found.parent)})
    own = message, None if found is None else found.name, steps
    of_all = gather_object([own])
    if any(message for message, _, _ in of_all):
        raise ValueError(_lacking(of_all, resume_from_checkpoint, output_dir))
    if found is None or len({name for _, name, _ in of_all}) == 1:
        return found
    common = set.intersection(*(set(steps or ()) for _, _, steps in of_all))
    if resume_from_checkpoint is not True or not common:
        raise ValueError(_lacking(of_all, resume_from_checkpoint, output_dir))
    return found.parent / f"checkpoint-{max(common)}"


def _lacking(of_all: list[tuple[str | None, str | None, Any]], asked: Any, output_dir: Any) -> str:
    """The message of all processes: the first error where all have it, else who has what."""
    messages = [message for message, _, _ in of_all]
    if messages[0] is not None and all(message == messages[0] for message in messages):
        return messages[0]
    found = ", ".join(f"process {i}: {name or 'none'}" for i, (_, name, _) in enumerate(of_all))
    return (
        f"Resuming was asked for (resume_from_checkpoint={asked!r}), and the processes find different checkpoints "
        f"in {output_dir} ({found}). All of them read the one that is resumed. Use a folder that all hosts share, put "
        "a checkpoint of one step on each host, or start again without resume_from_checkpoint."
    )
