"""Names that scripts have from other versions and packages: options, arguments, hooks, attributes, losses, imports.

Each row is a name with what becomes of it. The lists of names are those that the common trainer's config, constructor
and class have had since 2023, and `TrainingArguments` since its version 4.30.
"""

import copy
import dataclasses
import gc
import inspect
import pickle
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

import holdfast
from families import tiny_model
from holdfast import DPOConfig, DPOTrainer
from holdfast.cli.runfile import read_run_file
from holdfast.cli.yaml_document import RunFileError
from holdfast.losses import LOSSES
from holdfast.losses.other_names import INSTEAD
from holdfast.options.renamed import ARGUMENTS, RENAMED, RENAMED_ARGUMENTS, Expression
from holdfast.options.unknown import UnknownNameError
from holdfast.passed_through import NAMES
from holdfast.training.never_called import NEVER_CALLED
from policies import config, logged, rows, tiny_tokenizer, trainer

FIELDS = {field.name for field in dataclasses.fields(DPOConfig)}
PARAMETERS = set(inspect.signature(DPOTrainer.__init__).parameters) - {"self"}


def made(**options: Any) -> DPOConfig:
    return DPOConfig(**{"output_dir": "out", "use_cpu": True} | options)


# --- options ----------------------------------------------------------------------------------------------------------

OF_CONFIGS: dict[str, Any] = {
    "beta": 0.2, "label_smoothing": 0.1, "loss_type": "ipo", "label_pad_token_id": 0, "padding_value": 2,
    "truncation_mode": "keep_end", "max_length": 512, "max_prompt_length": 128, "max_target_length": 128,
    "is_encoder_decoder": True, "disable_dropout": False, "generate_during_eval": True, "dataset_num_proc": 2,
    "precompute_ref_log_probs": True, "model_init_kwargs": {"dtype": "float32"}, "model_adapter_name": "a",
    "ref_model_init_kwargs": {"dtype": "float32"}, "ref_adapter_name": "b", "reference_free": True,
    "force_use_ref_model": True, "sync_ref_model": True, "ref_model_mixup_alpha": 0.9, "ref_model_sync_steps": 64,
    "rpo_alpha": 0.5, "f_divergence_type": "js_divergence", "f_alpha_divergence_coef": 1.0,
    "max_completion_length": 64, "learning_rate": 1e-5, "use_weighting": True, "precompute_ref_batch_size": 2,
    "discopop_tau": 0.05, "use_num_logits_to_keep": True, "padding_free": True, "tools": [{"name": "sum"}],
    "use_logits_to_keep": True, "ld_alpha": 0.5, "logging_steps": 3, "bf16": False, "use_liger_loss": True,
    "base_model_attribute_name": "transformer", "loss_weights": [1.0], "gradient_checkpointing": False,
    "pad_token": "<pad>", "lr_scheduler_kwargs": {}, "pad_to_multiple_of": 8, "activation_offloading": True,
    "torch_empty_cache_steps": 3, "trust_remote_code": True, "router_aux_loss_coef": 0.001,
}  # fmt: skip
"""Every option that the config of the common trainer has had, and a value that asks for something."""

OF_TRAINING_ARGUMENTS: dict[str, Any] = {
    "evaluation_strategy": "steps", "warmup_ratio": 0.1, "logging_dir": "logs", "overwrite_output_dir": True,
    "save_safetensors": False, "no_cuda": True, "use_mps_device": True, "group_by_length": True,
    "per_gpu_train_batch_size": 4, "per_gpu_eval_batch_size": 4, "adafactor": True, "fp16_opt_level": "O2",
    "fp16_backend": "apex", "half_precision_backend": "apex", "use_ipex": True, "jit_mode_eval": True,
    "past_index": 1, "mp_parameters": "x", "ray_scope": "all", "tpu_num_cores": 8, "tpu_metrics_debug": True,
    "xpu_backend": "gloo", "sharded_ddp": "simple", "fsdp_min_num_params": 100,
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "torchdynamo": "inductor", "dispatch_batches": True,
    "split_batches": True, "include_inputs_for_metrics": True, "include_tokens_per_second": True,
    "use_legacy_prediction_loop": True, "push_to_hub_model_id": "a", "push_to_hub_organization": "b",
    "push_to_hub_token": "hf_xyz", "evaluate_during_training": True, "tp_size": 2,
}  # fmt: skip
"""Every option that `TrainingArguments` has had and has no longer, and a value that asks for something."""

