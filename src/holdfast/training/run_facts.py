"""The facts of a run, as its record and its banner say them, read from a trainer that is about to train."""

import math
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers.trainer_pt_utils import AcceleratorConfig

import holdfast
from holdfast import record
from holdfast.config import DPOConfig
from holdfast.data.layouts.choose import LAYOUTS
from holdfast.data.left_out import left_out_of
from holdfast.data.mixing.source_column import pairs_by_source
from holdfast.internals.transformers import loaded_from
from holdfast.policy.adapters import is_adapted
from holdfast.policy.sharding import own_part, parameters_of, shape_of
from holdfast.reference.audit import Finding
from holdfast.reference.base import num_bytes
from holdfast.reference.reference import Reference
from holdfast.scoring.causal_lm import unwrap
from holdfast.secrets import MASK, is_secret, masked, secrets_in

LIBRARIES = (torch, transformers, peft, accelerate, datasets)
_OF_THE_MACHINE = {"local_rank", "ddp_backend", "n_gpu"}
_MADE_OF_DEFAULTS = {
    "bf16": False, "disable_tqdm": False, "debug": [], "do_eval": True, "activation_checkpointing": True,
    "dataloader_pin_memory": False, "report_to": [],
}  # fmt: skip
"""What options come to that nobody has set."""
_NOT_OF_RESULTS = {"non_blocking", "dispatch_batches"}


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries that a run computes with."""
    return {
        "holdfast": holdfast.__version__,
        "python": platform.python_version(),
        **{library.__name__: str(library.__version__) for library in LIBRARIES},
    }


def model_facts(policy: nn.Module) -> record.Model:
    """The policy: its name, its size over all processes, what trains, and how its weights are held."""
    causal_lm: Any = unwrap(policy)
    parameters = parameters_of(policy).values()
    sizes: Counter[str] = Counter()
    for parameter in parameters:
        sizes[str(parameter.dtype).removeprefix("torch.")] += _num_values(parameter)
    dtype = sizes.most_common(1)[0][0] if sizes else "none"
    if (quantised := getattr(causal_lm.config, "quantization_config", None)) is not None:
        method = getattr(quantised, "quant_method", None) or "unknown method"
        dtype = f"{dtype}, quantised ({getattr(method, 'value', method)})"
    return record.Model(
        name=loaded_from(causal_lm.config) or type(causal_lm).__name__,
        class_name=type(causal_lm).__name__,
        num_parameters=sum(sizes.values()),
        num_trainable=sum(_num_values(parameter) for parameter in parameters if parameter.requires_grad),
        dtype=dtype,
        adapter=_adapter(policy),
    )


def reference_facts(
    reference: Reference | None, args: DPOConfig, *, digest: str | None, is_users_choice: bool
) -> record.Reference | None:
    """The reference and where it is held; None without one. `digest` is that of its weights."""
    if reference is None:
        return None
    return record.Reference(
        description=reference.describe(),
        kind=reference.kind,
        weights_digest=digest,
        held_bytes=num_bytes(reference),
        moves=args.sync_ref_model,
        mixup_alpha=args.ref_model_mixup_alpha if args.sync_ref_model else None,
        sync_steps=args.ref_model_sync_steps if args.sync_ref_model else None,
        is_users_choice=is_users_choice,
    )


def audit_facts(finding: Finding | None) -> record.Audit | None:
    """What the audit found; None where there was none."""
    if finding is None:
        return None
    gap = finding.gap
    return record.Audit(
        line=finding.line,
        mean_gap_nats=None if gap is None else gap.mean,
        largest_gap_nats=None if gap is None else gap.largest,
    )


def layout_facts(name: str, attention: str) -> record.Layout:
    """How sequences lie in rows, and by which routes they are attended."""
    summary = LAYOUTS[name].summary if name in LAYOUTS else "rows of a data collator of the user's"
    return record.Layout(name=name, line="; ".join(filter(None, [summary, attention])))


def dataset_facts(dataset: Any) -> record.Dataset:
    """The pairs of a prepared dataset; of a stream nothing is known."""
    if not isinstance(dataset, Dataset):
        return record.Dataset()
    left_out = left_out_of(dataset)
    return record.Dataset(
        num_rows=len(dataset) if left_out is None else left_out.num_rows,
        num_used=len(dataset),
        left_out={} if left_out is None else left_out.by_reason,
        sources=pairs_by_source(dataset),
    )


def memory_facts(policy: nn.Module, reference: Reference | None, optimizer: Any, args: DPOConfig) -> record.Memory:
    """Bytes on this process by part. Those of the optimizer's state are worked out until it has some."""
    held = [own_part(tensor) for tensor in (*policy.parameters(), *policy.buffers())]
    trainable = [own_part(parameter) for parameter in policy.parameters() if parameter.requires_grad]
    return record.Memory(
        weights=sum(tensor.nbytes for tensor in held),
        reference=0 if reference is None else num_bytes(reference),
        gradients=sum(tensor.nbytes for tensor in trainable),
        optimizer=optimizer_bytes(optimizer, trainable, args),
    )


