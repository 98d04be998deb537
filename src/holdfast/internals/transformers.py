"""Private names of transformers: how a tokenizer encodes and a template is rendered, the attention that a config names,
recomputation, what a model class can do, and the methods of `Trainer` that `DPOTrainer` replaces or calls.

A method that replaces nothing is dead code, and the run silently becomes another run: on transformers 5.2, where
`_init_training_state` had another name, a resumed stream skipped the wrong batches. So `check_trainer` compares the
tables below with the installed `Trainer` whenever a trainer is made. Given up: checking what the methods do.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.utils import cached_file, chat_template_utils

from holdfast.internals.moved import MovedError, looked_up

OVERRIDDEN: Mapping[str, tuple[str, ...]] = {
    "call_model_init": ("trial",),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "create_model_card": ("model_name", "tags"),
    "create_optimizer": ("model",),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "evaluation_loop": ("dataloader", "metric_key_prefix"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "log": ("logs",),
    "predict": ("test_dataset", "ignore_keys", "metric_key_prefix"),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "save_metrics": ("split", "metrics", "combined"),
    "save_model": ("output_dir", "_internal_call"),
    "save_state": (),
    "train": ("resume_from_checkpoint",),
    "training_step": ("model", "inputs"),
    "_evaluate": (),
    "_finalize_training": (),
    "_get_eval_sampler": ("eval_dataset",),
    "_get_dataloader": ("dataset", "description", "batch_size"),
    "_get_train_sampler": ("train_dataset",),
    "_init_training_state": ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint"),
    "_load_best_model": (),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
    "_maybe_log_save_evaluate": ("tr_loss", "grad_norm"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_set_signature_columns_if_needed": (),
}
"""Methods of `Trainer` that `DPOTrainer` replaces, with the parameters that it reads or passes on."""

CALLED: Mapping[str, tuple[str, ...]] = {
    "_get_output_dir": ("trial",),
    "_hp_search_setup": ("trial",),
    "_maybe_log_save_evaluate": (
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
    ),
    "_move_model_to_device": ("model", "device"),
    "_prepare_inputs": ("inputs",),
}
"""Private methods of `Trainer` that `DPOTrainer` calls as they are."""


def check_trainer() -> None:
    """MovedError where a method in `OVERRIDDEN` or `CALLED` is gone or lacks a parameter, or where `Trainer` no longer
    calls a private one that is overridden."""
    for name, parameters in {**OVERRIDDEN, **CALLED}.items():
        method = inspect.getattr_static(Trainer, name, None)
        if not callable(method):
            raise MovedError("transformers", f"Trainer.{name}", "`Trainer` has no such method")
        accepted = inspect.signature(method).parameters
        missing = [parameter for parameter in parameters if parameter not in accepted]
        if missing:
            raise MovedError("transformers", f"Trainer.{name}", f"it takes no `{missing[0]}`, but {list(accepted)[1:]}")
    for name in OVERRIDDEN:
        if name.startswith("_") and not _is_called(name):
            raise MovedError("transformers", f"Trainer.{name}", "`Trainer` no longer calls it")
    if not _reads(Trainer._set_signature_columns_if_needed.__code__, "_signature_columns"):
        raise MovedError("transformers", "Trainer._signature_columns", "`Trainer` no longer fills it")


def _is_called(name: str) -> bool:
    """Whether any method of `Trainer` reads the attribute `name`."""
    functions = (value for value in vars(Trainer).values() if inspect.isfunction(inspect.unwrap(value)))
    return any(_reads(inspect.unwrap(function).__code__, name) for function in functions if callable(function))


def _reads(code: Any, name: str) -> bool:
    return name in code.co_names or any(_reads(inner, name) for inner in code.co_consts if hasattr(inner, "co_names"))


@contextlib.contextmanager
def saving_where_asked(model: Any, args: TrainingArguments) -> Iterator[None]:
    """A context in which a model is written by every process that `args` have save. Without it transformers writes a
    model in the first process of all, so `save_on_each_node` would leave other hosts checkpoints without weights."""
    causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (args.save_on_each_node and args.should_save and hasattr(causal_lm, _SAVES_HERE)):
        yield
        return
    setattr(causal_lm, _SAVES_HERE, bool)
    try:
        yield
    finally:
        delattr(causal_lm, _SAVES_HERE)


_SAVES_HERE = "should_save_on_this_rank"


def unlogged_loss(trainer: Trainer) -> tuple[float, int]:
    """This process's training loss since the last log, summed over its batches, and the step of that log."""
    loss = looked_up("transformers", trainer, "_tr_loss")
    return float(loss), int(looked_up("transformers", trainer, "_globalstep_last_logged"))


def set_unlogged_loss(trainer: Trainer, loss: float, step: int, mean: float) -> None:
    """Makes these what `unlogged_loss` returns. To be called once training has begun. `mean` is the mean of the
    processes' losses: it is taken off `train_loss`, which is about the steps of one run."""
    unlogged_loss(trainer)
    trainer._total_loss_scalar = looked_up("transformers", trainer, "_total_loss_scalar") - mean
    trainer._tr_loss = torch.full_like(trainer._tr_loss, loss)
    trainer._globalstep_last_logged = step


def dict_fields() -> list[str]:
    """The names of the options of `TrainingArguments` that may be given as JSON text."""
    return list(looked_up("transformers", TrainingArguments, "_VALID_DICT_FIELDS"))