OF_OTHERS: dict[str, Any] = {
    "model_kwargs": {}, "ref_model_kwargs": {}, "dpo_label_smoothing": 0.1,
    "gamma_beta_ratio": 0.5, "sft_weight": 0.1, "pref_ftx": 0.2, "dpo_ftx": 0.2,
    "use_flash_attention_2": True, "use_flash_attn": True, "pref_loss": "hinge", "dpo_loss_type": "hinge",
    "scheduler": "cosine", "optimizer": "sgd", "torch_dtype": torch.float32, "dtype": "auto", "num_epochs": 2,
    "prediction_strategy": "epoch",
}  # fmt: skip
"""Values of those whose value matters; 3 for all others."""

VALUES = dict.fromkeys(RENAMED, 3) | {
    name: value for name, value in {**OF_CONFIGS, **OF_TRAINING_ARGUMENTS, **OF_OTHERS}.items() if name in RENAMED
}


def test_every_option_of_any_version_is_one_or_is_said_what_became_of_it() -> None:
    assert {*OF_CONFIGS, *OF_TRAINING_ARGUMENTS} - FIELDS - set(RENAMED) == set()


def test_all_unknown_options_come_in_one_error_with_their_values() -> None:
    unknown = {name: value for name, value in VALUES.items() if name not in FIELDS}
    with pytest.raises(UnknownNameError) as error:
        made(**unknown)
    lines = str(error.value).splitlines()
    assert lines[0] == f"DPOConfig was given {len(unknown)} names that are none of its options:"
    assert [line.split(":")[0].split("=")[0] for line in lines[1:]] == [f"- {name}" for name in unknown]
    assert all(": write " in line or ": drop it: " in line for line in lines[1:])
    assert "hf_xyz" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in VALUES if name not in FIELDS])
def test_what_is_to_be_written_instead_can_be_written(name: str) -> None:
    """Of `DPOConfig` or `DPOTrainer`, as it says; and of the former, with a value that it takes."""
    entry, value = RENAMED[name], VALUES[name]
    instead = entry.instead(value, {})
    assert entry.is_asked(value)
    assert set(instead) <= (FIELDS if entry.owner == "DPOConfig" else PARAMETERS)
    assert instead or entry.reason
    if entry.owner == "DPOConfig" and not {"ddp_backend", "fsdp_config"} & instead.keys():  # for several processes
        made(**instead, **({"loss_type": "simpo"} if "simpo_gamma" in instead else {}))


@pytest.mark.parametrize("name", [name for name in RENAMED if name not in FIELDS])
def test_a_value_that_asks_for_nothing_is_taken(name: str) -> None:
    plain = vars(made())
    for value in RENAMED[name].asks_nothing:
        options = vars(made(**{name: value}))
        assert {key for key in plain if key != "distributed_state" and str(plain[key]) != str(options[key])} == set()
        assert name not in options


SENTENCES: list[tuple[dict[str, Any], str]] = [
    ({"rpo_alpha": 0.5}, '- rpo_alpha=0.5: write loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5].'),
    ({"rpo_alpha": 1, "loss_type": "ipo"}, '- rpo_alpha=1: write loss_type=["ipo", "sft"], loss_weights=[1.0, 1].'),
    (
        {"rpo_alpha": 1.0, "loss_type": ["ipo", "hinge"], "loss_weights": [2.0, 3.0]},
        '- rpo_alpha=1.0: write loss_type=["ipo", "hinge", "sft"], loss_weights=[2.0, 3.0, 1.0].',
    ),
    ({"evaluation_strategy": "epoch"}, '- evaluation_strategy="epoch": write eval_strategy="epoch".'),
    ({"warmup_ratio": 0.1}, "- warmup_ratio=0.1: write warmup_steps=0.1 (a number below 1 is a share of the run)."),
    ({"warmup_ratio": 0.1, "warmup_steps": 7}, "- warmup_ratio=0.1: write warmup_steps=7 (a number"),
    (
        {"torch_dtype": "auto", "model_init_kwargs": {"revision": "x"}},
        '- torch_dtype="auto": write model_init_kwargs={"revision": "x", "dtype": "auto"} (dtype in',
    ),
    ({"reference_free": True}, '- reference_free=True: write loss_type="cpo", cpo_alpha=0.0 (the sigmoid loss'),
    (
        {"load_in_4bit": True},
        "write quantization_config=BitsAndBytesConfig(load_in_4bit=True) in the call of DPOTrainer",
    ),
    ({"peft_config": {}}, "- peft_config={}: pass it to DPOTrainer (peft_config=...)."),
    ({"train_dataset": rows(2)}, "- train_dataset: pass it to DPOTrainer (train_dataset=...)."),
    ({"tokenizer": object()}, "- tokenizer: write processing_class=... in the call of DPOTrainer."),
    ({"push_to_hub_token": "hf_abc"}, "- push_to_hub_token: write hub_token=...."),
    ({"lerning_rate": 0.1}, "- lerning_rate=0.1: did you mean learning_rate?"),
    ({"nonsense": 1}, "- nonsense=1: there is nothing of this name; drop it."),
    ({"max_prompt_length": 1, "loss_type": "kto_pair"}, "- loss_type 'kto_pair' is unknown. It compares no pairs"),
    ({"max_prompt_length": 1, "beta": -1}, "- beta must be a finite number above 0, got -1."),
]


