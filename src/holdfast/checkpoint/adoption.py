"""A checkpoint that another trainer wrote, taken over: what it lacks is the reference, and that is put beside it.

The reference is captured from the `model` that is handed over, before the checkpoint's weights are loaded, as in any
run. The record of it is written into the checkpoint, in the folder `reference/`; nothing that was there is changed.
From then on the checkpoint is complete, and resumed like any other. Its tensors are compared with the policy's by name
and shape first, since transformers only warns of what does not fit. A `model` with the checkpoint's own weights is
refused, since the reference would begin where that run had come to. Given up: sharded weights, and pickled ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from holdfast.checkpoint.disk_error import writing
from holdfast.checkpoint.foreign import OWN, writer_of
from holdfast.checkpoint.manifest import is_complete, read_manifest
from holdfast.checkpoint.policy_state import needs_conversion
from holdfast.checkpoint.provenance import Provenance
from holdfast.checkpoint.reference_state import save_reference, state_of
from holdfast.checkpoint.sound import resuming
from holdfast.policy.adapters import is_adapted
from holdfast.reference.reference import Reference
from holdfast.scoring.causal_lm import unwrap

_OF_THE_RUN = (
    "place", "policy", "policy_base", "template_date", "optimizer", "unlogged", "moments",
    "evaluation_due", "epoch_end",
)  # fmt: skip
_BESIDE = ("embed_tokens", "wte", "embed_in", "lm_head", "embed_out", "inv_freq")
"""Parts of the names of tensors that may be saved although they train with none of those: tied or derived ones."""
_OF_THE_REFERENCE = f"ref/{SAFETENSORS_WEIGHTS_NAME}"
"""Where the common trainer saves the adapter that its run began with."""


def is_to_be_adopted(checkpoint: Path) -> bool:
    """Whether a checkpoint has no record of its reference, or one that an adoption or an earlier version wrote."""
    if not is_complete(checkpoint):
        return True
    manifest = read_manifest(checkpoint)
    is_of_earlier_version = manifest["kind"] != "none" and not Provenance.is_in(manifest)
    return "adopted" in manifest or (is_of_earlier_version and manifest.get("version") == 0)


def adopt(
    checkpoint: Path,
    policy: nn.Module,
    reference: Reference | None,
    provenance: Provenance | None,
    *,
    batches_per_step: int,
) -> str:
    """Records the reference of this run in `checkpoint`, and returns a line that says so. ValueError where the
    checkpoint's tensors do not fit the policy, or are its own, and where it cannot be written to."""
    is_earlier = is_complete(checkpoint)
    writer = "an earlier run" if is_earlier else writer_of(checkpoint)
    moves = reference is not None and bool(reference.state_dict())
    if writer == OWN and moves:
        raise ValueError(
            f"{resuming(checkpoint)} with adopt_checkpoint=True, but holdfast wrote it and never finished it: where "
            "its moving reference was is not in it. Resume an earlier checkpoint, or start a new run."
        )
    step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
    _check_tensors(checkpoint, policy, step)
    manifest = read_manifest(checkpoint) if is_earlier else {}
    record: dict[str, Any] = {
        "place": {"num_passes": 0, "num_batches": step * batches_per_step},
        "policy": None,
        "unlogged": [],
        **{name: manifest[name] for name in _OF_THE_RUN if name in manifest},
        "adopted": manifest.get("adopted", writer),
    }
    with writing(f"the record of the reference of {checkpoint.name}", checkpoint, lambda: "resume it again"):
        save_reference(checkpoint, reference, provenance, record, state_of(reference))
    begins = " It holds no moved reference, so this run's begins as `model` again." if moves else ""
    return (
        f"{checkpoint} (step {step}, written by {record['adopted']}) is adopted: policy, optimizer, schedule and "
        "random state are those that it has, and the reference is the one captured from `model` and `ref_model` as "
        f"they were handed over; it is recorded in {checkpoint.name}/reference.{begins}"
    )


# --- tensors ----------------------------------------------------------------------------------------------------------


