"""Scripts as people have them for the common DPO trainer: whole ones, command lines, callbacks, collators, the hub."""

import math
import runpy
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from changed_script import changed
from families import tiny_model
from holdfast import DataCollatorForPreference, DPOConfig, DPOTrainer
from policies import config, logged, rows, trainer
from public_scripts import HEAD, SHAPES, Shape
from recomputation import NAME
from tiny import preference_rows, tokenizer

# --- whole scripts ----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "output_dir": "out", "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1,
    "learning_rate": 0.01, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
LORA: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the scripts read: a model, an adapter for it and pairs."""
    folder, tiny = tmp_path_factory.mktemp("scripts"), tokenizer()
    model = tiny_model(vocab_size=len(tiny), max_position_embeddings=256)
    model.save_pretrained(folder / "model")
    tiny.save_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    Dataset.from_list(preference_rows(9)).to_json(folder / "pairs.jsonl")
    return folder


def other_package() -> types.ModuleType:
    """A stand-in for the package of the common trainer, with what the scripts import from it."""

    @dataclass
    class ModelConfig:
        use_peft: bool = False

    @dataclass
    class ScriptArguments:
        dataset_name: str = "pairs"

    class TrlParser(HfArgumentParser):
        def parse_args_and_config(self) -> Any:
            return self.parse_args_into_dataclasses()

    package: Any = types.ModuleType("trl")
    package.ModelConfig, package.ScriptArguments, package.TrlParser = ModelConfig, ScriptArguments, TrlParser
    package.DPOScriptArguments = ScriptArguments
    package.get_peft_config = lambda config: LoraConfig(**LORA) if config.use_peft else None
    return package


@pytest.fixture
def run_script(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DPOTrainer]:
    """Runs a script with a command line, in the folder with the model; returns its trainer."""
    monkeypatch.setitem(sys.modules, "trl", other_package())
    monkeypatch.chdir(folder)

    def run(source: str, words: list[str], name: str) -> DPOTrainer:
        path = tmp_path / name
        path.write_text(source)
        options = [word for option, value in SMALL.items() for word in (f"--{option}", str(value))]
        monkeypatch.setattr(sys, "argv", [str(path), *options, *words])
        set_seed(42)
        found = runpy.run_path(str(path), init_globals={"SMALL": SMALL | {"output_dir": str(tmp_path / "out")}})
        return next(value for value in found.values() if isinstance(value, DPOTrainer))

    return run


def plain_losses(shape: Shape) -> list[float]:
    """The losses of the run that a script means, without the script."""
    ref_model: Any = None
    if shape.ref_adapter:
        base = AutoModelForCausalLM.from_pretrained("model")
        ref_model = PeftModel.from_pretrained(base, "adapter").merge_and_unload()
    ours = DPOTrainer(
        AutoModelForCausalLM.from_pretrained("model"),
        ref_model,
        args=DPOConfig(**SMALL | shape.options),
        train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
        eval_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
        processing_class=AutoTokenizer.from_pretrained("model"),
        peft_config=LoraConfig(**LORA) if shape.lora else None,
    )
    ours.train()
    return logged(ours)


@pytest.mark.parametrize("name", SHAPES)
def test_a_public_script_runs_or_says_all_that_is_to_be_changed(
    name: str, run_script: Callable[..., DPOTrainer], tmp_path: Path
) -> None:
    """With its import changed. The changes of the one error, made by a program that reads it, are enough: the script
    then trains to the losses of the run that it means."""
    shape = SHAPES[name]
    source, words = HEAD.format(imports=shape.imports) + shape.source, [*shape.words]
    if shape.changes:
        with pytest.raises((TypeError, ValueError, AttributeError)) as error:
            run_script(source, words, "as_it_is.py")
        message = str(error.value)
        lines = [line for line in message.splitlines() if line.startswith("-")] or [f"- {message}"]
        assert len(lines) == len(shape.changes), message
        for line, change in zip(lines, shape.changes, strict=True):
            assert line.startswith(f"- {change}"), message
        source, words = changed(source, words, message)
    ours = run_script(source, words, "changed.py")
    assert logged(ours) == pytest.approx(plain_losses(shape), abs=1e-6)
    if "oumi" in name:
        assert logged(ours, "own/number") == [3.0, 3.0]
        assert "own" in ours.model.model_tags


# --- command lines ----------------------------------------------------------------------------------------------------


def parsed(*options: str) -> DPOConfig:
    (made,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *options])
    return made


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"loss_type": ["sigmoid"], "loss_weights": None, "gradient_checkpointing": True, "bf16": False}),
        (("--loss_type", "ipo"), {"loss_type": ["ipo"]}),
        (
            ("--loss_type", "sigmoid", "bco_pair", "--loss_weights", "0.8", "0.2"),
            {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        ),
        (("--gradient_checkpointing",), {"gradient_checkpointing": True}),
        (("--gradient_checkpointing", "False"), {"gradient_checkpointing": False}),
        (("--no_gradient_checkpointing",), {"gradient_checkpointing": False, NAME: False}),
        (
            ("--gradient_checkpointing_kwargs", '{"use_reentrant": false}'),
            {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        ),
        ((f"--{NAME}", "False"), {"gradient_checkpointing": False}),
        (("--no_disable_dropout",), {"disable_dropout": False}),
        (("--pad_to_multiple_of", "8"), {"pad_to_multiple_of": 8}),
        (("--pad_to_multiple_of", "auto"), {"pad_to_multiple_of": None}),
        (("--pad_to_multiple_of", "null"), {"pad_to_multiple_of": None}),
        (("--model_init_kwargs", '{"dtype": "bfloat16"}'), {"model_init_kwargs": {"dtype": "bfloat16"}}),
        (
            ("--sync_ref_model", "--ref_model_mixup_alpha", "1.0", "--ref_model_sync_steps", "2"),
            {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2},
        ),
        (("--precompute_ref_log_probs",), {"precompute_ref_log_probs": True}),
        (("--max_length", "128", "--truncation_mode", "keep_end"), {"max_length": 128, "truncation_mode": "keep_end"}),
    ],
)
def test_command_lines(options: tuple[str, ...], expected: dict[str, Any]) -> None:
    made = parsed(*options)
    assert {name: getattr(made, name) for name in expected} == expected


def test_help_names_every_option() -> None:
    text = HfArgumentParser(DPOConfig).format_help()
    for name in ("loss_type", "beta", "reference", "no_gradient_checkpointing", "ref_model_sync_steps"):
        assert f"--{name}" in text


def test_a_whole_script(tmp_path: Path) -> None:
    """Command line, model and dataset by path, evaluation, saving: all weights move, and what is saved is the policy.

    The `train_loss` at the end is the mean of the losses of the steps; the first is that of a zero margin.
    """
    tiny = tokenizer()
    tiny_model(vocab_size=len(tiny), max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny.save_pretrained(tmp_path / "model")
    Dataset.from_list(preference_rows(9)).to_json(tmp_path / "pairs.jsonl")
    command = [
        "--output_dir", str(tmp_path / "out"), "--use_cpu", "--max_steps", "3", "--per_device_train_batch_size", "2",
        "--learning_rate", "0.01", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "3",
        "--loss_type", "sigmoid", "--gradient_checkpointing", "--report_to", "none", "--disable_tqdm", "True",
        "--no_remove_unused_columns", "--save_strategy", "no",
    ]  # fmt: skip
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(command)
    pairs = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train")
    parts = pairs.train_test_split(test_size=3, seed=0)
    ours = DPOTrainer(
        model=str(tmp_path / "model"), args=args, train_dataset=parts["train"], eval_dataset=parts["test"]
    )
    before = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    ours.train()
    ours.save_model(args.output_dir)
    losses = logged(ours)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert [name for name, parameter in ours.model.named_parameters() if torch.equal(parameter, before[name])] == []
    saved = AutoModelForCausalLM.from_pretrained(args.output_dir)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(saved.eval()(ids).logits, ours.model.eval()(ids).logits)


# --- logs -------------------------------------------------------------------------------------------------------------


def test_tokens_counted_at_an_evaluation_between_two_logs(tmp_path: Path) -> None:
    """Evaluated after 2 of 4 steps, before anything is logged: tokens of the first 6 rows; at the end, of all 12."""
    args = config(tmp_path, logging_steps=4, eval_strategy="steps", eval_steps=2, train_sampling_strategy="sequential")
    ours = trainer(tiny_model(), args, eval_dataset=rows(4, seed=1))
    ours.train()
    counts = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows().to_list()]
    assert logged(ours, "eval_num_tokens") == [sum(counts[:6]), sum(counts)]
    assert logged(ours, "num_tokens") == [sum(counts)]


# --- collators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["model", "precomputed"])
def test_a_collator_sees_all_columns_that_are_kept(way: str, tmp_path: Path) -> None:
    """A user's collator that reads a column of its own: also on the batches of the audit and of scoring ahead."""
    collate = DataCollatorForPreference(pad_token_id=0)
    seen: list[float] = []

    def reads_weight(examples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(row["weight"] for row in examples)
        return collate(examples)

    weighed = rows().add_column("weight", [0.5] * 12)
    args = config(tmp_path, remove_unused_columns=False, reference=way)
    ours = trainer(tiny_model(), args, train_dataset=weighed, data_collator=reads_weight)
    ours.train()
    plain = trainer(tiny_model(), config(tmp_path, reference=way, layout="padded"))
    plain.train()
    assert logged(ours) == logged(plain)
    assert len(seen) == 1 + 3 + 12 + (12 if way == "precomputed" else 0)  # recorded, audited, trained, scored ahead


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_prefix_tuning_under_checkpointing_is_refused(tmp_path: Path) -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"prefix-tuning adapter 'default'.*Set gradient_checkpointing=False"):
        trainer(tiny_model(), config(tmp_path, activation_checkpointing=True), peft_config=prefix)
    ours = trainer(tiny_model(), config(tmp_path), peft_config=prefix)
    ours.train()
    assert logged(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert min(logged(ours)) < math.log(2) - 1e-4


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Any:
    with mock.patch("transformers.trainer.hf_api") as api:
        api.return_value.create_repo.return_value.repo_id = "someone/kelp"
        yield api.return_value


def test_pushing_to_the_hub(hub: Any, tmp_path: Path) -> None:
    """What would be uploaded: the folder with weights, tokenizer and a card that names data, license and tags."""
    ours = trainer(tiny_model(), config(tmp_path / "out", hub_model_id="someone/kelp"))
    ours.train()
    ours.push_to_hub(dataset_name="tides", tags="sea", license="apache-2.0")
    uploaded = hub.upload_folder.call_args.kwargs
    assert uploaded["repo_id"] == "someone/kelp"
    folder = Path(uploaded["folder_path"])
    card = (folder / "README.md").read_text()
    for piece in ("model_name: kelp", "- tides", "license: apache-2.0", "- sea", "- holdfast", "- dpo"):
        assert piece in card
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(saved.lm_head.weight, ours.model.lm_head.weight)


def test_a_subclassed_collator_is_heard() -> None:
    """Scripts override `torch_call`, as of any collator of the common library."""

    class Reversed(DataCollatorForPreference):
        def torch_call(self, features):  # type: ignore[no-untyped-def]
            return super().torch_call(features[::-1])

    table = rows(2).to_list()
    found, expected = Reversed(pad_token_id=0)(table), DataCollatorForPreference(pad_token_id=0)(table[::-1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_callback_can_schedule_beta(tmp_path: Path) -> None:
    """hinge at zero margin is 1 for every beta; ipo is 1 / (4 beta^2), so its first loss shows which beta was used."""
    ours = trainer(tiny_model(), config(tmp_path, loss_type="ipo", max_steps=1))
    ours.beta = 0.5
    ours.train()
    assert logged(ours)[0] == pytest.approx(1.0, abs=1e-4)


def test_an_implicit_prompt_becomes_a_column(tmp_path: Path) -> None:
    """Callbacks that generate completions read it."""
    asked, told, denied = ({"role": role, "content": word} for role, word in
                           (("user", "a"), ("assistant", "b"), ("assistant", "c")))  # fmt: skip
    dataset = Dataset.from_list([{"chosen": [asked, told], "rejected": [asked, denied]}])
    tiny = tokenizer()
    ours = trainer(tiny_model(vocab_size=len(tiny)), config(tmp_path), train_dataset=dataset, processing_class=tiny)
    assert ours.train_dataset["prompt"][:] == [[asked]]
    assert ours.train_dataset["rejected"][:] == [[denied]]