@pytest.mark.parametrize(("options", "sentence"), SENTENCES, ids=[next(iter(options)) for options, _ in SENTENCES])
def test_what_is_said_of_an_option(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        made(**options)
    assert sentence in str(error.value)


def test_the_constructor_is_otherwise_that_of_a_dataclass(tmp_path: Path) -> None:
    """Signature, positional arguments, copies and subclasses are as Python makes them."""

    @dataclasses.dataclass
    class OwnConfig(DPOConfig):
        hub_branch: str | None = dataclasses.field(default=None, metadata={"help": "A branch."})

    @dataclasses.dataclass
    class OwnConstructor(DPOConfig):
        def __init__(self, name: str, **options: Any) -> None:
            super().__init__(output_dir=name, **options)

    assert set(inspect.signature(OwnConfig).parameters) == {field.name for field in dataclasses.fields(OwnConfig)}
    args = DPOConfig(str(tmp_path), use_cpu=True)
    assert args.output_dir == str(tmp_path)
    assert dataclasses.replace(args, beta=0.3).beta == 0.3
    assert copy.deepcopy(args).to_dict() == pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
    assert OwnConfig(output_dir="out", use_cpu=True, hub_branch="x", rpo_alpha=None).hub_branch == "x"
    assert OwnConstructor("out", use_cpu=True).output_dir == "out"
    for make in (OwnConfig, lambda **options: OwnConstructor("out", **options)):
        with pytest.raises(UnknownNameError, match=r"(?s)- tokeniser=1.*- rpo_alpha=1: write loss_type"):
            make(use_cpu=True, tokeniser=1, rpo_alpha=1)
    with pytest.raises(TypeError, match="positional"):
        DPOConfig(*range(500))
    assert "rpo_alpha" not in HfArgumentParser(DPOConfig).format_help()  # type: ignore[arg-type]


PARSERS: dict[str, Callable[[HfArgumentParser], Any]] = {
    "command line": lambda parser: parser.parse_args_into_dataclasses(
        ["--output_dir", "o", "--use_cpu", "--rpo_alpha", "0.5", "--evaluation-strategy=steps", "--foo", "--no_cuda"]
    ),
    "mapping": lambda parser: parser.parse_dict(
        {"output_dir": "o", "rpo_alpha": 0.5, "evaluation_strategy": "steps", "foo": True, "no_cuda": True}
    ),
}


@pytest.mark.parametrize("kind", PARSERS)
def test_parsers_say_the_same(kind: str) -> None:
    parser = HfArgumentParser(DPOConfig)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="DPOConfig was given 4 names") as error:
        PARSERS[kind](parser)
    assert str(error.value).splitlines()[1:] == [
        '- rpo_alpha=0.5: write loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5].',
        '- evaluation_strategy="steps": write eval_strategy="steps".',
        "- foo=True: there is nothing of this name; drop it.",
        "- no_cuda=True: write use_cpu=True.",
    ]


