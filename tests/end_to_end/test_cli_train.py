"""`holdfast train run.yaml` on a tiny model in a folder, compared with the same run by the Python interface."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from typer.testing import CliRunner

import tiny
from holdfast import DPOConfig, DPOTrainer
from holdfast.cli import assembly
from holdfast.cli.app import app
from holdfast.cli.runfile import read_run_file
from holdfast.cli.yaml_document import RunFileError, read_document
from holdfast.data.load import load_preferences
from holdfast.data.mixing.mixture import mix
from holdfast.data.mixing.source_column import pairs_by_source

LN2 = math.log(2)
runner = CliRunner()

TRAINING: dict[str, Any] = {
    "beta": 0.5,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
WAYS = {
    "model": {"reference": "model"},
    "adapter": {"reference": "adapter", "peft": LORA},
    "precomputed": {"reference": "precomputed"},
    "tr-dpo": {"training": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}},
}


def save_model(folder: Path, seed: int) -> None:
    tokenizer = tiny.tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and files of pairs."""
    folder = tmp_path_factory.mktemp("place")
    save_model(folder / "policy", seed=0)
    save_model(folder / "other", seed=1)
    for name, num_rows, seed in (("train", 12, 0), ("easy", 5, 1), ("hard", 3, 2)):
        lines = [json.dumps(row) for row in tiny.preference_rows(num_rows, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_file(place: Path, output: Path, **sections: Any) -> Path:
    """A run file; JSON is YAML."""
    training = {**TRAINING, "output_dir": str(output), **sections.pop("training", {})}
    run = {"model": str(place / "policy"), "data": {"train": str(place / "train.jsonl")}, "training": training}
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps({**run, **sections}), encoding="utf-8")
    return path


def train(path: Path, *overrides: str, debug: bool = True):
    more = [word for override in overrides for word in ("--set", override)]
    return runner.invoke(app, ["train", str(path), *more, *(["--debug"] if debug else [])], catch_exceptions=not debug)


def logged(output: Path, name: str = "loss") -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[name] for entry in history if name in entry]


def by_python(place: Path, output: Path, way: dict[str, Any], **arguments: Any) -> DPOTrainer:
    settings = {**TRAINING, **way.get("training", {}), "reference": way.get("reference", "auto")}
    return DPOTrainer(
        model=str(place / "policy"),
        args=DPOConfig(output_dir=str(output), **settings),
        processing_class=AutoTokenizer.from_pretrained(place / "policy"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **way["peft"]) if "peft" in way else None,
        **{"train_dataset": load_dataset("json", data_files=str(place / "train.jsonl"), split="train")} | arguments,
    )


@pytest.mark.parametrize("name", WAYS)
def test_each_reference_starts_at_ln_2_and_trains_as_by_python(place, tmp_path, name):
    result = train(run_file(place, tmp_path / "cli", **WAYS[name]))
    assert result.exit_code == 0, result.output
    trainer = by_python(place, tmp_path / "python", WAYS[name])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged(tmp_path / "cli") == pytest.approx(losses, abs=1e-7)
    assert len(losses) == 4
    assert losses[0] == pytest.approx(LN2, abs=1e-5)
    assert max(abs(loss - LN2) for loss in losses) > 1e-4
    weights = "adapter_model.safetensors" if "peft" in WAYS[name] else "model.safetensors"
    trainer.save_model()
    saved, expected = load_file(tmp_path / "cli" / weights), load_file(tmp_path / "python" / weights)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)


def test_the_folder_has_what_was_run_and_what_is_needed_to_use_it(place, tmp_path):
    output = tmp_path / "out"
    result = train(run_file(place, output), "training.beta=0.25", "training.max_steps=1")
    assert result.exit_code == 0, result.output
    values = read_document(output / "run.yaml").values
    assert values["training"] == {**TRAINING, "output_dir": str(output), "beta": 0.25, "max_steps": 1}
    assert values["model"] == str(place / "policy")
    text = "What should I pack?"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (output, place / "policy")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert f"model, tokenizer and run.yaml: {output}" in result.output
    train_loss = json.loads((output / "train_results.json").read_text(encoding="utf-8"))["train_loss"]
    assert train_loss == pytest.approx(logged(output)[0], abs=1e-6)
    assert f"{train_loss:.6g}" in result.output


