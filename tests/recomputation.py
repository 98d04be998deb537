"""Activation checkpointing under the name that the installed transformers has for it: older versions say `gradient`."""

from typing import Any

from transformers import PreTrainedModel, TrainingArguments

IS_RENAMED = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
NAME = "activation_checkpointing" if IS_RENAMED else "gradient_checkpointing"


def renamed(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `DPOConfig` with that name in place of the newer one."""
    return {NAME if name == "activation_checkpointing" else name: value for name, value in options.items()}


def recompute(model: PreTrainedModel, use_reentrant: bool) -> None:
    """Makes `model` compute its layers again in the backward pass."""
    enable = model.activation_checkpointing_enable if IS_RENAMED else model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