def test_parsers_keep_their_own_word_on_other_names() -> None:
    parser = HfArgumentParser(DPOConfig)  # type: ignore[arg-type]
    words = ["--output_dir", "o", "--use_cpu"]
    with pytest.raises(ValueError, match=r"not used by the HfArgumentParser: \['--foo'\]"):
        parser.parse_args_into_dataclasses([*words, "--foo"])
    _, rest = parser.parse_args_into_dataclasses([*words, "--rpo_alpha", "1"], return_remaining_strings=True)
    assert rest == ["--rpo_alpha", "1"]
    (args,) = parser.parse_dict({"output_dir": "o", "use_cpu": True, "rpo_alpha": 1}, allow_extra_keys=True)
    assert not hasattr(args, "rpo_alpha")


def test_run_files_say_the_same_of_every_key(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "model: m\ndata: {train: pairs.jsonl}\ntraining:\n  use_cpu: true\n  max_prompt_length: 128\n"
        "  reference_free: false\n  rpo_alpha: 0.5\n  train_dataset: x\n  lora_alpha: 8\n  btea: 1\n"
        "  load_in_4bit: true\n"
    )
    with pytest.raises(RunFileError) as error:
        read_run_file(run, ["training.evaluation_strategy=steps"]).training_arguments()
    lines = str(error.value).splitlines()
    no_key = "` is not a key of the section `training`. "
    for line, name, advice in zip(
        lines,
        ("max_prompt_length", "rpo_alpha", "train_dataset", "lora_alpha", "btea", "load_in_4bit",
         "evaluation_strategy"),
        ("Drop it: max_length bounds", 'Write loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5].',
         "Write it as `data.train`.", "Did you mean `peft.lora_alpha`?", "Did you mean `beta`?", "The valid keys",
         'Write eval_strategy="steps".'),
        strict=True,
    ):  # fmt: skip
        assert f"`training.{name}{no_key}{advice}" in line
    assert "line 5: " in lines[0]
    assert lines[-1].startswith("--set training.evaluation_strategy: ")
    run.write_text("rpo_alpha: 1\nfo: 2\nmodel: m\ndata: {train: pairs.jsonl}\n")
    with pytest.raises(RunFileError, match=r"(?s)line 1: `rpo_alpha` is not a key.*Write loss_type.*line 2: `fo`"):
        read_run_file(run)
    run.write_text("model: m\ndata: {train: pairs.jsonl}\ntraining: {use_cpu: true, max_prompt_length: null}\n")
    assert not hasattr(read_run_file(run).training_arguments(), "max_prompt_length")


def test_an_attribute_that_was_set_later_is_refused_by_the_trainer() -> None:
    args = made()
    for name, value in {"max_prompt_length": 128, "rpo_alpha": 1.0, "reference_free": False, "own": 3}.items():
        setattr(args, name, value)
    with pytest.raises(UnknownNameError, match="attributes that are none of its options") as error:
        trainer("nowhere", args)
    assert [line.split("=")[0] for line in str(error.value).splitlines()[1:]] == ["- max_prompt_length", "- rpo_alpha"]


def test_a_config_keeps_nothing_of_its_caller_alive() -> None:
    model = tiny_model()
    seen = weakref.ref(model)
    made()
    with pytest.raises(UnknownNameError):
        made(rpo_alpha=1)
    del model
    gc.collect()
    assert seen() is None


# --- arguments of the trainer -----------------------------------------------------------------------------------------


def test_all_unknown_arguments_come_in_one_error_with_what_else_is_wrong() -> None:
    args = made()
    args.max_prompt_length = 3  # type: ignore[attr-defined]
    unknown: dict[str, Any] = {
        "tokenizer": object(), "beta": 0.2, "rpo_alpha": 1.0, "max_target_length": 3, "reference_free": True,
        "train_data": 3, "sync_ref_model": True, "torch_dtype": "auto", "hub_token": "hf_abc",
        "label_pad_token_id": -100,
    }  # fmt: skip
    with pytest.raises(UnknownNameError) as error:
        DPOTrainer(None, args=args, **unknown)  # type: ignore[arg-type]
    lines = str(error.value).splitlines()
    expected = [
        "- tokenizer: write processing_class=... in the call of DPOTrainer.",
        "- beta=0.2: move it into DPOConfig(beta=0.2).",
        '- rpo_alpha=1.0: write loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0] in DPOConfig.',
        "- max_target_length=3: drop it: ",
        '- reference_free=True: write loss_type="cpo", cpo_alpha=0.0 (',
        "- train_data=3: did you mean train_dataset?",
        "- sync_ref_model=True: move it into DPOConfig(sync_ref_model=True).",
        '- torch_dtype="auto": write model_init_kwargs={"dtype": "auto"} (dtype in a ModelConfig) in DPOConfig.',
        "- hub_token: move it into DPOConfig(hub_token=...).",
        "- `model` is None, so there is nothing to train.",
        "- DPOConfig was given attributes that are none of its options:",
        "- max_prompt_length=3: drop it: ",
    ]
    assert lines[0] == "DPOTrainer was given 9 arguments that it does not have:"
    assert len(lines) == 1 + len(expected)
    for line, start in zip(lines[1:], expected, strict=True):
        assert line.startswith(start)