# --- tokenizers -------------------------------------------------------------------------------------------------------


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer of the `tokenizers` library that `tokenizer(text, add_special_tokens=False)` calls, if it does
    nothing else; None where the class has a call of its own, or special tokens are to be split."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or getattr(tokenizer, "split_special_tokens", False):
        return None
    kind = type(tokenizer)
    is_plain = all(
        inspect.getattr_static(kind, name, None) is inspect.getattr_static(PreTrainedTokenizerFast, name, kind)
        for name in ("__call__", "_encode_plus")
    )
    return tokenizer.backend_tokenizer if is_plain else None


def has_own_templates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's class renders and tokenizes conversations in a way of its own."""
    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def compiled_template(tokenizer: PreTrainedTokenizerBase, template: str) -> Callable[..., str] | None:
    """What `apply_chat_template` renders this template with, for messages of nothing but a role and a text: called with
    `messages` and `add_generation_prompt`. None where transformers has no such function any more.

    Messages with other fields have to go through `apply_chat_template`, which prepares them.
    """
    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    special_tokens = dict(tokenizer.special_tokens_map)
    if compile_template is None or any(type(token) is not str for token in special_tokens.values()):
        return None
    return partial(compile_template(template).render, tools=None, documents=None, **special_tokens)


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, tokenize: bool, **options: Any
) -> Any:
    """What `tokenizer.apply_chat_template` makes of the messages: text, or token ids. The template sees a content of
    None, which that method drops."""
    if not _has_no_content(messages) or has_own_templates(tokenizer):
        rendered: Any = tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize, **options)
        return rendered["input_ids"] if tokenize else rendered
    template = tokenizer.get_chat_template(options.pop("chat_template", None), options.get("tools"))
    variables = {**tokenizer.special_tokens_map, **options}
    render = looked_up("transformers", chat_template_utils, "render_jinja_template")
    (text,), _ = render(conversations=[messages], chat_template=template, **variables)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if tokenize else text


def rendered_with_marks(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    variables: Mapping[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    """What the template makes of messages, and the characters that are between its `{% generation %}` marks, as
    `apply_chat_template` finds them for `return_assistant_tokens_mask=True`."""
    render = looked_up("transformers", chat_template_utils, "render_jinja_template")
    if not _has_no_content(messages):
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    (text,), (spans,) = render(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **variables},
    )
    return text, spans


def _has_no_content(messages: list[dict[str, Any]]) -> bool:
    return any("content" in message and message["content"] is None for message in messages)


# --- configs and models -----------------------------------------------------------------------------------------------


def attention_of(config: PretrainedConfig) -> str | None:
    """The attention implementation that a model with this config computes with."""
    if not hasattr(type(config), "_attn_implementation"):
        raise MovedError("transformers", "PretrainedConfig._attn_implementation")
    return config._attn_implementation


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Makes `name` the attention that `attention_of` returns.

    It is written to the inner attribute, since the public one also writes to the configs nested in this one.
    """
    before = looked_up("transformers", config, "_attn_implementation_internal")
    config._attn_implementation_internal = name
    if attention_of(config) != name:
        config._attn_implementation_internal = before
        raise MovedError(
            "transformers",
            "PretrainedConfig._attn_implementation_internal",
            f"{name!r} was written to it, and models read {attention_of(config)!r}",
        )


def recomputation(module: nn.Module) -> Callable[..., Any] | None:
    """The function that checkpoints the module's layers; None where activation checkpointing is off."""
    if isinstance(module, CheckpointWrapper):  # FSDP2's own, which accelerate puts around layers
        return looked_up("torch", module, "checkpoint_fn")
    function = vars(module).get("_gradient_checkpointing_func")
    if function is None and vars(module).get("gradient_checkpointing") is True:
        raise MovedError(
            "transformers",
            "PreTrainedModel._gradient_checkpointing_func",
            f"{type(module).__name__} recomputes its layers by other means",
        )
    return function


def set_recomputation(module: nn.Module, function: Callable[..., Any]) -> None:
    """Makes `function` the one that `recomputation` returns."""
    name = "checkpoint_fn" if isinstance(module, CheckpointWrapper) else "_gradient_checkpointing_func"
    setattr(module, name, function)


def is_on_attention_interface(causal_lm: PreTrainedModel) -> bool:
    """Whether the model's attention layers call the attention that its config names."""
    return bool(looked_up("transformers", causal_lm, "_can_set_attn_implementation")())


def carries_state(causal_lm: PreTrainedModel) -> bool:
    """Whether the model's class says that it carries state from token to token, as Mamba does."""
    return bool(looked_up("transformers", causal_lm, "_is_stateful"))


def layer_classes(causal_lm: PreTrainedModel) -> set[str]:
    """The names of the classes of the model's layers, which are kept in one piece."""
    return set(looked_up("transformers", causal_lm, "_no_split_modules") or ())


def has_own_adapters(causal_lm: nn.Module) -> bool:
    """Whether transformers itself has loaded an adapter into the model."""
    if not isinstance(causal_lm, PreTrainedModel):
        return False
    return bool(looked_up("transformers", causal_lm, "_hf_peft_config_loaded"))


def loaded_from(config: Any) -> str:
    """The path or hub id from which a model with this config was loaded; empty if it was made in memory."""
    return getattr(config, "name_or_path", "") or ""


def has_file(path: str, name: str, **location: Any) -> bool:
    """Whether the folder or hub repository `path` has the file `name`, as far as this machine can tell."""
    file = cached_file(
        path,
        name,
        **location,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return file is not None
