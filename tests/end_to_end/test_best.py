"""`load_best_model_at_end`: the best policy comes back with its own reference, whatever its adapters are called."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from checkpoints import flip, make_earlier
from families import tiny_model
from holdfast.reference.identity.digests import digest
from policies import POLICIES, _adapted, config, logged, rows, sft_lora, trainer

pytestmark = pytest.mark.slow

OPTIONS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 5}
OPTIONS |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}


def several_adapters() -> nn.Module:
    """The second of three adapters trains."""
    model = sft_lora("first")
    with torch.random.fork_rng():
        torch.manual_seed(6)
        for name in ("second", "third"):
            model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "full": tiny_model,
    "default": _adapted,
    "named": lambda: _adapted(name="dpo"),
    "several": several_adapters,
    "beside default": POLICIES["lora_fresh_over_sft"],
}
SYNCED = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2}
WAYS: dict[str, dict[str, Any]] = {
    "model": {"reference": "model"},
    "adapter": {"reference": "adapter"},
    "snapshot": {"reference": "snapshot"},
    "snapshot on disk": {"reference": "snapshot", "snapshot_device": "disk"},
    "model, synced": {"reference": "model", **SYNCED},
    "snapshot, synced": {"reference": "snapshot", **SYNCED},
    "snapshot, set to the policy": {"reference": "snapshot", **SYNCED, "ref_model_mixup_alpha": 1.0},
}


class Best(TrainerCallback):
    """Says of one step that its loss is the best, whatever it is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_rank"] = float(state.global_step != self.step)


def run(kind: str, folder: Path, step: int, resume: bool = False, **options: Any) -> Any:
    more = OPTIONS | {"metric_for_best_model": "eval_rank", "greater_is_better": False} | options
    ours = trainer(KINDS[kind](), config(folder, **more), eval_dataset=rows(6, seed=2), callbacks=[Best(step)])
    ours.train(resume_from_checkpoint=resume)
    return ours


@pytest.mark.covering(1)
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    ("kind", "way"), [(kind, way) for kind in KINDS for way in WAYS if (kind, way) != ("full", "adapter")]
)
def test_the_best_policy_has_its_reference(kind: str, way: str, step: int, tmp_path: Path) -> None:
    """Step 1 is before the first sync, step 3 between two; training ends at step 5."""
    ours = run(kind, tmp_path, step, **WAYS[way])
    losses = logged(ours, "eval_loss")
    assert losses[step - 1] != losses[-1]
    assert ours.evaluate()["eval_loss"] == losses[step - 1]
    assert ours.reference.version == (step // 2 if "synced" in way or "set" in way else 0)


def test_the_best_checkpoint_is_found_in_a_copied_folder(tmp_path: Path) -> None:
    run("named", tmp_path / "there", 2, **WAYS["model, synced"], max_steps=3)
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    shutil.rmtree(tmp_path / "there" / "checkpoint-2")
    whole = run("named", tmp_path / "whole", 2, **WAYS["model, synced"])
    ours = run("named", tmp_path / "here", 2, resume=True, **WAYS["model, synced"])
    assert ours.state.best_model_checkpoint == str(tmp_path / "here" / "checkpoint-2")
    assert ours.evaluate()["eval_loss"] == logged(whole, "eval_loss")[1]


def test_a_best_checkpoint_that_is_gone_is_refused(tmp_path: Path) -> None:
    run("full", tmp_path, 2, max_steps=3)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"the best checkpoint is checkpoint-2; .* no complete one of that name, but"):
        run("full", tmp_path, 2, resume=True)


def test_a_checkpoint_without_the_adapter_is_refused(tmp_path: Path) -> None:
    run("named", tmp_path, 2, max_steps=3)
    (tmp_path / "checkpoint-3" / "dpo").rename(tmp_path / "checkpoint-3" / "other")
    for message in (
        r"its file dpo/\w+\.\w+ is missing.* checkpoint beside it that is as it was saved is .*checkpoint-2; go",
        r"adapter 'dpo' was to be loaded .* no dpo/adapter_model.safetensors",
    ):
        with pytest.raises(ValueError, match=message):
            run("named", tmp_path, 2, resume=True)
        make_earlier(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(("kind", "file"), [("full", "model.safetensors"), ("default", "adapter_model.safetensors")])
def test_damaged_weights_are_refused(kind: str, file: str, tmp_path: Path) -> None:
    """One bit of the last number."""
    run(kind, tmp_path, 2, max_steps=3)
    flip(tmp_path / "checkpoint-3" / file)
    for message in (rf"its file {file} has another content", r"tensors have the digest .* changed or damaged"):
        with pytest.raises(ValueError, match=message):
            run(kind, tmp_path, 2, resume=True)
        make_earlier(tmp_path / "checkpoint-3")


def test_a_best_checkpoint_that_is_damaged_is_refused(tmp_path: Path) -> None:
    """At the end of the run; the run can be finished without it."""
    run("full", tmp_path, 2, max_steps=3)
    flip(tmp_path / "checkpoint-2" / "model.safetensors")
    message = r"load_best.* best one is .*checkpoint-2, but its file model.safetensors has another.*checkpoint-5; "
    with pytest.raises(ValueError, match=message):
        run("full", tmp_path, 2, resume=True)
    run("full", tmp_path, 2, resume=True, load_best_model_at_end=False)


def test_what_trains_outside_the_adapter_is_refused_on_resume(tmp_path: Path) -> None:
    """peft saves adapters only: an unfrozen norm would come back as it was before training."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(POLICIES["lora_unfrozen_norm"](), config(tmp_path, **options)).train()
    again = trainer(POLICIES["lora_unfrozen_norm"](), config(tmp_path, **options | {"max_steps": 4}))
    with pytest.raises(ValueError, match=r"some of what trains is in none"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.covering(1)
@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "qwen3_moe", "gpt_oss", "lfm2", "gemma3", "opt"])
@pytest.mark.parametrize("shard_bytes", [None, 40_000])
def test_every_family_comes_back(family: str, shard_bytes: int | None, tmp_path: Path) -> None:
    """Experts that are one tensor in memory are saved one by one, and under other names."""
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    policy: Any = tiny_model(family)
    first = trainer(policy, config(tmp_path, **options))
    if shard_bytes is not None:
        policy.save_pretrained = partial(policy.save_pretrained, max_shard_size=shard_bytes)
    first.train()
    assert ((tmp_path / "checkpoint-4" / "model.safetensors.index.json").is_file()) == (shard_bytes is not None)
    later = trainer(tiny_model(family), config(tmp_path, **options))
    begun = digest(later.model.named_parameters())
    later.restore()
    assert digest(later.model.named_parameters()) == digest(first.model.named_parameters()) != begun