def test_none_at_the_trainer_is_the_config_s(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path, beta=0.3), beta=None, loss_type=None, max_length=None, tokenizer=None)
    assert (ours.args.beta, ours.args.loss_types, ours.args.max_length) == (0.3, ["sigmoid"], 1024)


def test_every_argument_of_any_version_is_one_or_is_said_what_became_of_it() -> None:
    of_trainers = {
        "tokenizer", "model_init", "preprocess_logits_for_metrics", "optimizer_cls_and_kwargs", "processing_class",
        "quantization_config", "peft_config", "compute_metrics", "callbacks", "optimizers", *OF_CONFIGS,
    }  # fmt: skip
    assert of_trainers - PARAMETERS - FIELDS - set(RENAMED) - set(RENAMED_ARGUMENTS) == set()
    assert set(ARGUMENTS) <= PARAMETERS
    for name, entry in RENAMED_ARGUMENTS.items():
        assert name not in PARAMETERS
        assert set(entry.instead(3, {})) <= PARAMETERS
        assert entry.instead(3, {}) or entry.reason


def test_the_constructor_of_the_trainer_has_its_own_signature() -> None:
    assert list(inspect.signature(DPOTrainer).parameters)[:3] == ["model", "ref_model", "args"]
    assert "kwargs" not in inspect.signature(DPOTrainer).parameters


def _peer_config(*, is_subclass: bool) -> type:
    @dataclasses.dataclass
    class Config(TrainingArguments):
        pass

    Config.__module__, Config.__name__ = "trl.trainer.dpo_config", "DPOConfig"

    @dataclasses.dataclass
    class Own(Config):
        pass

    Own.__module__ = "alignment.configs"
    return Own if is_subclass else Config


KINDS: list[tuple[Callable[[], Any], str]] = [
    (lambda: TrainingArguments("out", use_cpu=True), r"`args` is a TrainingArguments; pass a `holdfast\.DPOConfig`"),
    (lambda: 0.1, r"`args` is a float \(0\.1\); name the arguments after `ref_model`"),
    (
        lambda: _peer_config(is_subclass=False)("out", use_cpu=True),
        r"is a `trl\.DPOConfig`; import DPOConfig from holdfast as well",
    ),
    (
        lambda: _peer_config(is_subclass=True)("out", use_cpu=True),
        r"is a `alignment\.configs\.Own`, a subclass of `trl\.DPOConfig`; make `holdfast\.DPOConfig` its base class",
    ),
]


@pytest.mark.parametrize(("make", "message"), KINDS)
def test_a_config_of_another_kind_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        trainer("nowhere", make())


def test_no_model_is_said() -> None:
    with pytest.raises(ValueError, match="`model` is None, so there is nothing to train"):
        trainer(None, made())  # type: ignore[arg-type]


# --- hooks ------------------------------------------------------------------------------------------------------------

HOOKS = {
    "concatenated_inputs", "dpo_loss", "_get_batch_logps", "concatenated_forward", "get_batch_metrics", "store_metrics",
    "_prepare_deepspeed", "build_tokenized_answer", "tokenize_row", "compute_reference_log_probs", "get_batch_logps",
    "get_batch_loss_metrics", "process_row", "compute_ref_log_probs", "generate_from_model_and_ref", "_prepare_dataset",
    "_create_model_from_path", "_prepare_peft_model", "_prepare_gradient_checkpointing", "_compute_loss_liger",
    "_precompute_ref_logps", "_truncate_inputs", "_compute_loss", "_tokenize",
}  # fmt: skip
"""Methods that the common trainer has had, and that neither this one nor `transformers.Trainer` calls."""


