"""Private names of transformers: the attention that a config names, recomputation, what a model class can do, and the
methods of `Trainer` that `DPOTrainer` replaces or calls.

A method that replaces nothing is dead code, and a run with it another run without a word: on transformers 5.2, where
`_init_training_state` had another name, a resumed stream skipped the wrong batches. So the trainer looks when it is
made.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import cached_file

from holdfast.internals.moved import MovedError, looked_up

OVERRIDDEN: Mapping[str, tuple[str, ...]] = {
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "create_model_card": ("model_name", "tags"),
    "create_optimizer": ("model",),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "evaluation_loop": ("dataloader", "metric_key_prefix"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "log": ("logs",),
    "predict": ("test_dataset", "ignore_keys", "metric_key_prefix"),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "train": ("resume_from_checkpoint",),
    "training_step": ("model", "inputs"),
    "_get_eval_sampler": ("eval_dataset",),
    "_get_dataloader": ("dataset", "description", "batch_size"),
    "_get_train_sampler": ("train_dataset",),
    "_init_training_state": ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint"),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_checkpoint": ("model", "trial"),
    "_set_signature_columns_if_needed": (),
}
"""Methods of `Trainer` that `DPOTrainer` replaces, with the parameters that it passes on or stands on."""

CALLED: Mapping[str, tuple[str, ...]] = {
    "_get_output_dir": ("trial",),
    "_move_model_to_device": ("model", "device"),
    "_prepare_inputs": ("inputs",),
}
"""Private methods of `Trainer` that `DPOTrainer` calls as they are."""


def check_trainer() -> None:
    """MovedError where a method of `Trainer` that its subclass replaces or calls is gone, takes other parameters, or is
    no longer called by it."""
    for name, parameters in {**OVERRIDDEN, **CALLED}.items():
        method = inspect.getattr_static(Trainer, name, None)
        if not callable(method):
            raise MovedError("transformers", f"Trainer.{name}", "`Trainer` has no such method")
        taken = inspect.signature(method).parameters
        missing = [parameter for parameter in parameters if parameter not in taken]
        if missing:
            raise MovedError("transformers", f"Trainer.{name}", f"it takes no `{missing[0]}`, but {list(taken)[1:]}")
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
    return name in code.co_names or any(_reads(part, name) for part in code.co_consts if hasattr(part, "co_names"))


def dict_fields() -> list[str]:
    """The options of `TrainingArguments` that may be given as a JSON text."""
    return list(looked_up("transformers", TrainingArguments, "_VALID_DICT_FIELDS"))


# --- configs and models -----------------------------------------------------------------------------------------------


def attention_of(config: PretrainedConfig) -> str | None:
    """The attention implementation that a model with this config computes with."""
    if not hasattr(type(config), "_attn_implementation"):
        raise MovedError("transformers", "PretrainedConfig._attn_implementation")
    return config._attn_implementation


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Makes it `name`. Written to the inner attribute, since the public one also writes to
    the configs nested in it."""
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
    """What runs the module's layers again in the backward pass; None where activation checkpointing is off."""
    found = vars(module).get("_gradient_checkpointing_func")
    if found is None and vars(module).get("gradient_checkpointing") is True:
        raise MovedError(
            "transformers",
            "PreTrainedModel._gradient_checkpointing_func",
            f"{type(module).__name__} recomputes its layers by other means",
        )
    return found


def set_recomputation(module: nn.Module, function: Callable[..., Any]) -> None:
    """Makes it `function`."""
    unknown: Any = module
    unknown._gradient_checkpointing_func = function


def is_on_attention_interface(causal_lm: PreTrainedModel) -> bool:
    """Whether the model's attention is the one that its config names."""
    return bool(looked_up("transformers", causal_lm, "_can_set_attn_implementation")())


def carries_state(causal_lm: PreTrainedModel) -> bool:
    """Whether the model's class says that it carries state along its rows."""
    return bool(looked_up("transformers", causal_lm, "_is_stateful"))


def has_own_adapters(causal_lm: nn.Module) -> bool:
    """Whether transformers itself put an adapter into the model."""
    if not isinstance(causal_lm, PreTrainedModel):
        return False
    return bool(looked_up("transformers", causal_lm, "_hf_peft_config_loaded"))


def loaded_from(config: Any) -> str:
    """The path or hub id that a model with this config was loaded from; empty where there is none."""
    return getattr(config, "name_or_path", "") or ""


def has_file(path: str, name: str, **location: Any) -> bool:
    """Whether the folder or hub repository `path` has the file `name`, as far as this machine can tell."""
    found = cached_file(
        path,
        name,
        **location,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return found is not None
