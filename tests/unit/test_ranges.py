"""Every numeric option has a range; what is out of it is one error before anything is loaded, what is in it stands.

A number that a newer `transformers` adds is in no row of the table, and fails here until somebody has looked at it.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from families import tiny_model
from holdfast import DPOConfig
from holdfast.cli.runfile import read_run_file
from holdfast.cli.yaml_document import RunFileError
from holdfast.losses import LossOptions
from holdfast.losses.options import option_names, rules
from holdfast.options.metric_names import EVAL_METRICS
from holdfast.options.ranges import LISTS, RANGES
from policies import config, rows, trainer

NAN, INF = float("nan"), float("inf")
OF_LOSSES = [name for name, rule in rules(LossOptions).items() if not rule.choices] + ["ld_alpha"]
WHOLE = [name for name, allowed in RANGES.items() if allowed.is_whole and not allowed.has_fractions]


def kinds(hint: Any) -> Iterator[Any]:
    """The types inside a hint."""
    if get_args(hint):
        for inner in get_args(hint):
            yield from kinds(inner)
    else:
        yield hint


def test_every_number_has_a_range() -> None:
    """Those of the losses have one beside the loss."""
    hints = get_type_hints(DPOConfig)
    numeric = {field.name for field in dataclasses.fields(DPOConfig) if {int, float} & set(kinds(hints[field.name]))}
    known = {*RANGES, *LISTS, *OF_LOSSES}
    assert numeric <= known, "look at what these numbers do, then give them a range in holdfast.options.ranges"
    inherited_long_ago = {"warmup_ratio"}
    assert known - numeric <= inherited_long_ago
    assert not RANGES.keys() & option_names(LossOptions)


def test_what_may_be_none_is_what_transformers_leaves_out() -> None:
    hints = get_type_hints(DPOConfig)
    optional = {name for name in RANGES if type(None) in set(kinds(hints.get(name, None | int)))}
    assert {name for name, allowed in RANGES.items() if None in allowed.also} == optional


ODD: dict[str, Any] = {
    "nan": NAN, "inf": INF, "-inf": -INF, "numpy-nan": np.float32("nan"), "true": True, "text": "3", "word": "many",
    "list": [1], "mapping": {"a": 1}, "10**300": 10**300, "10**5000": 10**5000, "1e300": 1e300, "1e-300": 1e-300,
    "object": object(),
}  # fmt: skip
"""Values that no numeric option may have."""


@pytest.mark.parametrize("name", [*RANGES, *OF_LOSSES])
def test_odd_values_are_refused(name: str, tmp_path: Path) -> None:
    """Each in one message, which names the option."""
    if name == "warmup_ratio":
        pytest.skip("an option of other versions of transformers")
    for label, value in ODD.items():
        if name == "pad_to_multiple_of" and label == "text":
            continue
        with pytest.raises(ValueError, match=rf"^{name}\b") as refusal:
            DPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
        assert len(str(refusal.value)) < 400, label


@pytest.mark.parametrize("name", WHOLE)
def test_half_a_step_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=2\.5 was asked for; it counts from"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: 2.5})


TOO_SMALL = {name: -2 if allowed.is_whole else -0.1 for name, allowed in RANGES.items() if name != "warmup_ratio"}
OUT_OF_RANGE: list[tuple[str, Any]] = [
    *TOO_SMALL.items(), ("max_steps", 0), ("max_steps", -5), ("num_train_epochs", 0), ("num_train_epochs", 1e12),
    ("adam_beta1", 1.0), ("adam_beta2", 1.5), ("adam_epsilon", 0.0), ("adam_epsilon", 1e30), ("seed", 2**32),
    ("data_seed", 2**32), ("save_total_limit", 0), ("dataloader_num_workers", 10**6), ("logging_steps", 2.5),
    ("eval_steps", -0.5), ("save_steps", 0), ("warmup_steps", 2.5), ("ref_model_mixup_alpha", 0),
    ("ref_model_mixup_alpha", 1.5), ("pad_to_multiple_of", 10**6), ("local_rank", -2), ("beta", 0), ("beta", 1e39),
    ("loss_weights", [NAN]), ("loss_weights", [0.0]), ("loss_weights", 3), ("loss_weights", "1"),
    ("loss_weights", [True]), ("ref_model_weights", ["x"]), ("ref_model_weights", [10**400, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


LEGITIMATE: list[dict[str, Any]] = [
    {"max_steps": -1}, {"max_steps": 1}, {"max_steps": 10**9}, {"num_train_epochs": 0.01}, {"num_train_epochs": 7},
    {"learning_rate": 0}, {"learning_rate": 1e-30}, {"learning_rate": np.float32(0.5)}, {"weight_decay": 0},
    {"adam_beta1": 0}, {"adam_beta2": 0.9999}, {"adam_epsilon": 1e-15}, {"max_grad_norm": 0}, {"max_grad_norm": 1e30},
    {"warmup_steps": 0.1}, {"warmup_steps": 100, "max_steps": 100}, {"logging_steps": 0.1}, {"logging_steps": 10.0},
    {"logging_steps": 10**9}, {"logging_steps": 0, "logging_strategy": "no"}, {"save_steps": 0.5},
    {"save_steps": 0, "save_strategy": "epoch"}, {"eval_steps": 0, "eval_strategy": "steps"},
    {"save_total_limit": None}, {"save_total_limit": 1}, {"seed": 0},
    {"seed": 2**32 - 1}, {"data_seed": None}, {"data_seed": 2**32 - 1},
    {"dataloader_num_workers": 0}, {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1},
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, {"gradient_accumulation_steps": np.int64(2)},
    {"per_device_train_batch_size": 8.0}, {"per_device_eval_batch_size": 1}, {"torch_empty_cache_steps": 1},
    {"eval_delay": 2.5}, {"ddp_timeout": 10**6}, {"max_length": None}, {"max_length": 2}, {"max_length": 10**6},
    {"pad_to_multiple_of": "64"}, {"pad_to_multiple_of": "auto"}, {"tokens_per_batch": 1}, {"reference_window": 1},
    {"ref_model_sync_steps": 1, "sync_ref_model": True}, {"ref_model_mixup_alpha": 1, "sync_ref_model": True},
    {"beta": 1e-3}, {"beta": np.float64(0.1)}, {"label_smoothing": 0}, {"loss_weights": [2]}, {"loss_weights": (0.5,)},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -0.5]}, {"router_aux_loss_coef": 0},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-8}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}, "max_steps": 20},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, {"optim": "adafactor"},
    {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"}, {"optim": "rmsprop", "optim_args": "alpha=0.9"},
    {"optim": "galore_adamw", "optim_target_modules": "all-linear"}, {"report_to": None},
    {"debug": None}, {"report_to": ["none"]},
    {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"use_cpu": np.bool_(True)}, {"disable_dropout": 1},
    {"accelerator_config": {"split_batches": True}}, {"neftune_noise_alpha": 0, "layout": "padded"},
    {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, {"debug": "underflow_overflow"},
    {"log_level": "debug"}, {"include_num_input_tokens_seen": True}, {"torch_compile_backend": "eager"},
    {"fp16_full_eval": False}, {"hub_strategy": "end"}, {"lr_scheduler_type": "polynomial"},
]  # fmt: skip


@pytest.mark.parametrize("options", LEGITIMATE, ids=str)
def test_legitimate_values_stand(options: dict[str, Any], tmp_path: Path) -> None:
    """As Python's own numbers, so that a config can be written as JSON."""
    args = DPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True} | options)
    for name, value in options.items():
        found = getattr(args, name)
        if isinstance(value, int | float | np.generic):
            assert found == value or value in (0, True)
            assert type(found) in (int, float, bool, str)
    args.to_json_string()