def test_every_hook_of_any_version_is_called_or_refused() -> None:
    assert HOOKS - set(NEVER_CALLED) == set()
    assert [name for name in NEVER_CALLED if name in dir(DPOTrainer)] == []


@pytest.mark.parametrize("name", NEVER_CALLED)
def test_a_hook_that_is_never_called_is_refused_by_name(name: str) -> None:
    """In the subclass, and in a class that it mixes in."""
    with pytest.raises(UnknownNameError, match=rf"Own overrides methods .*\n- {name}: nothing calls it; ."):
        type("Own", (DPOTrainer,), {name: lambda self: None})
    mixed_in = type("MixedIn", (), {name: staticmethod(lambda: None)})
    with pytest.raises(UnknownNameError, match=f"- {name}: nothing calls it"):
        type("Own", (mixed_in, DPOTrainer), {})


def test_all_are_named_at_once_beside_parameters_that_changed() -> None:
    with pytest.raises(UnknownNameError) as error:

        class Own(DPOTrainer):
            def dpo_loss(self, *logps: Any) -> Any: ...

            def tokenize_row(self, row: Any) -> Any: ...

            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any: ...  # type: ignore

            def log(self, logs: Any) -> None: ...  # type: ignore[override]

            def get_batch_samples(self, model: Any, batch: Any) -> Any: ...  # type: ignore[override]

            def training_step(self, model: Any, inputs: Any) -> Any: ...  # type: ignore[override]

    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines[:6]] == [
        "- dpo_loss", "- tokenize_row", "- compute_loss", "- training_step", "- get_batch_samples", "- log"
    ]  # fmt: skip
    assert "it is called with (model, inputs, num_items_in_batch, return_outputs)" in lines[2]
    assert "on_evaluate" in lines[4]


def test_hooks_that_a_subclass_calls_by_itself_stay() -> None:
    class Own(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return self.get_batch_loss_metrics(model, inputs)

        def get_batch_loss_metrics(self, model: Any, batch: Any) -> Any:
            return [self.dpo_loss(part) for part in batch]

        def dpo_loss(self, *logps: Any) -> Any: ...

        def a_method_of_its_own(self) -> None: ...

        def log(self, logs: Any, *args: Any) -> None:
            super().log(logs, *args)

    assert issubclass(Own, DPOTrainer)


def test_a_hook_that_is_put_onto_a_trainer_or_its_class_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer(tiny_model(), config(tmp_path))
    monkeypatch.setattr(ours, "dpo_loss", lambda *logps: None, raising=False)
    monkeypatch.setattr(DPOTrainer, "_tokenize", lambda *rows: None, raising=False)
    message = r"(?s)given methods .*- dpo_loss: nothing calls it; override `compute_loss`\.\n- _tokenize: nothing calls"
    with pytest.raises(UnknownNameError, match=message):
        ours.train()


# --- attributes -------------------------------------------------------------------------------------------------------


class Early(DPOTrainer):
    """Sets attributes before the constructor of the trainer runs, as subclasses do."""

    def __init__(self, *args: Any, early: dict[str, Any], **kwargs: Any) -> None:
        for name, value in early.items():
            setattr(self, name, value)
            assert getattr(self, name) is value
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self._metrics["train"]["own"].append(torch.tensor(float(self.state.global_step)))
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._stored_metrics["eval"]["own"].append(2.0)
        return super().prediction_step(*args, **kwargs)


def early(args: DPOConfig, values: dict[str, Any], **options: Any) -> Early:
    defaults: dict[str, Any] = {"train_dataset": rows(), "processing_class": tiny_tokenizer()}
    return Early(tiny_model(), args=args, early=values, **defaults | options)


def test_options_that_were_set_before_the_constructor_are_those_of_the_run(tmp_path: Path) -> None:
    """ipo's first loss is 1 / (4 beta^2). The config that was handed in stays as it was."""
    args = config(tmp_path, beta=0.1, max_steps=1)
    ours = early(args, {"beta": 0.25, "loss_type": "ipo", "reference_free": False, "label_smoothing": 0.0})
    ours.train()
    assert logged(ours) == pytest.approx([4.0], rel=1e-5)
    assert (args.beta, args.loss_types, ours.beta, ours.loss_types, ours.loss_type) == (
        0.1, ["sigmoid"], 0.25, ["ipo"], "ipo"
    )  # fmt: skip


def test_options_that_contradict_those_of_the_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`self\.beta` was set to 0\.3 before .*and DPOConfig has beta=0\.2\. Keep one"
    ):
        early(config(tmp_path, beta=0.2), {"beta": 0.3})
    with pytest.raises(ValueError, match=r"loss_type 'kto_pair' is unknown"):
        early(config(tmp_path), {"loss_type": "kto_pair"})