def test_secrets_are_nowhere_in_the_output_folder(place, tmp_path, caplog):
    output = tmp_path / "out"
    training = {
        "hub_token": "hf_outer-secret",
        "model_init_kwargs": {"token": "hf_inner-secret"},
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
    }
    with caplog.at_level("DEBUG"):
        result = train(run_file(place, output, training=training))
    assert result.exit_code == 0, result.output
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"run.yaml", "training_args.bin"} <= {path.name for path in files}
    assert [path for path in files if re.search(b"hf_(outer|inner)-secret", path.read_bytes())] == []
    assert "-secret" not in caplog.text + result.output
    with pytest.raises(
        RunFileError, match=r"run.yaml, line \d+: `training.hub_token` is '<secret, not written>': a run"
    ):
        read_run_file(output / "run.yaml")
    again = read_run_file(output / "run.yaml", ["training.hub_token=null", "training.model_init_kwargs=null"])
    assert again.training_arguments().max_steps == 1


def test_a_run_that_fails_leaves_no_run_file(place, tmp_path):
    output = tmp_path / "out"
    assert train(run_file(place, output, data={"train": str(place / "no.jsonl")}), debug=False).exit_code == 1
    assert not (output / "run.yaml").exists()


def test_several_evaluation_sets(place, tmp_path):
    output = tmp_path / "out"
    data = {name: str(place / f"{name}.jsonl") for name in ("train", "easy", "hard")}
    sets = {"easy": data["easy"], "hard": {"path": data["hard"], "split": "train"}}
    result = train(run_file(place, output, data={"train": data["train"], "eval": sets}))
    assert result.exit_code == 0, result.output
    found = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
    evaluated = {name: load_dataset("json", data_files=data[name], split="train") for name in ("easy", "hard")}
    trainer = by_python(place, tmp_path / "python", {}, eval_dataset=evaluated)
    trainer.train()
    expected = trainer.evaluate()
    for name in ("eval_easy_loss", "eval_hard_loss", "eval_easy_rewards/accuracies", "eval_hard_rewards/margins"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name
    assert found["eval_easy_loss"] != pytest.approx(found["eval_hard_loss"], abs=1e-6)


def test_another_reference_model(place, tmp_path):
    output = tmp_path / "out"
    result = train(run_file(place, output, reference={"model": str(place / "other")}), "training.max_steps=1")
    assert result.exit_code == 0, result.output
    other = LlamaForCausalLM.from_pretrained(place / "other")
    trainer = by_python(place, tmp_path / "python", {"training": {"max_steps": 1}}, ref_model=other)
    trainer.train()
    assert logged(output) == pytest.approx([trainer.state.log_history[0]["loss"]], abs=1e-6)
    assert abs(logged(output)[0] - LN2) > 1e-3


def test_resuming_goes_on_where_the_checkpoint_was(place, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    saving = {"save_strategy": "steps", "save_steps": 2}
    assert train(run_file(place, whole, training=saving)).exit_code == 0
    path = run_file(place, parts, training=saving)
    assert train(path).exit_code == 0
    resumed = train(path, f"training.resume_from_checkpoint={parts / 'checkpoint-2'}")
    assert resumed.exit_code == 0, resumed.output
    assert logged(parts) == pytest.approx(logged(whole), abs=1e-7)
    last = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def message(result: Any) -> str:
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_a_malformed_line_is_named(place, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(tiny.preference_rows(1)[0]) + '\n{"prompt": \n', encoding="utf-8")
    result = train(run_file(place, tmp_path / "out", data={"train": str(pairs)}), debug=False)
    assert f"error: {pairs}, line 2, column" in message(result)
    assert result.exit_code == 1


def test_a_file_that_is_not_there_has_a_near_name(place, tmp_path):
    result = train(run_file(place, tmp_path / "out", data={"train": str(place / "trian.jsonl")}), debug=False)
    assert "there is no such file or folder; near names in" in message(result)
    assert "'train.jsonl'" in message(result)


def test_missing_columns_name_those_found(place, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"question": "a", "good": "b", "bad": "c"}) + "\n", encoding="utf-8")
    result = train(run_file(place, tmp_path / "out", data={"train": str(pairs)}), debug=False)
    assert "found ['bad', 'good', 'question']" in message(result)