COMBINATIONS: list[tuple[dict[str, Any], str]] = [
    ({"warmup_steps": 100, "max_steps": 10}, r"warmup_steps=100 was asked for in a run of 10 steps.*Use fewer"),
    ({"warmup_steps": 1, "max_steps": 1}, r"'linear' was asked for with warmup_steps=1.*be 0 at each.*nothing would"),
    ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, r"warmup_steps=5 .* no warmup.*'constant_with_warmup'"),
    ({"eval_strategy": "steps", "eval_delay": 9, "max_steps": 5}, r"eval_delay=9 .* end before its first evaluation"),
    ({"dataloader_prefetch_factor": 2}, r"refused by transformers: --dataloader_prefetch_factor can only"),
    ({"dataloader_persistent_workers": True}, r"dataloader_persistent_workers=True .*dataloader_num_workers=0"),
    ({"dataloader_multiprocessing_context": "spawn"}, r"context='spawn' .*dataloader_num_workers=0"),
    ({"dataloader_multiprocessing_context": "x", "dataloader_num_workers": 1}, r"context 'x' is unknown"),
    ({"optim": "adamw_torc"}, r"optim 'adamw_torc' is unknown\. Did you mean 'adamw_torch'"),
    ({"optim": "sgd", "optim_args": "momentum=nan"}, r"optim_args='momentum=nan' .* by which momentum is nan"),
    ({"optim": "sgd", "optim_args": "momentum=-1"}, r"optim='sgd' with optim_args='momentum=-1' .*cannot be made"),
    ({"optim": "sgd", "optim_args": "momentum"}, r"optim='sgd' with optim_args='momentum' .*cannot be made"),
    ({"optim": "sgd", "optim_args": "momentun=1"}, r"optim='sgd' does not read 'momentun=1'"),
    ({"optim_args": "rank=2"}, r"optim='adamw_torch_fused' does not read 'rank=2'"),
    ({"lr_scheduler_type": "lineer"}, r"lr_scheduler_type 'lineer' is unknown\. Did you mean 'linear'"),
    ({"lr_scheduler_kwargs": {"nothing": 1}}, r"'linear' with lr_scheduler_kwargs=.*cannot be made.*nothing"),
    ({"lr_scheduler_kwargs": {"num_cycles": NAN}, "lr_scheduler_type": "cosine"}, r"kwargs\.num_cycles=nan was asked"),
    ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}, r"'polynomial' was asked for, which cannot be made"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, r"requires an eval strategy"),
    ({"report_to": "nowhere"}, r"report_to='nowhere' was asked for.*nowhere is not supported"),
    ({"report_to": ["dvclive"]}, r"report_to='dvclive' was asked for.*Install it, or use report_to='none'"),
    ({"logging_steps": 0}, r"refused by transformers: logging strategy"),
    ({"log_level": "loud"}, r"log_level 'loud' is unknown"),
    ({"log_level": None}, r"log_level=None was asked for; it has no such value"),
    ({"debug": "everything"}, r"debug 'everything' is unknown"),
    ({"eval_strategy": "step"}, r"eval_strategy 'step' is unknown\. Did you mean 'steps'"),
    ({"save_strategy": False}, r"save_strategy 'False' is unknown"),
    ({"hub_strategy": "x"}, r"hub_strategy 'x' is unknown"),
    ({"ddp_backend": "x"}, r"ddp_backend 'x' is unknown"),
    ({"torch_compile_backend": "x"}, r"torch_compile_backend 'x' is unknown"),
    ({"torch_compile_mode": "x"}, r"torch_compile_mode 'x' is unknown"),
    ({"include_num_input_tokens_seen": "x"}, r"include_num_input_tokens_seen 'x' is unknown"),
    ({"sync_ref_model": "false"}, r"sync_ref_model='false' was asked for; it is a truth value"),
    ({"gradient_checkpointing_kwargs": {"x": 1}}, r"torch's checkpoint takes no 'x'"),
    ({"accelerator_config": {"nothing": 1}}, r"refused by transformers: TypeError.*nothing"),
    ({"accelerator_config": "nowhere.json"}, r"refused by transformers: FileNotFoundError.*nowhere\.json"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": -3}}}, r"num_steps=-3 .* counts from 1"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"x": 1}}}, r"gradient_accumulation_kwargs=.*not take"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}, "gradient_accumulation_steps": 3},
     r"num_steps=2 was asked for together with gradient_accumulation_steps=3"),
    ({"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"}, r"refused by transformers"),
    ({"accelerator_config": 1}, r"accelerator_config=1 was asked for; it is a text or a mapping"),
    ({"deepspeed": True}, r"deepspeed=True was asked for; it is a text or a mapping"),
    ({"run_name": NAN}, r"run_name=nan was asked for; it is a text"),
    ({"layout": ["padded"]}, r"layout=\['padded'\] was asked for; it is a text"),
    ({"lr_scheduler_kwargs": 3}, r"lr_scheduler_kwargs=3 was asked for; it is a text or a mapping"),
    ({"loss_type": 3}, r"loss_type=3 was asked for; it is a text or a list"),
    ({"parallelism_config": 3}, r"parallelism_config=3 was asked for"),
    ({"fsdp": "full_shard"}, r"fsdp=.* was asked for in a single process"),
    ({"deepspeed": "nowhere.json"}, r"refused by transformers"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), COMBINATIONS, ids=[str(options) for options, _ in COMBINATIONS])
