"""Every option of `transformers.TrainingArguments` is heeded or refused; the table says by whom, and how that is known.

A field that a newer `transformers` adds is in no row, and fails here until somebody has looked at what it does.
"""

import dataclasses
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainingArguments, get_constant_schedule

from families import tiny_model
from holdfast import training_arguments as unheeded
from policies import POLICIES, config, logged, rows, trainer

BY_THE_TRAINER = {
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "warmup_ratio", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "optim_target_modules", "max_grad_norm", "tf32", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "torch_compile_backend", "torch_compile_mode", "use_cache", "torch_empty_cache_steps", "logging_strategy",
    "logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm",
    "logging_dir", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_only_model",
    "save_strategy", "save_steps", "save_on_each_node", "enable_jit_checkpoint", "push_to_hub", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "restore_callback_states_from_checkpoint", "full_determinism", "seed", "use_cpu", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug",
    "skip_memory_metrics", "local_rank",
}  # fmt: skip
"""What `transformers.Trainer` and accelerate do without asking this package; no override stands in the way."""

BY_US = {
    "per_device_train_batch_size": "contract/test_references.py",
    "per_device_eval_batch_size": "end_to_end/test_trainer.py",
    "gradient_accumulation_steps": "contract/test_table.py",
    "bf16": "end_to_end/test_trainer.py",
    "fp16": "end_to_end/test_trainer.py",
    "bf16_full_eval": "end_to_end/test_full_eval.py",
    "fp16_full_eval": "end_to_end/test_full_eval.py",
    "torch_compile": "end_to_end/test_compile.py",
    "save_total_limit": "end_to_end/test_resume.py",
    "data_seed": "unit/test_order.py",
    "dataloader_drop_last": "distributed/test_fillers.py",
    "dataloader_pin_memory": "end_to_end/test_waits.py",
    "remove_unused_columns": "end_to_end/test_trainer.py",
    "accelerator_config": "end_to_end/test_trainer.py",
    "eval_do_concat_batches": __name__,
    "eval_accumulation_steps": __name__,
    "include_num_input_tokens_seen": __name__,
}
"""What goes through code of this package, and where that is tested."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "logging_nan_inf_filter": ({}, r"logging_nan_inf_filter=True was asked for.*stops the run.*set it to False"),
    "label_smoothing_factor": ({}, r"label_smoothing_factor=0\.1 was asked for.*Use label_smoothing"),
    "label_names": ({}, r"label_names=\['labels'\] was asked for.*`label_ids`.*Leave label_names out"),
    "include_for_metrics": ({}, r"include_for_metrics=\['inputs'\] was asked for.*come as `label_ids`"),
    "auto_find_batch_size": ({}, r"auto_find_batch_size=True was asked for.*Set tokens_per_batch"),
    "use_liger_kernel": ({}, r"use_liger_kernel=True was asked for.*before they are handed over"),
    "liger_kernel_config": ({}, r"liger_kernel_config=\{'rope': True\} was asked for.*handed over"),
    "length_column_name": ({}, r"length_column_name='size' was asked for.*Leave it out"),
    "train_sampling_strategy": ({}, r"train_sampling_strategy=.*batch_rebalance.* was asked for.*'group_by_length'"),
    "parallelism_config": ({}, r"(?s)parallelism_config=.*cp_size=2.* was asked for.*data parallelism or FSDP"),
    "eval_use_gather_object": ({}, r"eval_use_gather_object=True was asked for"),
    "neftune_noise_alpha": ({}, r"neftune_noise_alpha=5\.0 was asked for together with layout='auto'.*layout='padded'"),
    "prediction_loss_only": ({"compute_metrics": len}, r"prediction_loss_only=True.*would never be called.*Drop one"),
    "batch_eval_metrics": ({}, r"batch_eval_metrics=True was asked for without `compute_metrics`.*Pass one"),
    "ignore_data_skip": ({"train_dataset": rows().to_iterable_dataset()}, r"ignore_data_skip=True.*stream.*Leave"),
}
"""What is refused, always or together with these arguments of the trainer, and how."""

VALUES: dict[str, list[Any]] = {
    "label_smoothing_factor": [0.1], "label_names": [["labels"]], "include_for_metrics": [["inputs"], ["loss"]],
    "liger_kernel_config": [{"rope": True}], "length_column_name": ["size"],
    "train_sampling_strategy": ["batch_rebalance"], "neftune_noise_alpha": [5.0],
}  # fmt: skip
"""Values that ask for it; True for all others."""

NOTHING_TO_DO = {
    "average_tokens_across_devices": "the loss is a mean over pairs, on all processes, whatever it is",
    "do_train": "for scripts: `transformers.Trainer` does not read it",
    "do_eval": "for scripts: `transformers.Trainer` does not read it",
    "do_predict": "for scripts: `transformers.Trainer` does not read it",
    "resume_from_checkpoint": "for scripts, which hand it to `train`",
}


def test_every_option_is_in_the_table() -> None:
    """In one row each, whatever version of `transformers` is installed."""
    tables = [set(BY_THE_TRAINER), set(BY_US), set(REFUSED), set(NOTHING_TO_DO)]
    found = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert found <= set().union(*tables), "look at what they do, then heed or refuse them"
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert {refusal.name for refusal in unheeded.REFUSALS} <= set(REFUSED)


def test_the_tests_that_the_table_names_are_there() -> None:
    tests = Path(__file__).parent.parent
    assert all((tests / name).is_file() for name in BY_US.values() if name != __name__)


def test_no_option_of_the_trainer_is_read_on_our_way_alone() -> None:
    """`compute_loss` and its kin are ours; an option that only those of `transformers.Trainer` read is none of its."""
    replaced = ("compute_loss", "prediction_step", "training_step", "_get_train_sampler", "_get_eval_sampler")
    for name in replaced:
        source = inspect.getsource(getattr(Trainer, name))
        read = {word for word in BY_THE_TRAINER if f"self.args.{word}" in source.replace(f"self.args.{word}_", "")}
        assert read <= {"torch_empty_cache_steps", "optim", "seed"}, name


ASKED = [(name, value) for name in REFUSED for value in VALUES.get(name, [True]) if name != "parallelism_config"]


@pytest.mark.parametrize(("name", "value"), ASKED, ids=[f"{name}-{value}" for name, value in ASKED])
def test_what_cannot_be_heeded_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    given, match = REFUSED[name]
    match = match.replace("inputs", "loss") if value == ["loss"] else match
    with pytest.raises(ValueError, match=match):
        trainer(untouchable(), config(tmp_path, **{name: value}), **given)


def test_parallelism_within_a_row_is_refused(tmp_path: Path) -> None:
    args = config(tmp_path)
    args.parallelism_config = ParallelismConfig(cp_size=2)
    with pytest.raises(ValueError, match=REFUSED["parallelism_config"][1]):
        unheeded.check_heeded(args)


def test_noise_in_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neftune_noise_alpha=5\.0 was asked for together with tokens_per_batch=40"):
        config(tmp_path, neftune_noise_alpha=5.0, layout="padded", tokens_per_batch=40)


def untouchable() -> nn.Module:
    """A policy that no refusal may come to compute with."""
    policy = tiny_model()

    def called(*_: Any) -> None:
        raise AssertionError("a forward pass before the refusal")

    policy.register_forward_pre_hook(called)
    return policy


# --- optimizers -------------------------------------------------------------------------------------------------------


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """A plain optimizer."""
    return torch.optim.SGD(parameters, lr=0.1)


def test_an_optimizer_of_other_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer \(SGD\) has 21 tensors, none of .*21 trainable.*Make it from"):
        trainer(untouchable(), config(tmp_path), optimizers=(sgd(tiny_model().parameters()), None))


def test_an_optimizer_of_what_an_adapter_freezes_is_refused(tmp_path: Path) -> None:
    policy = untouchable()
    with pytest.raises(ValueError, match=r"none of .* trainable ones, so nothing would train.*without `peft_config`"):
        trainer(
            policy, config(tmp_path), optimizers=(sgd(policy.parameters()), None),
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )  # fmt: skip


def test_an_optimizer_class_of_other_tensors_is_refused(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path))
    ours.optimizer_cls_and_kwargs = (torch.optim.SGD, {"params": [nn.Parameter(torch.zeros(3))], "lr": 0.1})
    with pytest.raises(ValueError, match=r"optimizer \(SGD\) has 1 tensors, none of .* so nothing would train"):
        ours.train()


def test_a_schedule_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    policy = untouchable()
    ours, other = sgd(policy.parameters()), sgd(policy.parameters())
    for optimizers, found in (
        ((None, get_constant_schedule(other)), "without an"),
        ((ours, get_constant_schedule(other)), "of another"),
    ):
        with pytest.raises(ValueError, match=rf"LambdaLR {found} optimizer.*would never change.*lr_scheduler_type"):
            trainer(policy, config(tmp_path), optimizers=optimizers)


def test_an_optimizer_of_a_part_trains_that_part(tmp_path: Path) -> None:
    policy = tiny_model()
    before = {name: value.detach().clone() for name, value in policy.named_parameters()}
    optimizer = sgd([policy.lm_head.weight])
    trainer(policy, config(tmp_path), optimizers=(optimizer, get_constant_schedule(optimizer))).train()
    changed = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"lm_head.weight"}


def test_arguments_of_other_trainers_are_no_arguments_here(tmp_path: Path) -> None:
    for name in ("compute_loss_func", "optimizer_cls_and_kwargs"):
        with pytest.raises(TypeError, match=name):
            trainer(untouchable(), config(tmp_path), **{name: None})


# --- heeded -----------------------------------------------------------------------------------------------------------


def test_noise_on_embeddings_is_in_the_loss_and_not_in_the_reference(tmp_path: Path) -> None:
    """The first loss is that of the embeddings as the first layer got them, worked out row by row; the reference's are
    without noise."""
    policy, base = tiny_model(), tiny_model()
    noised: list[torch.Tensor] = []
    policy.model.layers[0].register_forward_pre_hook(
        lambda module, args: noised.append(args[0].detach().clone()) if module.training else None
    )
    data, sides = rows(3), ("chosen_ids", "rejected_ids")
    args = config(
        tmp_path, neftune_noise_alpha=20.0, layout="padded", max_steps=1, train_sampling_strategy="sequential"
    )
    ours = trainer(policy, args, train_dataset=data)
    ours.train()
    (embeddings,) = noised  # the chosen rows first
    ratios = []
    with torch.no_grad():
        for row, (side, pair) in zip(embeddings, itertools.product(sides, data.to_list()), strict=True):
            ids, start = pair["prompt_ids"] + pair[side], len(pair["prompt_ids"])
            clean = base.model.embed_tokens(torch.tensor(ids))
            ratios.append(logp(base, row[: len(ids)], ids, start) - logp(base, clean, ids, start))
    chosen, rejected = torch.tensor(ratios).view(2, 3)
    rewards = 0.2 * (chosen - rejected)
    (found,) = logged(ours)
    assert found == pytest.approx(float(-nn.functional.logsigmoid(rewards).mean()), abs=1e-5)
    assert abs(found - math.log(2)) > 1e-3


def logp(model: nn.Module, embeddings: torch.Tensor, ids: list[int], start: int) -> float:
    """The log-prob in nats of the ids from `start` on, from the embeddings of all [T D]."""
    logps = model(inputs_embeds=embeddings[None]).logits[0].double().log_softmax(-1)[start - 1 : -1]
    return float(logps.gather(-1, torch.tensor(ids[start:])[:, None]).sum())


@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
def test_tokens_seen_are_those_of_the_sequences(layout: str, tmp_path: Path) -> None:
    """Two steps over all 6 rows: prompt and completion of both sides, whatever the rows are like."""
    args = config(tmp_path, layout=layout, max_steps=2, include_num_input_tokens_seen="non_padding")
    ours = trainer(POLICIES["full"](), args, train_dataset=rows(6))
    ours.train()
    expected = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows(6).to_list())
    assert ours.state.num_input_tokens_seen == expected


@pytest.mark.parametrize(
    "options",
    [{"eval_do_concat_batches": False}, {"eval_accumulation_steps": 1}, {"batch_eval_metrics": True}],
    ids=lambda options: next(iter(options)),
)
def test_metrics_are_shown_the_same_rows_in_every_way(options: dict[str, Any], tmp_path: Path) -> None:
    """7 pairs in batches of 3: ids and logits of all together, of a list of batches, and of one batch after another."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, given in (("plain", {}), ("other", options)):
        shown = seen.setdefault(name, [])

        def spy(prediction: Any, compute_result: bool = True, *, shown: Any = shown) -> dict[str, float]:
            ids, logits = prediction.label_ids, prediction.predictions
            for one, other in zip(*((x if isinstance(x, list) else [x]) for x in (ids, logits)), strict=True):
                shown += [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True)]
            return {"rows": len(shown)}

        args = config(tmp_path, per_device_eval_batch_size=3, layout="padded", **given)
        metrics = trainer(tiny_model(), args, compute_metrics=spy).evaluate(rows(7, 5))
        assert metrics["eval_rows"] == 14
    assert len(seen["plain"]) == len(seen["other"]) == 14
    for (ids, logits), (other_ids, other_logits) in zip(seen["plain"], seen["other"], strict=True):
        length = min(len(ids), len(other_ids))
        assert torch.equal(ids[:length], other_ids[:length])
        assert torch.allclose(logits[:length], other_logits[:length], atol=1e-5)


def test_evaluation_of_a_run_whose_batches_are_of_like_length(tmp_path: Path) -> None:
    grouped = trainer(
        tiny_model(), config(tmp_path, train_sampling_strategy="group_by_length"), ref_model=tiny_model(seed=5)
    )
    plain = trainer(tiny_model(), config(tmp_path), ref_model=tiny_model(seed=5))
    found, expected = grouped.evaluate(rows(7, 5)), plain.evaluate(rows(7, 5))
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
