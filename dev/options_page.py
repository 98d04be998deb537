"""Writes docs/options.md: every option of `DPOConfig` once, from its declaration.

    python dev/options_page.py

The text of an option is its help, its values are the rule that is checked. What transformers declares is written with
the help that transformers gives it, and with what this package does about it. An option that no group below names is in
the last group of its kind, so a new one is on the page without a change here.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from holdfast.cli.runfile import ELSEWHERE
from holdfast.config import DPOConfig
from holdfast.losses import LOSSES, LossOptions, ModifierOptions
from holdfast.losses.options import rules
from holdfast.options.data import DataOptions
from holdfast.options.ranges import RANGES, Range
from holdfast.training_arguments import REFUSALS

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
BEGIN, END = "<!-- table: options -->", "<!-- /table -->"

OWN: Mapping[str, tuple[str, ...]] = {
    "The reference": (
        "reference", "ref_adapter_name", "ref_model_weights", "ref_model_init_kwargs", "snapshot_device",
        "reference_window", "reference_audit", "precompute_ref_log_probs", "precompute_ref_batch_size",
        "reference_store", "reference_store_versions", "sync_ref_model", "ref_model_mixup_alpha",
        "ref_model_sync_steps",
    ),
    "The losses": (
        "loss_type", "loss_weights", *(field.name for field in (*fields(LossOptions), *fields(ModifierOptions))),
    ),
    "The data": (*(field.name for field in fields(DataOptions)), "pad_token"),
    "Rows and batches": ("layout", "padding_free", "pad_to_multiple_of", "tokens_per_batch"),
    "The model": (
        "model_init_kwargs", "model_adapter_name", "trust_remote_code", "disable_dropout", "router_aux_loss_coef",
        "frozen_weights_dtype", "activation_offloading",
    ),
    "The run": (),
}  # fmt: skip
"""The options of this package by group; the last one has those that no other has."""

INHERITED: Mapping[str, tuple[str, ...]] = {
    "Length of the run and batches": (
        "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
        "seed", "data_seed", "full_determinism",
    ),
    "Optimizer and schedule": (
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
        "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    ),
    "Precision, memory and speed": (
        "bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "gradient_checkpointing",
        "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
        "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "use_cpu",
    ),
    "Logs": (
        "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level",
        "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "skip_memory_metrics",
    ),
    "Evaluation": (
        "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
        "prediction_loss_only", "eval_accumulation_steps", "eval_do_concat_batches", "batch_eval_metrics",
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    ),
    "Checkpoints": (
        "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node",
        "enable_jit_checkpoint", "resume_from_checkpoint", "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
    ),
    "Reading data": (
        "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
        "train_sampling_strategy", "remove_unused_columns",
    ),
    "Several processes": (
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
        "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "accelerator_config",
    ),
    "The hub": (
        "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_always_push",
        "hub_revision",
    ),
    "Others": (),
}  # fmt: skip
"""The options of `transformers.TrainingArguments` by group, in the same way."""

HELP = {
    "resume_from_checkpoint": "Go on from this checkpoint; in a run file `true` is the newest complete one in "
    "`output_dir`. See [Jobs with a time limit](howto/job.md).",
    "disable_tqdm": "Show no progress bars. Default: off where log_level is warning or lower.",
}
"""Of options that mean more here than transformers says."""

PARTLY_REFUSED = {"train_sampling_strategy": "`batch_rebalance`", "parallelism_config": "sizes above 1"}

_LONGEST = 240


def written(page: str) -> str:
    """The page with its tables as the code has them now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join((f"{before}{BEGIN}", "", *tables(), f"{END}{after}"))


def tables() -> Iterator[str]:
    """The lines of all tables."""
    of_transformers = {field.name: field for field in fields(TrainingArguments)}
    ours = {field.name: field for field in fields(DPOConfig)}
    own = {name: field for name, field in ours.items() if name not in of_transformers}
    for groups, found in ((OWN, own), (INHERITED, {name: ours[name] for name in of_transformers})):
        named = {name for names in groups.values() for name in names}
        if groups is INHERITED:
            yield from _OF_TRANSFORMERS
        for title, names in groups.items():
            last = tuple(name for name in found if name not in named) if title == [*groups][-1] else ()
            yield from _table(title, [found[name] for name in (*names, *last) if name in found])