def test_what_cannot_be_right_together_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True} | options)


def test_in_a_run_file_it_is_an_error_of_the_run_file(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: m\ndata: {train: pairs.jsonl}\ntraining: {use_cpu: true}\n")
    for override, message in (
        ("learning_rate=.nan", "learning_rate=nan was asked for"),
        ("gradient_accumulation_steps=-3", "gradient_accumulation_steps=-3 was asked for; it counts from 1"),
        ("accelerator_config=nowhere.json", "names the file nowhere.json: there is no such file"),
        ("eval_strategy=steps", "needs an evaluation, and there is no `data.eval`"),
        ("eval_on_start=true", "`training.eval_on_start` is True, which needs an evaluation"),
    ):
        with pytest.raises(RunFileError, match=message):
            read_run_file(run, [f"training.{override}"]).training_arguments()


# --- checked again by the trainer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", NAN), ("max_steps", 0), ("gradient_accumulation_steps", -3), ("optim", "x")]
)
def test_an_option_that_was_set_later_is_checked_by_the_trainer(name: str, value: Any, tmp_path: Path) -> None:
    args = config(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=name):
        trainer("nowhere", args)


def test_names_that_were_set_later_are_read_as_names(tmp_path: Path) -> None:
    args = config(tmp_path)
    args.optim, args.lr_scheduler_type, args.eval_strategy = "adamw_torch", "linear", "epoch"
    with pytest.raises(ValueError, match=r"eval_strategy='epoch' was asked for, but there are no data"):
        trainer(tiny_model(), args)
    args.eval_strategy, args.save_strategy = "no", "no"
    trainer(tiny_model(), args)


