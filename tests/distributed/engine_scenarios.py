"""One run over an engine, by name: `<engine>/<policy>/<reference>/<motion>`, and what shows that it was one.

The run of one process with the engine `one` is what it must equal. Each run is honest by facts that it reports: the
engine, how many numbers of the policy a process holds, and how far the reference is from the policy after some steps.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from engines import loaded_in_shards, options_of, own_numel, whole
from safetensors.torch import save_file
from scenarios import GLOBAL_BATCH, RANK, WORLD, evaluated
from torch import Tensor, nn

from families import tiny_model
from holdfast import DPOTrainer
from holdfast.scoring.frozen import frozen_logps
from policies import POLICIES, config, rows, trainer

POLICY_KINDS = ("full", "lora_fresh", "lora_sft")
HOLDINGS: dict[str, dict[str, Any]] = {
    "model": {"reference": "model"},
    "adapter": {"reference": "adapter"},
    "device": {"reference": "snapshot"},
    "cpu": {"reference": "snapshot", "snapshot_device": "cpu"},
    "disk": {"reference": "snapshot", "snapshot_device": "disk"},
    "precomputed": {"reference": "precomputed"},
    "chosen": {},
    "chosen_path": {},
}
MOTIONS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "hard": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0},
    "soft": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3},
}


def names(engine: str) -> Iterator[str]:
    """The runs of an engine that have a meaning."""
    for policy, holding, motion in itertools.product(POLICY_KINDS, HOLDINGS, MOTIONS):
        if holding == "adapter" and (policy == "full" or motion != "fixed"):
            continue
        if policy != "full" and holding.startswith("chosen"):
            continue
        yield f"{engine}/{policy}/{holding}/{motion}"


def run(name: str, folder: Path, **changed: Any) -> dict[str, Any]:
    """The numbers of the run `name`, evaluated at its end, and the facts about its engine."""
    engine, kind, holding, motion = name.split("/")
    options = HOLDINGS[holding] | MOTIONS[motion] | options_of(engine) | changed
    args = config(
        folder, per_device_train_batch_size=GLOBAL_BATCH // WORLD, per_device_eval_batch_size=2, max_steps=4, seed=3,
        **options,
    )  # fmt: skip
    policy = POLICIES[kind]()
    if engine == "native":
        policy = loaded_in_shards(policy, folder / "model")
    num_whole = sum(parameter.numel() for parameter in POLICIES[kind]().parameters())
    parts: dict[str, Any] = {"train_dataset": rows(9), "eval_dataset": rows(5, seed=1)}
    if holding.startswith("chosen"):
        parts["ref_model"] = tiny_model(seed=5)
        if holding == "chosen_path":
            if RANK == 0:
                parts["ref_model"].save_pretrained(folder / "ref")
            if WORLD > 1:
                dist.barrier()
            parts["ref_model"] = str(folder / "ref")
    ours = trainer(policy, args, **parts)
    ours.train()
    facts = {
        "engine": str(ours.accelerator.distributed_type).removeprefix("DistributedType."),
        "num_whole": num_whole,
        "num_own": gather_object([sum(own_numel(parameter) for parameter in ours.model.parameters())]),
        "gap": gather_object([gap(ours)]),
    }
    return {
        "logs": numbers(ours.state.log_history),
        "evaluation": evaluated(ours.evaluate()),
        "weights": saved(ours.model, folder),
        "version": ours.reference.version,
        "drift": ours.reference.drift,
        "facts of each_process": facts,
    }


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logs without what measures time or memory."""
    unlike = ("runtime", "per_second", "flos", "memory")
    return [{k: v for k, v in entry.items() if not any(part in k for part in unlike)} for entry in history]


def gap(ours: DPOTrainer) -> float:
    """How far the reference's log-probs are from the policy's, in nats; all processes ask about the same pairs."""
    batch = ours._collated(ours._first_rows()[:1])
    model: nn.Module = ours.model_wrapped if ours.is_deepspeed_enabled else ours.model
    reference = ours.reference.logps(batch).per_token
    policy = frozen_logps(model, batch, ours.accelerator.autocast).per_token
    return float((policy - reference).abs().max())


def saved(model: nn.Module, folder: Path) -> str:
    """Writes the trained tensors, gathered, into a file whose path it returns."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[name] = whole(parameter)
    if RANK == 0:
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, folder / "weights.safetensors")
    torch.manual_seed(0)
    return str(folder / "weights.safetensors")
