"""Checkpoints of other trainers, gone on from: the steps that follow are those of the other trainer.

That one is a plain `transformers.Trainer` with the loss written out, so its checkpoints have what any has but nothing
of holdfast. Others are this package's own with the record of the reference taken out, or as earlier versions wrote it.
"""

import contextlib
import copy
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from checkpoints import manifest_of, record_again
from families import tiny_model
from holdfast import DataCollatorForPreference
from holdfast.checkpoint.foreign import writer_of
from holdfast.checkpoint.manifest import is_complete, read_manifest
from policies import POLICIES, config, logged, rows, trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
SAVING |= {"lr_scheduler_type": "linear"}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1}
ADOPTING = SAVING | {"adopt_checkpoint": True}


class Plain(Trainer):
    """DPO written out on padded rows; the reference is a copy, or the policy with its adapter disabled."""

    frozen: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        def margins(of: Any) -> Tensor:
            logits = of(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            per_token = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
            chosen, rejected = (per_token * inputs["completion_mask"][:, 1:]).sum(1).chunk(2)
            return chosen - rejected

        is_fresh_adapter = self.frozen is None
        with torch.no_grad(), model.disable_adapter() if is_fresh_adapter else contextlib.nullcontext():
            of_reference = margins(model if is_fresh_adapter else self.frozen)
        return -nn.functional.logsigmoid(0.2 * (margins(model) - of_reference)).mean()


def plain(policy: nn.Module, folder: Path, **options: Any) -> Plain:
    """The plain trainer with the options of `config`."""
    ours = config(folder, **SAVING)
    names = ("per_device_train_batch_size", "max_steps", "logging_steps", "learning_rate", "lr_scheduler_type", "optim",
             "max_grad_norm", "save_strategy", "save_steps", "report_to", "use_cpu", "disable_tqdm")  # fmt: skip
    given = {name: getattr(ours, name) for name in names} | {"remove_unused_columns": False} | options
    for part in policy.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    made = Plain(policy, TrainingArguments(str(folder), **given), DataCollatorForPreference(0), rows())
    made.model_accepts_loss_kwargs = False
    is_fresh = isinstance(policy, PeftModel) and not any(
        bool(value.any()) for name, value in policy.named_parameters() if "lora_B" in name
    )
    made.frozen = None if is_fresh else copy.deepcopy(policy).eval()
    return made


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """The folder of a plain run that was stopped after two of its four steps."""
    return stopped(tmp_path, tiny_model())


def stopped(folder: Path, policy: nn.Module) -> Path:
    run = plain(policy, folder / "run", max_steps=4)
    run.train()
    shutil.rmtree(folder / "run" / "checkpoint-4")
    (folder / "whole.json").write_text(json.dumps([e["loss"] for e in run.state.log_history if "loss" in e]))
    return folder / "run"


# --- what follows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "by"),
    [
        ("full", "True"),
        ("lora_fresh", "path"),
        ("lora_sft", "True"),
        *(
            pytest.param(*row, marks=pytest.mark.nightly)
            for row in (("full", "path"), ("lora_fresh", "True"), ("lora_sft", "path"))
        ),
    ],
)
def test_the_steps_that_follow_are_those_of_the_other_trainer(
    kind: str, by: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped(tmp_path, POLICIES[kind]())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ours = trainer(POLICIES[kind](), config(folder, **ADOPTING))
    ours.train(resume_from_checkpoint=str(folder / "checkpoint-2") if by == "path" else True)
    assert logged(ours) == pytest.approx(json.loads((tmp_path / "whole.json").read_text()), abs=2e-5)
    assert [record.message.partition(" is adopted")[1] for record in caplog.records if "adopted" in record.message] == [
        " is adopted"
    ]
    kept = {path: path.read_bytes() for path in before if "checkpoint-2" in path.parts}
    assert kept == {path: content for path, content in before.items() if path in kept}
    assert read_manifest(folder / "checkpoint-2")["adopted"] == "a trainer of transformers"


def test_what_was_adopted_is_resumed_like_any_other(foreign: Path, tmp_path: Path) -> None:
    """By a run without the option, which compares its reference with the recorded one."""
    first = trainer(tiny_model(), config(foreign, **ADOPTING))
    first.train(resume_from_checkpoint=True)
    again = trainer(tiny_model(), config(foreign, **SAVING))
    again.train(resume_from_checkpoint=str(foreign / "checkpoint-2"))
    assert logged(again) == logged(first)
    with pytest.raises(ValueError, match="differs in the weights of the reference"):
        trainer(tiny_model(seed=4), config(foreign, **SAVING)).train(
            resume_from_checkpoint=str(foreign / "checkpoint-2")
        )
    other = trainer(tiny_model(seed=4), config(foreign, **ADOPTING))  # the user says that it was another
    other.restore(str(foreign / "checkpoint-2"))
    weights = AutoModelForCausalLM.from_pretrained(foreign / "checkpoint-2")
    assert torch.equal(other.model.lm_head.weight, weights.lm_head.weight)
    assert torch.equal(other.ref_model.lm_head.weight, tiny_model(seed=4).lm_head.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"precompute_ref_log_probs": True},
        MOVING,
        pytest.param({}, marks=pytest.mark.nightly),
        pytest.param({"reference": "snapshot"}, marks=pytest.mark.nightly),
    ],
)
def test_one_of_this_package_without_its_record(options: dict[str, Any], tmp_path: Path) -> None:
    """As if it had been stripped, or as if a kill had come before the record."""
    whole = trainer(tiny_model(), config(tmp_path, **SAVING | options))
    whole.train()
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{step}" / "reference")
    shutil.rmtree(tmp_path / "checkpoint-4")
    ours = trainer(tiny_model(), config(tmp_path, **ADOPTING | options))
    if options == MOVING:
        with pytest.raises(ValueError, match="never finished it: where its moving reference was is not in it"):
            ours.train(resume_from_checkpoint=True)
        return
    ours.train(resume_from_checkpoint=True)
    assert logged(ours)[2:] == pytest.approx(logged(whole)[2:], abs=1e-6)