def _check_tensors(checkpoint: Path, policy: nn.Module, step: int) -> None:
    """ValueError where the checkpoint's tensors are not those of such a policy, or the very ones of this policy."""
    if is_adapted(policy):
        groups = {_file_of(checkpoint, name): _adapter(policy, name) for name in policy.peft_config}
    else:
        groups = _whole_model(checkpoint, policy)
    for (files, what), tensors in groups.items():
        _check_shapes(checkpoint, what, _shapes(files), tensors)
    if step > 0 and groups and all(_are_equal(files, tensors) for (files, _), tensors in groups.items()):
        raise ValueError(
            f"{resuming(checkpoint)} with adopt_checkpoint=True, but `model` has the checkpoint's own weights: the "
            f"reference would begin at step {step} of that run. Pass as `model` what that run began with."
        )
    recorded = checkpoint / _OF_THE_REFERENCE
    if is_adapted(policy) and "ref" not in policy.peft_config and recorded.is_file():
        active = policy.active_adapters[0]
        if not _are_equal((recorded,), _adapter(policy, active)):
            raise ValueError(
                f"{resuming(checkpoint)} with adopt_checkpoint=True, but it says in {_OF_THE_REFERENCE} which adapter "
                f"its run began with, and the adapter {active!r} of `model` is another. Pass as `model` what that run "
                "began with."
            )


_Group = tuple[tuple[Path, ...], str]


def _file_of(checkpoint: Path, adapter: str) -> _Group:
    file = (checkpoint if adapter == "default" else checkpoint / adapter) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        whole = next(checkpoint.glob("model*.safetensors"), None)
        found = f"the whole model ({whole.name})" if whole else f"no {file.relative_to(checkpoint)}"
        raise ValueError(
            f"{resuming(checkpoint)} with adopt_checkpoint=True for a policy with the adapter {adapter!r}, but it "
            f"holds {found}. Make the policy as in the run that wrote it, with its adapters' names; pickled weights "
            "(.bin) are not read."
        )
    return (file,), f"the adapter {adapter!r}"


def _adapter(policy: Any, name: str) -> dict[str, Tensor]:
    return get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)


def _whole_model(checkpoint: Path, policy: nn.Module) -> dict[_Group, dict[str, Tensor]]:
    files = tuple(sorted(checkpoint.glob("model*.safetensors")))
    if not files:
        found = "an adapter" if (checkpoint / SAFETENSORS_WEIGHTS_NAME).is_file() else "no model*.safetensors"
        raise ValueError(
            f"{resuming(checkpoint)} with adopt_checkpoint=True for a policy without adapters, but it holds {found}. "
            "Make the policy as in the run that wrote it (`peft_config`, or a PeftModel); pickled weights (.bin) are "
            "not read."
        )
    is_same_model = _shapes(files).keys() <= policy.state_dict().keys()  # others have names of their own to convert
    if is_same_model or not needs_conversion(policy, checkpoint):
        return {(files, "the model"): dict(policy.named_parameters())}
    loader: Any = type(unwrap(policy))
    _, info = loader.from_pretrained(
        checkpoint, config=policy.config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    wrong = [name for name, *_ in info["mismatched_keys"]] + sorted(info["missing_keys"])
    if wrong:
        raise _unfit(checkpoint, "the model", wrong)
    return {}


def _shapes(files: tuple[Path, ...]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: list(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
    return shapes


def _check_shapes(checkpoint: Path, what: str, found: Mapping[str, list[int]], tensors: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} (there {found.get(name, 'nothing')}, here {list(tensor.shape)})"
        for name, tensor in tensors.items()
        if found.get(name) != list(tensor.shape)
    ]
    wrong += [
        f"{name} (there {shape}, here nothing)"
        for name, shape in found.items()
        if name not in tensors and not any(part in _BESIDE for part in name.split("."))
    ]
    if wrong:
        raise _unfit(checkpoint, what, wrong)


def _unfit(checkpoint: Path, what: str, wrong: list[str]) -> ValueError:
    return ValueError(
        f"{resuming(checkpoint)} with adopt_checkpoint=True, but {what} in it is not that of this policy: "
        f"{', '.join(wrong[:3])}{f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Pass as `model` what that "
        "run began with, with the same adapters."
    )


def _are_equal(files: tuple[Path, ...], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of these names are bit for bit those in the files."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in list(opened.keys()):
                own, saved = tensors.get(name), opened.get_tensor(name)
                if own is not None and (own.dtype != saved.dtype or not torch.equal(own.detach().cpu(), saved)):
                    return False
    return True
