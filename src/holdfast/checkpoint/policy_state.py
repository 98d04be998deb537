"""The policy of a checkpoint: loaded again, and compared with the digest that was recorded when it was saved.

transformers' own loading has three gaps. It loads the first active adapter alone. It loads the best model's adapter
only where that is called "default". And it only warns where the tensors of a file have other names than those of the
model, as for the experts of a Mixtral. So adapters and such models are loaded here. Given up: a digest where weights
are offloaded.
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

from holdfast.checkpoint.manifest import read_manifest
from holdfast.checkpoint.whole import load_files, put_whole
from holdfast.policy.adapters import is_adapted
from holdfast.policy.sharding import give_back, state_of
from holdfast.reference.identity.digests import digest


def _saved_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint must bring back. Of a plain model these are all parameters; of a PEFT model those
    of its adapters and whatever else trains."""
    parameters: dict[str, Tensor] = dict(policy.named_parameters())
    if not is_adapted(policy):
        return parameters
    tensors: dict[str, Tensor] = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    for adapter in policy.peft_config:
        state = _adapter_state(policy, adapter)
        tensors |= {f"{adapter}: {name}": tensor for name, tensor in state.items()}
    return tensors


def policy_digest(policy: nn.Module) -> str | None:
    """The digest of the tensors that a checkpoint must bring back, as of one process that has them whole; None where
    some of them are nowhere. Collective where they are in parts."""
    give_back(policy)
    if any(p.is_meta for p in policy.parameters()):
        return None
    return digest(_saved_tensors(policy).items())


def frozen_digest(policy: PeftModel) -> str | None:
    """The digest of the tensors under the adapters that no checkpoint holds; None where some of them are nowhere."""
    saved = {tensor.data_ptr() for tensor in _saved_tensors(policy).values()}
    tensors = state_of(policy)
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    return digest((name, tensor) for name, tensor in tensors.items() if tensor.data_ptr() not in saved)


def load_whole_policy(checkpoint: Path, policy: Any) -> None:
    """Loads whole tensors into a policy in parts: every process takes its own part. ValueError where the checkpoint
    lacks an adapter, or has a tensor of another shape."""
    give_back(policy)
    if is_adapted(policy):
        for adapter in policy.peft_config:
            load_files(_adapter_state(policy, adapter), [_adapter_file(checkpoint, adapter)])
    elif needs_conversion(policy, checkpoint):
        for name, value in _converted(policy, checkpoint).items():
            put_whole(state_of(policy)[name], value, name)
    else:
        files = sorted(checkpoint.glob("model*.safetensors"))
        if not files:
            raise ValueError(
                "it has no model*.safetensors, since DeepSpeed keeps the weights in files of its own, which only a run "
                "that goes on with training reads. Write checkpoints with "
                '"stage3_gather_16bit_weights_on_model_save": true'
            )
        load_files(state_of(policy), files)


def _adapter_state(policy: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter, under the names by which peft saves them."""
    return get_peft_model_state_dict(
        policy, state_dict=state_of(policy), adapter_name=adapter, save_embedding_layers=False
    )


def load_adapters(policy: PeftModel, checkpoint: Path) -> None:
    """Loads every adapter of `policy` from its folder in `checkpoint`. ValueError where the checkpoint lacks one."""
    for adapter in policy.peft_config:
        set_peft_model_state_dict(policy, load_file(_adapter_file(checkpoint, adapter)), adapter_name=adapter)


def _adapter_file(checkpoint: Path, adapter: str) -> Path:
    file = (checkpoint if adapter == "default" else checkpoint / adapter) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(
            f"The adapter {adapter!r} was to be loaded from {checkpoint}, which has no "
            f"{file.relative_to(checkpoint)}. Name the adapters as in the run that wrote it, or take "
            "another checkpoint."
        )
    return file


def needs_conversion(policy: nn.Module, checkpoint: Path) -> bool:
    """Whether `checkpoint` has the weights of `policy` under other names or in other shapes. Experts that are one
    tensor in memory are saved one by one, for example."""
    names: set[str] = set()
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return isinstance(policy, PreTrainedModel) and bool(names) and not names >= dict(policy.named_parameters()).keys()


def load_converted(policy: PreTrainedModel, checkpoint: Path) -> None:
    """Loads weights that need conversion, through a second model in host memory. The trainer of transformers would
    leave them out, with a warning."""
    policy.load_state_dict(_converted(policy, checkpoint))


def _converted(policy: PreTrainedModel, checkpoint: Path) -> dict[str, Tensor]:
    config = copy.deepcopy(policy.config)
    second = type(policy).from_pretrained(checkpoint, config=config, dtype=policy.dtype)
    return second.state_dict()


def check_loaded(policy: nn.Module, checkpoint: Path) -> None:
    """ValueError where `policy` does not have the digest that `checkpoint` records, if it records one."""
    recorded = read_manifest(checkpoint).get("policy")
    found = policy_digest(policy) if recorded is not None else None
    if found is not None and found != recorded:
        raise ValueError(
            f"The policy was loaded from {checkpoint}, but its tensors have the digest {found}, not {recorded}, which "
            "was recorded when they were saved: a file was changed or damaged, or some of what trains is in none (a "
            "PEFT checkpoint has the adapters and `modules_to_save`). Use another checkpoint, or name what trains in "
            "the adapter's config."
        )