def test_a_moving_reference_begins_again(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = trainer(tiny_model(), config(foreign, **ADOPTING | MOVING))
    ours.train(resume_from_checkpoint=True)
    assert ours.reference.version == 2
    assert "It holds no moved reference, so this run's begins as `model` again" in caplog.text


def test_one_of_an_earlier_version(tmp_path: Path) -> None:
    whole = trainer(tiny_model(), config(tmp_path, **SAVING))
    whole.train()
    path = manifest_of(tmp_path / "checkpoint-2")
    lacking = ("inputs", "files", "checksum")
    path.write_text(json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n not in lacking}))
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"did not record \['inputs'\] .* adopt_checkpoint=True takes it over"):
        trainer(tiny_model(), config(tmp_path, **SAVING)).train(resume_from_checkpoint=checkpoint)
    ours = trainer(tiny_model(), config(tmp_path, **ADOPTING))
    ours.train(resume_from_checkpoint=checkpoint)
    assert logged(ours) == logged(whole)
    record_again(tmp_path / "checkpoint-2", version=3)
    manifest = {n: v for n, v in read_manifest(tmp_path / "checkpoint-2").items() if n not in (*lacking, "adopted")}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="unless its reference had moved"):
        trainer(tiny_model(), config(tmp_path, **ADOPTING)).train(resume_from_checkpoint=checkpoint)


# --- what is said without the option ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "True"])
def test_it_is_named_and_how_to_adopt_it(by: str, foreign: Path) -> None:
    message = (
        r"was written by a trainer of transformers, .* set adopt_checkpoint=True: policy, optimizer, .*from `model`"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), config(foreign, **SAVING)).train(
            resume_from_checkpoint=str(foreign / "checkpoint-2") if by == "path" else True
        )
    assert not is_complete(foreign / "checkpoint-2")


