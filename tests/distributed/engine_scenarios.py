"""One run over an engine, by name: `<engine>/<policy>/<reference>/<motion>`, and what shows that it was one.

The run of one process with the engine `one` is what it must equal. Each run is honest by facts that it reports: the
engine, how many numbers of the policy a process holds, and how far the reference is from the policy after some steps.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from engines import alive_bytes, loaded_in_shards, options_of, own_numel, whole
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from scenarios import GLOBAL_BATCH, RANK, WORLD, evaluated
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from families import tiny_model
from holdfast import DPOTrainer
from holdfast.policy.sharding import give_back
from holdfast.scoring.frozen import frozen_logps
from policies import POLICIES, config, rows, sft_lora, trainer

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
REF_MODELS: dict[str, Callable[[], Any]] = {
    "chosen": lambda: tiny_model(seed=5),
    "chosen_path": lambda: tiny_model(seed=5),
    "chosen_precomputed": lambda: tiny_model(seed=5),
    "chosen_half": lambda: tiny_model(seed=5).bfloat16(),
    "chosen_tied": lambda: tiny_model("llama_tied", seed=5),
    "chosen_family": lambda: tiny_model("gpt2", seed=5),
    "mixture": lambda: [None, tiny_model(seed=5), tiny_model("qwen3", seed=6)],
    "mixture_precomputed": lambda: [tiny_model(seed=5), None],
}
"""The references that a run chooses, by the name of the holding."""
MORE_HOLDINGS: dict[str, dict[str, Any]] = {
    "chosen_precomputed": {"reference": "precomputed"},
    "mixture_precomputed": {"reference": "precomputed"},
    "limited": {"reference": "model", "tokens_per_batch": 30},
    "packed": {"reference": "model", "layout": "packed"},
    "packed_limited": {"reference": "model", "layout": "packed", "tokens_per_batch": 25},
    "padding_free": {"reference": "model", "padding_free": True},
    "padded": {"reference": "model", "layout": "padded"},
    **{holding: {} for holding in ("chosen_half", "chosen_tied", "chosen_family", "mixture")},
}
MORE_HOLDINGS |= {f"{holding}_disturbed": HOLDINGS[holding] for holding in ("device", "adapter")}
MARGINS: dict[str, Any] = {
    "loss_type": ["beta_dpo", "alpha_dpo", "hypo", "dpop", "rainbow", "hypo_norm"],
    "loss_weights": [1.0, 0.5, 0.3, 0.1, 0.2, 0.7],
    "beta_dpo_share": 0.6,
    "dpop_lambda": 2.0,
    "learning_rate": 0.1,
    "per_device_eval_batch_size": GLOBAL_BATCH // WORLD,
}
"""Losses of the reference's margin, two of which are functions of the pairs of all processes and of earlier batches."""
MORE_HOLDINGS |= {
    "margins": MARGINS | {"reference": "snapshot"},
    "margins_weighted": MARGINS | {"reference": "snapshot", "weight_column": "w", "margin_column": "m"},
    "margins_precomputed": MARGINS | {"reference": "precomputed", "use_weighting": True},
    "margins_accumulated": MARGINS
    | {
        "reference": "snapshot",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": max(1, GLOBAL_BATCH // WORLD // 2),
    },
}
MORE_POLICIES: dict[str, Callable[[], nn.Module]] = POLICIES | {
    family: partial(tiny_model, family) for family in ("llama_tied", "gemma2", "gpt2", "lfm2")
}
MARGIN_RUNS = (
    "full/margins/fixed", "full/margins/soft", "full/margins_weighted/fixed", "full/margins_precomputed/fixed",
    "full/margins_accumulated/fixed", "lora_sft/margins/fixed",
)  # fmt: skip
"""The runs of these losses that every engine makes."""
MORE_POLICIES["lora_thin"] = lambda: sft_lora(r=1)
"""Policies and holdings beyond those of `names`. Of the factors of rank 1 all but one process have nothing."""
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
    ours = made(name, folder, **changed)
    if "_disturbed/" in name:
        disturb(ours)
    ours.train()
    found = outcome(ours, folder)
    for parameter in ours.model.parameters():  # transformers' hooks hold the trainer, which nothing would free
        (parameter._post_accumulate_grad_hooks or {}).clear()
    return found