def optimizer_bytes(optimizer: Any, trainable: Iterable[torch.Tensor], args: DPOConfig) -> int | None:
    """Bytes of the optimizer's state on this process: what it holds; before the first step, two values of each
    trainable number for the Adam family and none for plain SGD. None for others, which nobody knows."""
    states: Mapping[Any, Any] = getattr(optimizer, "state", None) or {}
    tensors = [
        own_part(tensor)
        for state in states.values()
        if isinstance(state, Mapping)
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    ]
    if tensors:
        return sum(tensor.nbytes for tensor in tensors)
    name = str(getattr(args.optim, "value", args.optim)).lower()
    if optimizer is None and name.startswith("adamw_torch") and not name.endswith(("4bit", "8bit")):
        return 2 * sum(tensor.nbytes for tensor in trainable)
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, torch.optim.Adam):  # and AdamW, which is one
        return 2 * sum(tensor.nbytes for tensor in trainable)
    if isinstance(inner, torch.optim.SGD) and not any(group["momentum"] for group in inner.param_groups):
        return 0
    return None


def changed_options(args: DPOConfig) -> dict[str, Any]:
    """The options that differ from their defaults, as JSON has them; secrets are masked."""
    found: dict[str, Any] = {}
    for each in fields(args):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        value = getattr(args, each.name, default)
        is_made = each.name in _MADE_OF_DEFAULTS and value == _MADE_OF_DEFAULTS[each.name]
        if each.name in _OF_THE_MACHINE or value == default or is_made or not each.init:
            continue
        if isinstance(value, AcceleratorConfig):
            value = {name: item for name, item in value.to_dict().items() if name not in _NOT_OF_RESULTS}
            default = AcceleratorConfig().to_dict()
            if all(item == default[name] for name, item in value.items()):
                continue
        found[each.name] = MASK if is_secret(each.name) and value else masked(_plain(value))
    return found


def command() -> tuple[str, ...] | None:
    """The command line of this process; None where there is none, as in a notebook or `python -c`."""
    if not sys.argv or not sys.argv[0] or sys.argv[0] == "-c":
        return None
    return (Path(sys.argv[0]).name, *sys.argv[1:])


def facts_of(
    *, policy: nn.Module, reference: Reference | None, args: DPOConfig, data: Mapping[str, Any], optimizer: Any,
    finding: Finding | None, digest: str | None, is_users_choice: bool, layout: str, attention: str, max_steps: int,
    num_epochs: float,
) -> record.Facts:  # fmt: skip
    """The facts of a run that begins now."""
    own_secrets = set(secrets_in(vars(args)))
    line = command()
    return record.Facts(
        versions=versions(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=None if line is None else tuple(_without(word, own_secrets) for word in line),
        model=model_facts(policy),
        reference=reference_facts(reference, args, digest=digest, is_users_choice=is_users_choice),
        audit=audit_facts(finding),
        layout=layout_facts(layout, attention),
        data={name: dataset_facts(dataset) for name, dataset in data.items()},
        memory=memory_facts(policy, reference, optimizer, args),
        loss_types=tuple(args.loss_types),
        beta=args.beta,
        options=changed_options(args),
        num_processes=args.world_size,
        device=_device(args.device),
        max_steps=max_steps,
        num_epochs=num_epochs,
    )


def _num_values(parameter: Any) -> int:
    """The numbers in a parameter over all processes; of 4 bit weights, two in a byte."""
    num_values = shape_of(parameter).numel()
    is_packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
    return 2 * num_values if is_packed else num_values


def _adapter(policy: nn.Module) -> str | None:
    if not is_adapted(policy):
        return None
    parts = []
    for name, config in policy.peft_config.items():
        kind = getattr(config.peft_type, "value", str(config.peft_type))
        rank = getattr(config, "r", None)
        parts.append(f"{name}: {kind}" + (f" r={rank}" if isinstance(rank, int) else ""))
    return ", ".join(parts)


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _plain(value: Any) -> Any:
    """A value of an option as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(getattr(value, "value", value))


def _without(word: str, secrets: set[str]) -> str:
    for secret in secrets:
        word = word.replace(secret, MASK)
    return word
