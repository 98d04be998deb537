"""The same subclass, and the same stopped run, with TRL 1.16's trainer and with ours.

A class body is given each of the two as its base. And a run that TRL stopped after three of its six steps is adopted:
its own continuation has the losses that ours must have.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import holdfast
import tiny
from families import tiny_model

trl = pytest.importorskip("trl", reason="needs TRL")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),  # the peer's own
]

TOKENIZER = tiny.tokenizer()
ROWS = Dataset.from_list(tiny.preference_rows(13, seed=3))
HELD_OUT = Dataset.from_list(tiny.preference_rows(7, seed=4))
KEYS = ("input_ids", "attention_mask")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with its tokenizer: TRL reads its reference from there."""
    folder = str(tmp_path_factory.mktemp("model"))
    tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=256).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def with_cross_entropy(base: Any) -> Any:
    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            result = super().compute_loss(model, inputs, return_outputs=return_outputs)
            ids, mask = (inputs[name][: len(inputs["input_ids"]) // 2] for name in KEYS)
            term = 0.1 * model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            return (result[0] + term, result[1]) if return_outputs else result + term

    return Own


def with_a_loss_of_its_own(base: Any) -> Any:
    def sums(model: Any, inputs: Any) -> Tensor:
        others = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        logits = model(**{name: value for name, value in inputs.items() if name not in others}).logits[:, :-1]
        per_token = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        return (per_token * inputs["completion_mask"][:, 1:]).sum(1)

    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            chosen, rejected = sums(model, inputs).chunk(2)
            if "ref_chosen_logps" in inputs:
                ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            else:
                with torch.no_grad():
                    ref_chosen, ref_rejected = sums(self.ref_model, inputs).chunk(2)
            margins = chosen - ref_chosen - rejected + ref_rejected
            return nn.functional.softplus(-self.beta * margins).mean()

    return Own


def with_an_edited_mask(base: Any) -> Any:
    class Own(base):
        def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
            mask = inputs["completion_mask"].clone()
            mask[:, 8] = 0
            return super().compute_loss(model, inputs | {"completion_mask": mask}, *args, **kwargs)

    return Own


def with_rows_of_its_logits(base: Any) -> Any:
    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            picked = outputs.logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
            loss = loss - 0.01 * (picked * inputs["attention_mask"][:, 1:]).mean()
            return (loss, outputs) if return_outputs else loss

    return Own


SUBCLASSES: dict[str, Callable[[Any], Any]] = {
    "super() and cross entropy": with_cross_entropy,
    "a loss of its own": with_a_loss_of_its_own,
    "an edited mask": with_an_edited_mask,
    "rows of its logits": with_rows_of_its_logits,
}


def plain_run(package: Any, kind: Any, path: str, folder: Path, **options: Any) -> Any:
    """A trainer of this class of `package`, with the same arguments for both."""
    own = {name: options.pop(name) for name in ("peft_config", "model", "eval_dataset") if name in options}
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": 3, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-3,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    model: Any = own.pop("model", None) or AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    args = package.DPOConfig(**defaults | options)
    return kind(model=model, args=args, train_dataset=ROWS, processing_class=TOKENIZER, **own)


def tuned(path: str, lora: LoraConfig) -> PeftModel:
    """An adapter that is trained already, as after supervised fine-tuning; it is the reference."""
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("name", "ahead"),
    [(name, ahead) for name in SUBCLASSES for ahead in (False, True) if not (ahead and name == "an edited mask")],
)  # log-probs that were scored ahead are of all tokens
def test_a_subclass_trains_on_the_same(name: str, ahead: bool, path: str, tmp_path: Path) -> None:
    found = []
    for package in (trl, holdfast):
        kind = SUBCLASSES[name](package.DPOTrainer)
        trainer = plain_run(
            package, kind, path, tmp_path / package.__name__, precompute_ref_log_probs=ahead, eval_dataset=HELD_OUT
        )
        trainer.train()
        found.append(losses(trainer))
        if name != "an edited mask":
            found[-1].append(trainer.evaluate()["eval_loss"])
    # Its evaluation is a mean of batches that are not of one size; see `test_trainer_against_trl`.
    assert found[1][:6] == pytest.approx(found[0][:6], rel=2e-5, abs=2e-6)
    assert found[1][6:] == pytest.approx(found[0][6:], rel=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "ipo"},
        {"precompute_ref_log_probs": True},
        {"lora": "fresh"},
        {"lora": "tuned"},
        {"gradient_accumulation_steps": 2, "max_steps": 4, "lr_scheduler_type": "cosine"},
    ],
    ids=str,
)
def test_a_stopped_run_of_the_peer_is_adopted(options: dict[str, Any], path: str, tmp_path: Path) -> None:
    options = dict(options)
    kind = options.pop("lora", "none")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    saving: dict[str, Any] = options | {"save_strategy": "steps", "save_steps": 2}

    def run(package: Any, folder: Path, **more: Any) -> Any:
        policy = {"fresh": {"peft_config": lora}, "tuned": {"model": tuned(path, lora)}}.get(kind, {})
        return plain_run(package, package.DPOTrainer, path, folder, **policy | saving | more)

    whole = run(trl, tmp_path / "run")
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = run(trl, tmp_path / "again")
    again.train(resume_from_checkpoint=checkpoint)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-6)
    with pytest.raises(ValueError, match=r"was written by a trainer of trl, .* set adopt_checkpoint=True"):
        run(holdfast, tmp_path / "ours").train(resume_from_checkpoint=checkpoint)
    ours = run(holdfast, tmp_path / "ours", adopt_checkpoint=True)
    ours.train(resume_from_checkpoint=checkpoint)
    assert losses(ours) == pytest.approx(losses(again), rel=2e-5, abs=2e-6)
    assert losses(ours, "learning_rate") == pytest.approx(losses(again, "learning_rate"))
