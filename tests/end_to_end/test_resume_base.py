"""A run goes on only from a checkpoint of a policy that computes with the same base, settings and adapters (law L5).

A checkpoint holds what trains. The rest a script makes anew, and nothing that is loaded shows where it made another.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel

from families import tiny_model
from policies import config, logged, rows, trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}

RUNS: dict[str, dict[str, Any]] = {
    "a LoRA under its own base": {"lora": LORA},
    "a LoRA under another model": {"lora": LORA, "has_ref_model": True},
    "a LoRA under none": {"lora": LORA, "loss_type": "simpo"},
    "all weights under another model": {"has_ref_model": True},
    "all weights under none": {"loss_type": "simpo"},
}


def made(folder: Path, *, seed: int = 0, epsilon: float = 1e-6, lora: Any = None, data: int = 0, **options: Any) -> Any:
    policy = tiny_model(seed=seed, rms_norm_eps=epsilon)
    parts: dict[str, Any] = {"ref_model": tiny_model(seed=5)} if options.pop("has_ref_model", False) else {}
    if lora is not None:
        parts["peft_config"] = LoraConfig(**lora)
    return trainer(policy, config(folder, **SAVING | options), train_dataset=rows(12, seed=data), **parts)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """A copy, in a folder of its own, of what a run left that was stopped in the middle."""
    known: dict[str, Path] = {}

    def of(name: str, folder: Path) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp("interrupted") / "run"
            made(known[name], **RUNS[name] | {"max_steps": 2}).train()
        return Path(shutil.copytree(known[name], folder / "run"))

    return of


FROZEN, SETTING, DATA = (
    "frozen weights under the policy's adapters",
    "setting `rms_norm_eps`: rec.* 0.01",
    "training data",
)
IN_EVERY_RUN: list[tuple[str, dict[str, Any], str]] = [
    ("a LoRA under another model", {"seed": 1}, FROZEN),
    ("a LoRA under another model", {"epsilon": 0.01}, SETTING),
    ("a LoRA under another model", {"lora": LORA | {"lora_alpha": 9}}, r"lora_alpha of the .*: recorded 8, found 9\."),
    ("a LoRA under none", {"data": 3}, DATA),
]
NIGHTLY: list[tuple[str, dict[str, Any], str]] = [
    ("a LoRA under its own base", {"seed": 1}, "weights of the reference"),
    ("a LoRA under none", {"seed": 1}, FROZEN),
    *((name, {"epsilon": 0.01}, SETTING) for name in RUNS),
    *((name, {"data": 3}, DATA) for name in RUNS),
    *(
        ("a LoRA under another model", {"lora": LORA | {name: value}}, f"in {name} of the adapter 'default': rec")
        for name, value in {
            "r": 8, "lora_alpha": 64, "target_modules": ["q_proj"], "use_rslora": True, "use_dora": True,
            "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "modules_to_save": ["lm_head"],
        }.items()
    ),
    ("a LoRA under its own base", {"lora": LORA | {"lora_alpha": 9}}, r"lora_alpha of the .*: recorded 8, found 9\."),
    ("a LoRA under none", {"lora": LORA | {"r": 2}}, r"r of the adapter 'default': recorded 4, found 2\."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"), [*IN_EVERY_RUN, *(pytest.param(*row, marks=pytest.mark.nightly) for row in NIGHTLY)]
)
def test_another_policy_is_refused(
    name: str, change: dict[str, Any], message: str, interrupted: Any, tmp_path: Path
) -> None:
    another = made(interrupted(name, tmp_path), **RUNS[name] | change)
    with pytest.raises(ValueError, match=message):
        another.train(resume_from_checkpoint=True)
    assert another.state.global_step == 0


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a LoRA under another model", {}),
        ("all weights under another model", {"seed": 1}),  # every weight comes from the checkpoint
        ("a LoRA under none", {"lora": LORA | {"init_lora_weights": "gaussian"}}),
        ("a LoRA under another model", {"lora": LORA | {"target_modules": ".*(q|v)_proj"}}),
        ("a LoRA under none", {"lora": LORA | {"lora_dropout": 0.5}, "disable_dropout": True}),
    ],
)
def test_the_same_policy_goes_on(name: str, change: dict[str, Any], interrupted: Any, tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", **RUNS[name])
    whole.train()
    resumed = made(interrupted(name, tmp_path), **RUNS[name] | change)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)


@pytest.mark.nightly
def test_an_adapter_of_the_checkpoint_goes_on_under_another_model(interrupted: Any, tmp_path: Path) -> None:
    """The reference is another model, so a policy with the checkpoint's own adapter is the same run."""
    folder = interrupted("a LoRA under another model", tmp_path)
    policy = PeftModel.from_pretrained(tiny_model(), folder / "checkpoint-2", is_trainable=True)
    resumed = trainer(policy, config(folder, **SAVING), train_dataset=rows(12, seed=0), ref_model=tiny_model(seed=5))
    resumed.train(resume_from_checkpoint=True)
    whole = made(tmp_path / "whole", **RUNS["a LoRA under another model"])
    whole.train()
    assert logged(resumed) == logged(whole)
