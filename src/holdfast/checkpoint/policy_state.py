"""The policy of a checkpoint: its digest, and its way back into the trainer, whatever its adapters are called.

transformers loads the first active adapter alone, the best model's only where it is called "default", and warns where
tensors of a file have no place in the model, as the experts of a Mixtral have none. So these are loaded here, adapters
each from its own folder, and what was loaded is compared with the digest that was taken when it was saved. Given up: a
digest where weights are sharded or offloaded.
"""

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.checkpoint.folder import complete_checkpoints, read_manifest
from holdfast.reference.digests import digest


def _tensors(policy: nn.Module) -> dict[str, Tensor]:
    """All that a checkpoint must bring back: the parameters; of a PEFT model its adapters, and what else trains."""
    is_adapted = isinstance(policy, PeftModel)
    found: dict[str, Tensor] = {name: p for name, p in policy.named_parameters() if p.requires_grad or not is_adapted}
    for adapter in policy.peft_config if is_adapted else ():
        state: dict[str, Tensor] = get_peft_model_state_dict(policy, adapter_name=adapter, save_embedding_layers=False)
        found |= {f"{adapter}: {name}": tensor for name, tensor in state.items()}
    return found


def policy_digest(policy: nn.Module, *, is_sharded: bool) -> str | None:
    """The digest of all that a checkpoint must bring back; None where this process does not have it whole."""
    if is_sharded or any(p.is_meta or hasattr(p, "full_tensor") for p in policy.parameters()):
        return None
    return digest(_tensors(policy).items())


def load_adapters(policy: PeftModel, checkpoint: Path) -> None:
    """Every adapter of `policy` as it is in `checkpoint`. ValueError where the checkpoint lacks one."""
    for adapter in policy.peft_config:
        folder = checkpoint if adapter == "default" else checkpoint / adapter
        file = folder / SAFETENSORS_WEIGHTS_NAME
        if not file.is_file():
            raise ValueError(
                f"The adapter {adapter!r} was to be loaded from {checkpoint}, which has no "
                f"{file.relative_to(checkpoint)}. Name the adapters as in the run that wrote it, or take "
                "another checkpoint."
            )
        set_peft_model_state_dict(policy, load_file(file), adapter_name=adapter)


def is_saved_otherwise(policy: nn.Module, checkpoint: Path) -> bool:
    """Whether `checkpoint` has the weights of `policy` under other names, or in other shapes, than the model has them:
    experts that are one tensor in memory are saved one by one."""
    saved: set[str] = set()
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            saved.update(opened.keys())
    return isinstance(policy, PreTrainedModel) and bool(saved) and not saved >= dict(policy.named_parameters()).keys()


def load_converted(policy: PreTrainedModel, checkpoint: Path) -> None:
    """The weights of `checkpoint`, which has them otherwise, by way of a second model in host memory: the trainer of
    transformers leaves out what it finds under no name of the model, with a warning."""
    config = copy.deepcopy(policy.config)
    second = type(policy).from_pretrained(checkpoint, config=config, dtype=policy.dtype)
    policy.load_state_dict(second.state_dict())


def check_loaded(policy: nn.Module, checkpoint: Path, *, is_sharded: bool) -> None:
    """ValueError where `policy` is not what was saved in `checkpoint`, as far as that was recorded."""
    recorded = read_manifest(checkpoint).get("policy")
    found = policy_digest(policy, is_sharded=is_sharded) if recorded is not None else None
    if found is not None and found != recorded:
        raise ValueError(
            f"The policy was loaded from {checkpoint}, but its tensors have the digest {found}, not {recorded}, which "
            "was recorded when they were saved: a file was changed or damaged, or some of what trains is in none (a "
            "PEFT checkpoint has the adapters and `modules_to_save`). Use another checkpoint, or name what trains in "
            "the adapter's config."
        )


def best_checkpoint(state: Any, folder: Path) -> Path | None:
    """The checkpoint in `folder` that `state` (a `TrainerState`) records as the best one, found by its name, so that
    the folder may be a copy; None where no best one is recorded. ValueError where it is not complete or not there."""
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