def made(
    name: str, folder: Path, *, change: Callable[[nn.Module, dict[str, Any]], None] | None = None, **changed: Any
) -> DPOTrainer:
    """The trainer of the run `name`. `change(policy, other parts)` may change what it is made of."""
    engine, kind, holding, motion = name.split("/")[:4]
    options = (HOLDINGS | MORE_HOLDINGS)[holding] | MOTIONS[motion] | options_of(engine) | changed
    policy: Any = MORE_POLICIES[kind]()
    parts: dict[str, Any] = {"train_dataset": rows(9), "eval_dataset": rows(5, seed=1)}
    if holding in REF_MODELS:
        parts["ref_model"] = REF_MODELS[holding]()
    if "weight_column" in options:
        weighted = parts["train_dataset"].add_column("w", [2.0, 0.0, 0.5] * 3)
        parts["train_dataset"] = weighted.add_column("m", [0.5, -1.0, 2.0] * 3)
    if change is not None:
        change(policy, parts)
    if engine == "native":
        policy = loaded_in_shards(policy, folder / "model")
    if engine.endswith("born"):
        save(policy if kind == "full" else tiny_model(), folder / "base")
    if holding == "chosen_path":
        save(parts["ref_model"], folder / "ref")
        parts["ref_model"] = str(folder / "ref")
    args = config(folder, **{
        "per_device_train_batch_size": GLOBAL_BATCH // WORLD, "per_device_eval_batch_size": 2, "max_steps": 4,
        "seed": 3,
    } | options)  # fmt: skip
    if engine.endswith("born"):
        policy = born_in_parts(policy, folder / "base")
    return trainer(policy, args, **parts)


def outcome(ours: DPOTrainer, folder: Path) -> dict[str, Any]:
    """What a run came to, and the facts about its engine."""
    facts = {
        "engine": str(ours.accelerator.distributed_type).removeprefix("DistributedType."),
        "num_whole": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in ours.model.parameters()),
        "num_own": gather_object([sum(own_numel(parameter) for parameter in ours.model.parameters())]),
        "alive": gather_object([alive_bytes()]),
        "gap": gather_object([gap(ours)]),
        "digest": gather_object([ours._provenance.weights]) if ours._provenance is not None else [],
    }
    return {
        "logs": numbers(ours.state.log_history),
        "evaluation": evaluated(ours.evaluate()),
        "weights": saved(ours.model, folder),
        "layout": ours._layout_name(),
        "version": ours.reference.version,
        "drift": ours.reference.drift,
        "facts of each_process": facts,
    }


def save(model: nn.Module, folder: Path) -> None:
    """Writes a model that is whole in each process."""
    untyped: Any = model
    if RANK == 0:
        untyped.save_pretrained(folder)
    if WORLD > 1:
        dist.barrier()


def born_in_parts(policy: nn.Module, base: Path) -> nn.Module | str:
    """The policy whose base is spread as it is loaded, with the adapters of `policy`."""
    if not isinstance(policy, PeftModel):
        return str(base)
    adapters = {name: value for name, value in policy.named_parameters() if "lora_" in name}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), policy.peft_config["default"])
    with torch.no_grad():
        for name, value in adapters.items():
            model.get_parameter(name).copy_(value)
    return model


def disturb(ours: DPOTrainer) -> None:
    """Has the reference asked between the policy's forward and backward passes as well: first in vain, since its
    forward pass ends with an error."""
    backward, batch = ours.accelerator.backward, ours._collated(ours._first_rows()[:1])
    module = next(module for name, module in ours.model.named_modules() if name.endswith("layers.1.mlp"))

    def fail(*_: Any) -> None:
        raise RuntimeError("a forward pass that ends here")

    def after_asking(*args: Any, **kwargs: Any) -> None:
        handle = module.register_forward_pre_hook(fail)
        with contextlib.suppress(RuntimeError):
            ours.reference.logps(batch)
        handle.remove()
        ours.reference.logps(batch)
        backward(*args, **kwargs)

    ours.accelerator.backward = after_asking


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
    give_back(model)  # while they are gathered, tied weights may be several tensors
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[name.replace("_checkpoint_wrapped_module.", "")] = whole(parameter)
    if RANK == 0:
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, folder / "weights.safetensors")
    torch.manual_seed(0)
    return str(folder / "weights.safetensors")
