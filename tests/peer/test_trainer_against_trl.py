"""Whole short runs with the same arguments through TRL 1.16's trainer and ours: every logged number, step by step.

TRL logs means of batch means; here a metric is a mean over pairs or tokens, whatever batches they came in. So TRL's
trainer is made to tell each batch's values and sizes, and its log *weighted by these sizes* is what ours must be; where
all batches of a log are of one size, or there is only one, that is the number TRL logs, and ours equals it as it is.

Where holdfast differs on purpose, a test says so and shows both values:

- Evaluation: above; in `eval_loss` TRL counts the last batch once for each of its pairs, the others twice.
- `label_smoothing` under `sigmoid` is ignored there; here it is conservative DPO.
- `bf16` is on by default there, on every machine; here not on a CPU.
- The reference of a model tuned in memory is read again from its path there; here it is the tuned model.
- `padding_free=True`, and keyword arguments for loading a model that is loaded already: a warning there, refused here.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tiny_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import holdfast
import tiny

trl = pytest.importorskip("trl", reason="needs TRL")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),  # the peer's own
]

TOKENIZER = tiny.tokenizer()
MESSAGES = tiny.preference_rows(13, seed=3)
HELD_OUT = Dataset.from_list(tiny.preference_rows(7, seed=4))
WORDS = tiny.PROSE.split()
TEXTS = [
    {"prompt": " ".join(WORDS[n : n + 7]), "chosen": f" {WORDS[2 * n]} it is", "rejected": f" {WORDS[3 * n + 1]}."}
    for n in range(13)
]
TOOLS = [{"type": "function", "function": {"name": "tides", "description": "When", "parameters": {"day": "Monday"}}}]

UNLIKE = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
OURS_ALONE = {"reference/kl_chosen", "reference/kl_rejected"}
BY_TOKENS = {
    "entropy": ("chosen", "rejected"),
    "logits/chosen": ("chosen",),
    "logits/rejected": ("rejected",),
    "mean_token_accuracy": ("chosen",),
}
"""Metrics that are means over tokens, and whose; the others are means over pairs."""

RELATIVE = 1e-5
ABSOLUTE = 2e-6
"""Of numbers of size 1 that are differences of larger ones: a log-prob of -100 has a rounding error of 1e-5 itself."""

NATS = 3e-5
"""The same of `logps/*` and what is made of them: sums of up to a hundred token log-probs, added up in another order."""


class Recording(trl.DPOTrainer):
    """TRL's trainer, which keeps for each of its logs what the same batches give when weighted by their sizes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.weighted: list[dict[str, float]] = []
        self.sizes: dict[str, list[dict[str, float]]] = {"train": [], "eval": []}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        chosen, rejected = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
        loss = result[0] if isinstance(result, tuple) else result
        size = {"pairs": len(chosen), "chosen": int(chosen.sum()), "rejected": int(rejected.sum()), "loss": loss.item()}
        self.sizes["train" if self.model.training else "eval"].append(size)
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if "loss" in logs or "train_loss" in logs else "eval"
        sizes, found = self.sizes[mode], {}
        for name, values in self._metrics[mode].items() if sizes else ():
            weights = [sum(size[side] for side in BY_TOKENS.get(name, ("pairs",))) for size in sizes]
            if name == "num_tokens":
                weights = [1]
            found[name] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
        if mode == "eval" and sizes:
            found["loss"] = sum(s["loss"] * s["pairs"] for s in sizes) / sum(s["pairs"] for s in sizes)
        self.weighted.append({name if mode == "train" else f"eval_{name}": value for name, value in found.items()})
        self.sizes[mode] = []
        super().log(logs, *args, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a tiny model (family, seed) with its tokenizer: TRL reads its reference from there."""
    folders: dict[tuple[str, int], str] = {}

    def folder(family: str = "llama", seed: int = 0) -> str:
        if (family, seed) not in folders:
            path = str(tmp_path_factory.mktemp(family))
            model = tiny_model(family, seed, vocab_size=len(TOKENIZER), max_position_embeddings=256)
            learn_a_little(model)
            model.save_pretrained(path)
            TOKENIZER.save_pretrained(path)
            folders[family, seed] = path
        return folders[family, seed]

    return folder


def learn_a_little(model: nn.Module) -> None:
    """Some steps on the chosen answers, so that top-1 tokens are sometimes right and no metric is idle."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rows = [TOKENIZER.apply_chat_template(r["prompt"] + r["chosen"])["input_ids"] for r in MESSAGES[:6] + HELD_OUT.to_list()]
    for ids in (torch.tensor([row]) for row in rows * 3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def loaded(path: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def dataset(rows: list[dict[str, Any]] = MESSAGES) -> Dataset:
    return Dataset.from_list(rows)


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 3,
        "max_steps": 5,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "beta": 0.2,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return defaults | options


def trainers(folder: Path, make: Callable[[], dict[str, Any]], **options: Any) -> tuple[Recording, holdfast.DPOTrainer]:
    """TRL's trainer and ours of the same arguments; `make` makes the constructor's, afresh for each."""
    common = {"train_dataset": dataset(), "processing_class": TOKENIZER}
    theirs = Recording(args=trl.DPOConfig(**arguments(folder / "theirs", **options)), **common | make())
    ours = holdfast.DPOTrainer(args=holdfast.DPOConfig(**arguments(folder / "ours", **options)), **common | make())
    return theirs, ours


def assert_same_run(theirs: Recording, ours: holdfast.DPOTrainer, relative: float = RELATIVE) -> None:
    """Every log of the two runs has the same names, and the same numbers once batches are weighted by size."""
    for trainer in (theirs, ours):
        trainer.train()
    assert_same_logs(theirs, ours, relative)
    assert_same_weights(theirs.model, ours.model)


def assert_same_logs(theirs: Recording, ours: holdfast.DPOTrainer, relative: float = RELATIVE) -> None:
    their_log, our_log = theirs.state.log_history, ours.state.log_history
    assert [entry["step"] for entry in our_log] == [entry["step"] for entry in their_log]
    for entry, weighted, found in zip(their_log, theirs.weighted, our_log, strict=True):
        # What TRL knows of the last steps when it ends on an evaluation, and leaves out of its log, is in `weighted`.
        expected = {name: value for name, value in (entry | weighted).items() if not is_speed(name)}
        alone = found.keys() - expected.keys() - entry.keys()
        assert alone <= OURS_ALONE | {f"eval_{name}" for name in OURS_ALONE}
        for name, value in expected.items():
            scale = NATS if "logps/" in name or "rewards/" in name else ABSOLUTE
            assert found[name] == pytest.approx(value, rel=relative, abs=scale), (name, entry["step"])


def is_speed(name: str) -> bool:
    return name in UNLIKE or name.endswith(("_runtime", "_per_second"))


def assert_same_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """All trained weights agree, by name; TRL's frozen copy of an adapter is its own."""
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad and ".ref." not in name}
    found = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def moved(trainer: Any, start: nn.Module) -> bool:
    """Whether training changed the weights by more than the comparison forgives."""
    before = dict(start.named_parameters())
    return any(float((p - before[n]).abs().max()) > 1e-3 for n, p in trainer.model.named_parameters() if n in before)


# --- optimizers, batches, accumulation -------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("batch", "accumulation", "steps"), [(3, 1, 5), (4, 1, 6), (1, 4, 4), (2, 3, 5), (13, 1, 4)])
def test_batches(optim: str, batch: int, accumulation: int, steps: int, saved: Any, tmp_path: Path) -> None:
    """13 pairs: the last batch of an epoch is smaller; with an evaluation of 7 pairs in batches of 4 and 3 at the end."""
    theirs, ours = trainers(
        tmp_path,
        lambda: {"model": loaded(saved()), "eval_dataset": HELD_OUT},
        optim=optim,
        learning_rate=0.05 if optim == "sgd" else 1e-3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=steps,
    )
    assert_same_run(theirs, ours)
    assert moved(ours, loaded(saved()))


def test_logs_of_several_steps(saved: Any, tmp_path: Path) -> None:
    """Logged every third step of seven, evaluated every second: what is left over goes into the last log."""
    theirs, ours = trainers(
        tmp_path,
        lambda: {"model": saved(), "eval_dataset": HELD_OUT},
        logging_steps=3,
        max_steps=7,
        eval_strategy="steps",
        eval_steps=2,
        logging_first_step=True,
    )
    assert_same_run(theirs, ours)


def test_gradient_checkpointing_and_defaults_of_the_run(saved: Any, tmp_path: Path) -> None:
    """AdamW, linear decay, clipping and checkpointing as they are by default, over one epoch."""
    folder = tmp_path
    make = lambda: {"model": saved(), "train_dataset": dataset(), "processing_class": TOKENIZER}  # noqa: E731
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1}
    theirs = Recording(args=trl.DPOConfig(str(folder / "theirs"), logging_steps=1, **plain), **make())
    ours = holdfast.DPOTrainer(args=holdfast.DPOConfig(str(folder / "ours"), logging_steps=1, **plain), **make())
    assert ours.args.gradient_checkpointing is theirs.args.gradient_checkpointing is True
    for name in ("learning_rate", "logging_steps", "optim", "lr_scheduler_type", "max_grad_norm", "weight_decay"):
        assert getattr(ours.args, name) == getattr(theirs.args, name), name
    assert_same_run(theirs, ours)


def test_no_arguments_at_all(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder name and options; but bf16 is on there on a CPU as well, which moves its very first loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    theirs = Recording(model=saved(), train_dataset=dataset())
    ours = holdfast.DPOTrainer(model=saved(), train_dataset=dataset())
    assert theirs.args.output_dir == ours.args.output_dir
    shared = {f.name for f in trl.DPOConfig.__dataclass_fields__.values()}
    assert shared <= set(holdfast.DPOConfig.__dataclass_fields__)
    differing = {n for n in shared if str(getattr(theirs.args, n)) != str(getattr(ours.args, n))}
    assert differing - {"logging_dir", "run_name"} == {"bf16"}
    assert (theirs.args.bf16, ours.args.bf16) == (True, torch.cuda.is_available())


# --- policies and references -----------------------------------------------------------------------------------------


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def trained_adapter(path: str, **options: Any) -> PeftModel:
    """A PEFT model whose adapter, called "default", has been trained: its B factors are not zero."""
    torch.manual_seed(7)
    model = get_peft_model(loaded(path), lora(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def cases() -> Iterator[Any]:
    """(what goes to the constructor given `saved`, options)"""

    def case(name: str, make: Callable[[Any], dict[str, Any]], **options: Any) -> Any:
        return pytest.param(make, options, id=name)

    rough = {"learning_rate": 0.5}
    yield case("path", lambda saved: {"model": saved()})
    yield case("ref_model", lambda saved: {"model": loaded(saved()), "ref_model": loaded(saved("llama", 1))})
    yield case("precompute", lambda saved: {"model": saved()}, precompute_ref_log_probs=True)
    yield case(
        "precompute-ref_model",
        lambda saved: {"model": saved(), "ref_model": loaded(saved("llama", 1))},
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=5,
    )
    yield case("moe", lambda saved: {"model": saved("mixtral")})
    yield case("moe-coef", lambda saved: {"model": saved("qwen3_moe")}, router_aux_loss_coef=0.3)
    yield case("moe-off", lambda saved: {"model": saved("qwen3_moe")}, router_aux_loss_coef=0.0)
    yield case("softcap", lambda saved: {"model": saved("gemma2")})
    yield case("tied", lambda saved: {"model": saved("llama_tied")})
    yield case("lora", lambda saved: {"model": saved(), "peft_config": lora()}, **rough)
    yield case("lora-moe", lambda saved: {"model": saved("qwen3_moe"), "peft_config": lora()}, **rough)
    yield case(
        "lora-precompute", lambda saved: {"model": saved(), "peft_config": lora()}, precompute_ref_log_probs=True, **rough
    )
    yield case(
        "lora-ref_model",
        lambda saved: {"model": saved(), "peft_config": lora(), "ref_model": loaded(saved("llama", 1))},
        **rough,
    )
    yield case("lora-checkpointing", lambda saved: {"model": saved(), "peft_config": lora()}, gradient_checkpointing=True)
    yield case("sft-adapter", lambda saved: {"model": trained_adapter(saved())}, **rough)
    yield case("fresh-adapter", lambda saved: {"model": trained_adapter(saved(), init_lora_weights=True)}, **rough)
    yield case("sft-adapter-modules_to_save", lambda saved: {"model": trained_adapter(saved(), modules_to_save=["lm_head"])})
    for alpha in (0.6, 1.0):
        yield case(
            f"sync-{alpha}",
            lambda saved: {"model": saved()},
            sync_ref_model=True,
            ref_model_mixup_alpha=alpha,
            ref_model_sync_steps=2,
            max_steps=6,
        )
    yield case(
        "sync-ref_model",
        lambda saved: {"model": saved(), "ref_model": loaded(saved("llama", 1))},
        sync_ref_model=True,
        ref_model_sync_steps=1,
    )


@pytest.mark.parametrize(("make", "options"), list(cases()))
def test_policies_and_references(make: Any, options: dict[str, Any], saved: Any, tmp_path: Path) -> None:
    theirs, ours = trainers(
        tmp_path, lambda: {**make(saved), "eval_dataset": HELD_OUT}, eval_strategy="steps", eval_steps=5, **options
    )
    assert_same_run(theirs, ours)
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert max(losses) - min(losses) > 1e-3
    if options.get("sync_ref_model"):
        assert_same_reference(theirs.ref_model, ours.ref_model)


def assert_same_reference(theirs: nn.Module, ours: nn.Module) -> None:
    for (name, expected), (_, found) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