OF_THE_TRAINER: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"eval_strategy": "steps"}, {}, r"eval_strategy='steps' was asked for, but there are no data to evaluate on"),
    ({"eval_on_start": True}, {}, r"eval_on_start=True was asked for, but there are no data"),
    ({"metric_for_best_model": "los", "save_strategy": "best", "eval_strategy": "steps"}, {"eval_dataset": rows(3)},
     r"metric_for_best_model='los' was asked for.*Did you mean 'loss'"),
    ({"metric_for_best_model": "loss", "save_strategy": "best", "eval_strategy": "steps"},
     {"eval_dataset": {"easy": rows(3)}}, r"metric_for_best_model='loss'.*Did you mean 'easy_loss'.*name of its data"),
    ({"dataloader_drop_last": True, "per_device_train_batch_size": 20}, {}, r"batches of 20 pairs.*data have 12.*noth"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "given", "message"), OF_THE_TRAINER)
def test_what_contradicts_the_data_is_refused(
    options: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), config(tmp_path, **options), **given)


def test_a_warmup_longer_than_the_epochs_is_refused_when_training_begins(tmp_path: Path) -> None:
    """12 pairs in batches of 3 are 4 steps."""
    args = config(tmp_path, max_steps=-1, num_train_epochs=1, warmup_steps=5, lr_scheduler_type="linear")
    with pytest.raises(ValueError, match=r"warmup_steps=5 was asked for in a run of 4 steps"):
        trainer(tiny_model(), args).train()


def test_the_metrics_of_an_evaluation_are_those_that_a_run_may_go_by(tmp_path: Path) -> None:
    metrics = trainer(tiny_model("qwen3_moe"), config(tmp_path, output_dir=str(tmp_path))).evaluate(rows(3))
    assert {name.removeprefix("eval_") for name in metrics} <= {
        *EVAL_METRICS,
        "loss_term/sigmoid",
        "loss_term/aux_loss",
        "epoch",
        "model_preparation_time",
    }
    assert {"loss", "rewards/margins", "reference/kl_chosen", "aux_loss"} <= {*EVAL_METRICS}


def test_a_config_can_be_copied_and_stays_as_it_is(tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, learning_rate=np.float32(1e-3), save_steps=50.0)
    again = dataclasses.replace(args, beta=0.2)
    assert (again.learning_rate, again.save_steps) == (args.learning_rate, 50)
    assert math.isclose(args.learning_rate, 1e-3, rel_tol=1e-6)
    assert isinstance(args, TrainingArguments)
    assert torch.get_default_dtype() == torch.float32