_OF_TRANSFORMERS = (
    "## Options of transformers", "",
    "These are those of `transformers.TrainingArguments`, with the texts that it gives them. What `holdfast` does",
    "differently stands behind.", "",
)  # fmt: skip


def _table(title: str, options: list[Field[Any]]) -> Iterator[str]:
    if not options:
        return
    yield from (f"### {title}", "", "| option | type | default | what it does |", "|---|---|---|---|")
    hints = get_type_hints(DPOConfig)
    for option in options:
        name = f'<a id="{option.name}"></a>`{option.name}`'
        yield f"| {name} | {_type(hints[option.name])} | {_default(option)} | {_text(option)} |"
    yield ""


def _type(hint: Any) -> str:
    """A type in words that a run file has."""
    if get_origin(hint) in (Union, UnionType):
        parts = dict.fromkeys(_type(part) for part in get_args(hint) if part is not NoneType)
        return " or ".join(parts)
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}s"
    if get_origin(hint) is dict or hint is dict:
        return "mapping"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(hint, "text")


def _default(option: Field[Any]) -> str:
    value = option.default_factory() if option.default_factory is not MISSING else option.default
    if value is None or value is MISSING or value == "":
        return "-"
    if hasattr(value, "value"):  # an enum
        value = value.value
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _text(option: Field[Any]) -> str:
    """Its help, its values, and what is done about it."""
    help = HELP.get(option.name) or (_shortened(option) if _is_of_transformers(option) else option.metadata["help"])
    sentences = [_escaped(help if help.endswith((".", ")")) else f"{help}.")]
    of_losses = rules(LossOptions) | rules(ModifierOptions)
    if option.name in of_losses:
        sentences.append(f"It {_escaped(of_losses[option.name].demand)}.")
    elif option.name in RANGES:
        sentences.append(_escaped(_of_range(RANGES[option.name])))
    readers = [name for name, loss in LOSSES.items() if option.name in loss.reads]
    if readers:
        sentences.append(f"Read by {', '.join(f'`{name}`' for name in readers)}.")
    for refusal in REFUSALS:
        if refusal.name == option.name:
            which = f" ({PARTLY_REFUSED[option.name]})" if option.name in PARTLY_REFUSED else ""
            sentences.append(f"**Refused**{which}: {_escaped(refusal.reason)}. {_escaped(refusal.instead)}.")
    if option.name in ELSEWHERE:
        sentences.append(f"In a run file: {_escaped(ELSEWHERE[option.name])}")
    return " ".join(sentences)


def _of_range(numbers: Range) -> str:
    """The numbers that an option may be, as a sentence."""
    also = "".join(f", or {value:g}" for value in numbers.also if value is not None)
    demand = numbers.demand.removeprefix("is out of range: ")
    return f"{demand[0].upper()}{demand[1:]}{also}." if demand != numbers.demand else f"It {demand}{also}."


def _is_of_transformers(option: Field[Any]) -> bool:
    theirs = {field.name: field.metadata.get("help") for field in fields(TrainingArguments)}
    return theirs.get(option.name) == option.metadata.get("help")


def _shortened(option: Field[Any]) -> str:
    """The first sentences of a long text."""
    text = " ".join(str(option.metadata.get("help", "")).replace("%%", "%").split())
    kept = ""
    for sentence in re.split(r"(?<=[a-z`\])]\.) (?=[A-Z])", text):
        if kept and len(kept) + len(sentence) > _LONGEST:
            break
        kept = f"{kept} {sentence}".strip()
    return kept


def _escaped(text: str) -> str:
    """A text as a cell of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return "".join(
        part
        if part.startswith("`")
        else part.replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*").replace("__", "\\_\\_")
        for part in re.split(r"(`[^`]*`)", text)
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE}: {len(fields(DPOConfig))} options\n")
