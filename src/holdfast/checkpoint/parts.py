"""A checkpoint in parts, as torch's distributed checkpoints are: each process writes what it has of each tensor.

Nothing is gathered, neither to write nor to read. A run reads it with any number of processes, also with one, and
whether its weights are spread over them or not: each process reads what it has of each tensor. All processes must see
one folder. Parts are described by a pickled file, which torch reads; the digests in the manifest find accidents in it,
and are compared before. Given up: checkpoints in parts on disks that only one machine sees.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as parts
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from holdfast.policy.adapters import is_adapted
from holdfast.policy.sharding import give_back

POLICY, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""The folders of a checkpoint; accelerate gives them these names."""


def has_parts(checkpoint: Path, folder: str = POLICY) -> bool:
    """Whether a checkpoint has the policy, or the optimizer, in parts."""
    return (checkpoint / folder).is_dir()


def save_policy(checkpoint: Path, policy: nn.Module) -> None:
    """Writes the policy's tensors; of a PEFT model those of its active adapter. Collective."""
    _save(checkpoint / POLICY, {"model": _tensors(policy)})


def load_policy(checkpoint: Path, policy: nn.Module) -> None:
    """Reads them again, over those of `policy`. Collective."""
    _load(checkpoint / POLICY, {"model": _tensors(policy)})


def save_optimizer(checkpoint: Path, policy: nn.Module, optimizer: Any) -> None:
    """Writes the optimizer's state, by the names of the policy's parameters. Collective."""
    state = get_optimizer_state_dict(policy, _inner(optimizer))
    _save(checkpoint / OPTIMIZER, {"optimizer": state})


def load_optimizer(checkpoint: Path, policy: nn.Module, optimizer: Any) -> None:
    """Reads it again. Collective."""
    state = {"optimizer": get_optimizer_state_dict(policy, _inner(optimizer))}
    _load(checkpoint / OPTIMIZER, state)
    set_optimizer_state_dict(policy, _inner(optimizer), state["optimizer"])


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _tensors(policy: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which share memory with the policy's."""
    give_back(policy)
    if is_adapted(policy):
        return get_peft_model_state_dict(policy, adapter_name=str(policy.active_adapter))
    return get_model_state_dict(policy)  # type: ignore[return-value]


def _save(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with _first_failure(), _quiet():
        parts.save(state, storage_writer=parts.FileSystemWriter(folder), no_dist=not dist.is_initialized())


def _load(folder: Path, state: dict[str, Any]) -> None:
    with _first_failure(), _quiet():
        parts.load(state, storage_reader=parts.FileSystemReader(folder), no_dist=not dist.is_initialized())


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raises the first of the errors that processes have met, on all of them; torch raises an error of its own that no
    `except Exception` catches."""
    try:
        yield
    except parts.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