def test_a_reference_that_was_set_before_the_constructor_is_the_run_s(tmp_path: Path) -> None:
    reference = tiny_model(seed=5)
    ours = early(config(tmp_path), {"ref_model": reference})
    plain = trainer(tiny_model(), config(tmp_path), ref_model=tiny_model(seed=5))
    for each in (ours, plain):
        each.train()
    assert ours.ref_model is reference
    assert logged(ours) == pytest.approx(logged(plain), abs=1e-5)  # of rows that are laid out otherwise
    with pytest.raises(ValueError, match=r"was given another `ref_model`"):
        early(config(tmp_path), {"ref_model": reference}, ref_model=tiny_model())


def test_numbers_of_a_subclass_are_logged_as_their_means(tmp_path: Path) -> None:
    """Of steps 0, 1 and of steps 2, 3; and of each evaluation, by itself."""
    ours = early(config(tmp_path, logging_steps=2), {}, eval_dataset=rows(4))
    ours.train()
    assert logged(ours, "own") == [0.5, 2.5]
    assert [ours.evaluate()["eval_own"], ours.evaluate({"a": rows(3)})["eval_a_own"]] == [2.0, 2.0]
    assert "own" not in trainer(tiny_model(), config(tmp_path), eval_dataset=rows(4)).evaluate()
    ours._metrics["train"]["own"].append(float("nan"))
    with pytest.raises(ValueError, match="own"):
        ours.log({"loss": 1.0})


READ: dict[str, Any] = {
    "beta": 0.2, "loss_types": ["sigmoid"], "loss_type": "sigmoid", "loss_weights": [1.0], "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "ld_alpha": None, "use_weighting": False,
    "aux_loss_enabled": False, "aux_loss_coef": 0.0, "router_aux_loss_coef": 0.0, "_tag_names": ["holdfast", "dpo"],
    "use_liger_kernel": False, "padding_free": False, "max_length": 1024, "truncation_mode": "keep_start",
    "precompute_ref_log_probs": False, "precompute_ref_logps": False, "is_peft_model": False, "padding_value": 0,
    "pad_token_id": 0, "label_pad_token_id": -100, "is_encoder_decoder": False, "reference_free": False,
    "dataset_num_proc": None, "model_adapter_name": None, "ref_adapter_name": None, "_is_vlm": False,
    "is_vision_model": False,
}  # fmt: skip
"""What scripts and subclasses read of a trainer."""


def test_attributes_that_scripts_read_and_set(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path))
    assert {name: getattr(ours, name) for name in READ} == READ
    assert ours._tokenizer is ours.tokenizer is ours.processing_class
    for name in ("label_smoothing", "loss_types", "ld_alpha", "max_length"):
        setattr(ours, name, getattr(ours, name))
        option = name.removesuffix("s") if name == "loss_types" else name
        with pytest.raises(ValueError, match=rf"`trainer\.{name}` was set once .* Set {option} in DPOConfig"):
            setattr(ours, name, 0.3)
    ours.ref_model = ours.ref_model
    for value, found in ((tiny_model(), "a LlamaForCausalLM"), (None, "None")):
        with pytest.raises(ValueError, match=rf"`trainer\.ref_model` was set to {found} once the trainer was made"):
            ours.ref_model = value
    with pytest.raises(AttributeError, match="'DPOTrainer' object has no attribute 'nonsense'"):
        _ = ours.nonsense
    with pytest.raises(AttributeError, match=r"no method 'get_batch_loss_metrics'; override `compute_loss`\."):
        _ = ours.get_batch_loss_metrics