def test_a_dataset_of_several_splits_asks_which(place, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text((place / "easy.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    result = train(run_file(place, tmp_path / "out", data={"train": str(folder)}), debug=False)
    assert f"`data.train` must be one dataset; found the splits train, test in '{folder}'." in message(result)
    assert result.exit_code == 2


MIXTURE = {"easy": {"path": "easy.jsonl", "weight": 1}, "more": {"path": "train.jsonl", "weight": 2}}


def mixture_in(place: Path, **weights: float) -> dict[str, Any]:
    return {name: {**source, "path": str(place / source["path"])} | ({"weight": weights[name]} if weights else {})
            for name, source in MIXTURE.items()}  # fmt: skip


def test_a_mixture_trains_as_by_python(place, tmp_path):
    """5 and 12 rows with the weights 1 and 2: 5 and 10 are taken."""
    data = {"train": mixture_in(place), "eval": str(place / "hard.jsonl")}
    result = train(run_file(place, tmp_path / "cli", data=data, training={"seed": 7}))
    assert result.exit_code == 0, result.output
    sources = {name: load_preferences(source["path"]) for name, source in data["train"].items()}
    mixture = mix(sources, weights={"easy": 1, "more": 2}, seed=7)
    trainer = by_python(place, tmp_path / "python", {"training": {"seed": 7}}, train_dataset=mixture)
    assert pairs_by_source(trainer.train_dataset) == {"easy": 5, "more": 10}
    trainer.train()
    assert logged(tmp_path / "cli") == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.create_model_card()
    card = (tmp_path / "python" / "README.md").read_text(encoding="utf-8")
    assert "| dataset | not named |\n| pairs of easy | 5 |\n| pairs of more | 10 |\n\n| | training |" in card
    assert card.count("| pairs of ") == 2
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    table = card.partition("| | training |\n|---|---:|\n")[2].partition("\n\n```python")[0].splitlines()
    assert table[:2] == ["| step | 4 |", f"| loss | {last['loss']:.4g} |"]
    assert f"| logps/chosen | {last['logps/chosen']:.4g} |" in table


@pytest.mark.parametrize("streaming", [{}, {"streaming": True}])
def test_another_mixture_is_not_resumed(place, tmp_path, streaming):
    def data(**weights: float) -> dict[str, Any]:
        return {"train": {name: source | streaming for name, source in mixture_in(place, **weights).items()}}

    saving = {"save_strategy": "steps", "save_steps": 2}
    path = run_file(place, tmp_path / "out", data=data(easy=1, more=2), training=saving)
    assert train(path).exit_code == 0
    whole = logged(tmp_path / "out")
    resume = {**saving, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}
    result = train(run_file(place, tmp_path / "out", data=data(easy=2, more=2), training=resume), debug=False)
    assert result.exit_code == 1
    assert "the training data" in message(result)
    result = train(run_file(place, tmp_path / "out", data=data(more=2, easy=1), training=resume))
    assert result.exit_code == 0, result.output
    assert logged(tmp_path / "out") == whole


def test_what_cannot_be_mixed_names_the_file_and_the_key(place, tmp_path):
    data = {"train": mixture_in(place, easy=1e-9, more=1)}
    result = train(run_file(place, tmp_path / "out", data=data), debug=False)
    assert result.exit_code == 2
    assert re.search(r"out.yaml, line 1: `data.train`: with the weight 1e-09 the source 'easy' gives", message(result))


def test_an_unknown_reference_is_refused(place, tmp_path):
    result = train(run_file(place, tmp_path / "out", reference="modle"), debug=False)
    assert "reference='modle' was asked for" in message(result)


@pytest.mark.slow
def test_under_torchrun_two_processes_train_as_one_and_one_of_them_prints(place, tmp_path):
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train(run_file(place, tmp_path / "one", training=batches)).exit_code == 0
    path = run_file(place, tmp_path / "two", training={**batches, "gradient_accumulation_steps": 1})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "holdfast.cli", "train", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=1e-5)
    assert done.stdout.count("model, tokenizer and run.yaml:") == 1


@pytest.mark.nightly
@pytest.mark.slow
def test_precomputed_by_two_processes_and_found_by_a_training(place, tmp_path, caplog):
    """12 pairs, scored once by a job of its own; the training then scores nothing, and follows a live reference."""
    path = run_file(place, tmp_path / "run", reference="precomputed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "holdfast.cli", "precompute", str(path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = runner.invoke(app, ["store", "list"], catch_exceptions=False)
    assert "1 store(s)" in listed.stdout
    assert "24" in listed.stdout
    result = train(path)
    assert result.exit_code == 0
    assert "24 of 24 completions found in the store, 0 scored" in caplog.text
    assert train(run_file(place, tmp_path / "live", reference="model")).exit_code == 0
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "live"), abs=1e-5)
    assert runner.invoke(app, ["store", "verify"]).exit_code == 0


def test_what_cannot_be_precomputed_is_refused(place, tmp_path):
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2}
    for sections in (
        {"training": moving},
        {"data": {"train": {"path": str(place / "train.jsonl"), "streaming": True}}},
    ):
        result = runner.invoke(app, ["precompute", str(run_file(place, tmp_path / "run", **sections))])
        assert result.exit_code == 1
        assert "were to be computed ahead, but this run's cannot be" in " ".join(result.stderr.split())