def test_a_later_one_of_another_trainer_is_not_passed_over(foreign: Path) -> None:
    """An older complete checkpoint in the same folder is named, not taken without a word."""
    trainer(tiny_model(), config(foreign, **SAVING | {"max_steps": 1, "save_steps": 1})).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 was asked for, but .* a trainer of .*go on from there"):
        trainer(tiny_model(), config(foreign, **SAVING)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "a trainer of transformers"),
        (b"\x80\x02ctrl.trainer.dpo_config\nDPOConfig\nctorch\ndevice\n.", "a trainer of trl"),
        (b"\x80\x02choldfast.config\nDPOConfig\n.", "holdfast, which never finished it"),
        (b"\x80\x02ctransformers.training_args\nTrainingArguments\nX\x03\x00\x00\x00trl.", "a trainer of transformers"),
        (b"\x80\x02ctrl.trainer", "a trainer of transformers"),
        (b"no archive", "a trainer of transformers"),
    ],
)
def test_who_wrote_it(content: bytes | None, expected: str, foreign: Path) -> None:
    file = foreign / "checkpoint-2" / "training_args.bin"
    file.unlink()
    if content == b"no archive":
        file.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("training_args/data.pkl", content)
    assert writer_of(foreign / "checkpoint-2") == expected
    (foreign / "checkpoint-2" / "trainer_state.json").unlink()
    assert writer_of(foreign / "checkpoint-2") is None


# --- what is refused with the option ----------------------------------------------------------------------------------


def other_shape() -> nn.Module:
    return tiny_model(intermediate_size=64)


def deeper() -> nn.Module:
    return tiny_model(num_hidden_layers=3)


def shallower() -> nn.Module:
    return tiny_model(num_hidden_layers=1)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (other_shape, r"the model in it is not that of this policy: .*gate_proj.weight \(there \[48, 32\], here \[64,"),
        (deeper, r"layers\.2\..* \(there nothing, here .*and \d+ more"),
        (shallower, r"layers\.1\..* here nothing"),
        (POLICIES["lora_fresh"], r"adapter 'default', but it holds the whole model \(model.safetensors\)"),
    ],
)
def test_other_tensors(policy: Callable[[], nn.Module], message: str, foreign: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(policy(), config(foreign, **ADOPTING)).train(resume_from_checkpoint=True)
    assert not is_complete(foreign / "checkpoint-2")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (POLICIES["full"], "for a policy without adapters, but it holds an adapter"),
        (POLICIES["lora_sft_named_ref"], "the adapter 'ref', but it holds no ref/adapter_model.safetensors"),
        (POLICIES["lora_head"], r"the adapter 'default' in it is not that of this policy: .*lm_head"),
    ],
)
def test_other_adapters(policy: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    folder = stopped(tmp_path, POLICIES["lora_sft"]())
    with pytest.raises(ValueError, match=message):
        trainer(policy(), config(folder, **ADOPTING)).train(resume_from_checkpoint=True)


def test_the_adapter_that_it_says_it_began_with(tmp_path: Path) -> None:
    """The common trainer saves that one as `ref` beside the one that trains."""
    folder = stopped(tmp_path, POLICIES["lora_sft"]())
    POLICIES["lora_sft"]().save_pretrained(folder / "checkpoint-2" / "ref")
    ours = trainer(POLICIES["lora_sft"](), config(folder, **ADOPTING))
    ours.train(resume_from_checkpoint=True)
    shutil.rmtree(folder / "checkpoint-2" / "reference")
    shutil.rmtree(folder / "checkpoint-4")
    with pytest.raises(ValueError, match=r"the adapter 'default' of `model` is another\. Pass as `model`"):
        trainer(POLICIES["lora_fresh"](), config(folder, **ADOPTING)).train(resume_from_checkpoint=True)


def test_the_checkpoint_itself_as_the_model(foreign: Path) -> None:
    """Its reference would be the policy of step 2."""
    policy = AutoModelForCausalLM.from_pretrained(foreign / "checkpoint-2", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"`model` has the checkpoint's own weights: .* at step 2 of that run"):
        trainer(policy, config(foreign, **ADOPTING)).train(resume_from_checkpoint=True)


def test_the_option_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adopt_checkpoint=True was asked for, but no checkpoint is resumed"):
        trainer(tiny_model(), config(tmp_path, adopt_checkpoint=True)).train()


def test_pickled_weights(foreign: Path) -> None:
    checkpoint = foreign / "checkpoint-2"
    torch.save(tiny_model().state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\*\.safetensors\. .*pickled weights \(\.bin\) are not read"):
        trainer(tiny_model(), config(foreign, **ADOPTING)).train(resume_from_checkpoint=True)


def test_a_cut_state_of_the_trainer(foreign: Path) -> None:
    (foreign / "checkpoint-2" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"its file trainer_state\.json was cut or changed"):
        trainer(tiny_model(), config(foreign, **ADOPTING)).train(resume_from_checkpoint=True)