def test_a_subclass_that_leaves_the_constructor_out_is_told(tmp_path: Path) -> None:
    class Shortcut(DPOTrainer):
        def __init__(self, model: Any, ref_model: Any, is_prepared: bool, **kwargs: Any) -> None:
            self.ref_model = ref_model
            Trainer.__init__(self, model=model, **kwargs)
            if is_prepared:
                self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)

    given = {"args": config(tmp_path), "train_dataset": rows(), "eval_dataset": rows(3)}
    message = (
        r"Shortcut calls `Trainer\.__init__` instead of the constructor of DPOTrainer.*Call `super\(\)\.__init__\("
    )
    with pytest.raises(TypeError, match=message):
        Shortcut(tiny_model(), tiny_model(), is_prepared=True, **given)
    ours = Shortcut(tiny_model(), tiny_model(), is_prepared=False, **given)
    for use in (ours.train, ours.evaluate):
        with pytest.raises(AttributeError, match=message):
            use()


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INSTEAD)
def test_a_loss_by_another_name_is_said_what_to_write(name: str) -> None:
    for spelling in (name, name.upper().replace("_", "-")):
        with pytest.raises(ValueError, match=f"loss_type '{spelling}' is unknown") as error:
            made(loss_type=[spelling])
        assert "Did you mean" not in str(error.value)
        assert INSTEAD[name][1:] in str(error.value)
    assert set(INSTEAD[name].split('"')[1::2]) <= {*LOSSES, "sigmoid"}


HINTS = [
    ("sigmod", "sigmoid"),
    ("aot_unpair", "aot_unpaired"),
    ("appo_zero", "apo_zero"),
    ("zzz", None),
    ("grpo_x", None),
]


@pytest.mark.parametrize(("name", "near"), HINTS)
def test_a_hint_is_given_where_a_name_is_near(name: str, near: str | None) -> None:
    with pytest.raises(ValueError, match=f"loss_type '{name}' is unknown") as error:
        made(loss_type=name)
    assert (f"Did you mean '{near}'?" in str(error.value)) == (near is not None)
    assert ("Did you mean" in str(error.value)) == (near is not None)


@pytest.mark.parametrize(("spelling", "name"), [("HyPO", "hypo"), ("alpha-DPO", "alpha_dpo"), ("IPO", "ipo")])
def test_a_loss_in_other_letters_is_said_how_to_write(spelling: str, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"loss_type '{spelling}' is unknown\. Write loss_type=\"{name}\"\. There are"
    ):
        made(loss_type=spelling)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence", "forward_kl"])
def test_a_default_of_other_trainers_may_be_spelled_out(divergence: str) -> None:
    made(f_divergence_type=divergence, f_alpha_divergence_coef=1.0)
    with pytest.raises(ValueError, match=r"f_alpha_divergence_coef=0\.7 is not read by"):
        made(f_divergence_type=divergence, f_alpha_divergence_coef=0.7)


# --- imports ----------------------------------------------------------------------------------------------------------


def test_names_of_the_other_package_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package: Any = types.ModuleType("trl")
    package.ModelConfig, package.__version__ = dict, "9.9"
    monkeypatch.setitem(sys.modules, "trl", package)
    assert holdfast.ModelConfig is dict
    path = tmp_path / "script.py"
    path.write_text("from holdfast import (DPOConfig, ModelConfig,\n    get_kbit_device_map, TrlParser)\n")
    code = compile(path.read_text(), str(path), "exec")
    with pytest.raises(
        ImportError, match=r"^get_kbit_device_map, TrlParser: .* none of them in its version 9\.9; inst"
    ):
        exec(code, {"__name__": "__main__"})
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        ImportError, match=r"^ModelConfig, get_kbit_device_map, TrlParser: .*keep `from trl import`"
    ) as error:
        exec(code, {"__name__": "__main__"})
    assert "DPOConfig, DPOTrainer" in str(error.value)
    assert not {"ModelConfig", *NAMES} & set(holdfast.__all__)


def test_no_name_of_the_other_package_hides_one_of_ours() -> None:
    assert NAMES & set(holdfast.__all__) == set()
    with pytest.raises(AttributeError, match="has no attribute 'DPOTrainr'"):
        _ = holdfast.DPOTrainr


def test_an_expression_stands_as_it_is_written() -> None:
    assert RENAMED["evaluation_strategy"].advice(Expression("a.b"), {}) == "write eval_strategy=a.b"