class Breaking(TrainerCallback):
    """Makes a weight infinite, or the loss of an evaluation NaN, once the last step is done."""

    def __init__(self, what: str, trainer: DPOTrainer) -> None:
        self.what, self.trainer = what, trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.what == "weight" and state.global_step == state.max_steps:
            self.trainer.model.lm_head.weight.data[0, 0] = math.inf

    def on_train_end(self, args, state, control, **kwargs):
        if self.what == "weight after training":
            self.trainer.model.lm_head.weight.data[0, 0] = math.inf

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.what == "evaluation":
            metrics["eval_loss"] = math.nan


BREAKS = {
    "loss": ({"loss_type": "sppo_hard", "beta": 1e-30}, r"The loss is infinite at step 1; .*beta or another option"),
    "learning rate": ({"learning_rate": 1e30}, r"at step \d.*resume_from_checkpoint=.*checkpoint-\d`"),
    "weight": ({}, r"at step 4, NaN .*`lm_head.weight`.*--set training.resume_from_checkpoint=.*/checkpoint-3`"),
    "weight after training": ({}, r"saved must be finite; after step 4, .*`lm_head.weight`\. Nothing was written"),
    "evaluation": ({}, r"The evaluation has eval_loss=nan at step 4; every number in it must be finite"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_not_finite_ends_with_1_and_no_model(place, tmp_path, monkeypatch, what):
    options, message = BREAKS[what]
    plain = assembly.trainer_of

    def broken(*args, **kwargs):
        made = plain(*args, **kwargs)
        made.add_callback(Breaking(what, made))
        return made

    monkeypatch.setattr(assembly, "trainer_of", broken)
    training = {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "no", "save_total_limit": 1} | options
    data = {"train": str(place / "train.jsonl"), "eval": str(place / "hard.jsonl")}
    result = train(run_file(place, tmp_path / "out", training=training, data=data), debug=False)
    assert result.exit_code == 1
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists() == (what == "evaluation")  # which is finite
    assert not (tmp_path / "out" / "run.yaml").exists()
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
