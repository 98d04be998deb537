"""From a loaded model to a policy that can train: its adapter is added, its dropout switched off.

A policy without any trainable parameter is refused here, before anything is scored.
"""

import logging
from typing import Any, cast

from peft import PeftConfig, PeftType, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    PreTrainedModel,
)

from holdfast.internals.peft import activate
from holdfast.internals.torch import dropout_class
from holdfast.policy.adapters import check_adapter, check_policy_adapters, is_adapted
from holdfast.policy.divided import check_undivided
from holdfast.policy.load import PolicyOptions, load_policy
from holdfast.policy.quantised import check_not_repacked, is_quantised, pin_quantised_layers
from holdfast.scoring.causal_lm import unwrap

logger = logging.getLogger(__name__)


def make_policy(
    model: str | nn.Module, args: PolicyOptions, quantization_config: Any, peft_config: PeftConfig | None
) -> nn.Module:
    """The policy ready to train: loaded, with its adapter, without dropout where that is asked for."""
    policy = load_policy(model, args, quantization_config)
    check_undivided(policy, "model")
    check_not_repacked(policy)
    check_policy_adapters(policy)
    policy = with_adapter(pin_quantised_layers(policy), peft_config, args.model_adapter_name)
    check_policy_adapters(policy)
    if is_adapted(policy) and args.gradient_checkpointing:
        _check_recomputable(policy)
        unwrap(policy).enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout(policy)
    return policy


def _check_recomputable(policy: Any) -> None:
    """ValueError for prefix tuning. Its prefix is a cache of keys and values, which layers lack when they are
    recomputed."""
    for name in policy.active_adapters:
        if policy.peft_config[name].peft_type == PeftType.PREFIX_TUNING:
            raise ValueError(
                "gradient_checkpointing=True (the default) was asked for with the prefix-tuning adapter "
                f"{name!r}, whose prefix layers lose when they are recomputed. Set gradient_checkpointing=False."
            )


def with_adapter(policy: nn.Module, peft_config: PeftConfig | None, name: str | None = None) -> nn.Module:
    """`policy` with the adapter that trains: with a `peft_config` a fresh one called `name`, without one the policy's
    own adapter of that name. Where both are None, the policy is as it was.

    A quantised model is prepared as peft does it: norms, embeddings and head in 16 bits become fp32. A plain model
    whose weights are all frozen trains whole, and a warning says so. ValueError where a `peft_config` meets an adapter
    that is there already, where no parameter of the adapters would train, or where a quantised model has no adapter.
    """
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"`peft_config` is a {type(peft_config).__name__}; pass a `peft.PeftConfig`, such as `peft.LoraConfig`."
            )
        if is_adapted(policy):
            raise ValueError(
                f"A `peft_config` was given, but `model` already carries the adapters {sorted(policy.peft_config)}. "
                "Drop `peft_config` to train the active one, or pass `model.merge_and_unload()` to train a fresh one."
            )
        if getattr(policy, "is_quantized", False):
            policy = prepare_model_for_kbit_training(policy, use_gradient_checkpointing=False)
        policy = get_peft_model(cast(PreTrainedModel, policy), peft_config, adapter_name=name or "default")
    elif name is not None:
        if not is_adapted(policy):
            raise ValueError(
                f"model_adapter_name={name!r} was asked for, but the policy is a {type(policy).__name__} without "
                "adapters. Pass a PeftModel or a `peft_config`, or drop it."
            )
        check_adapter("model_adapter_name", name, policy)
        activate(policy, name)
    elif is_quantised(policy) and not is_adapted(policy):
        raise ValueError(
            f"The policy is a quantised {type(policy).__name__} without adapters, of which nothing but norms and "
            "embeddings could train. Pass a `peft_config` to train a LoRA on it, or load it unquantised."
        )
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        if is_adapted(policy):
            raise ValueError(
                f"Nothing of the policy would train: no parameter of its adapters {sorted(policy.peft_config)} "
                "requires gradients. Load it with `PeftModel.from_pretrained(..., is_trainable=True)`, or pass a "
                "`peft_config` and `model.merge_and_unload()`."
            )
        logger.warning("No parameter of the model requires gradients (as after `merge_and_unload`): all of it trains.")
        for parameter in policy.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return policy


def disable_dropout(policy: nn.Module) -> None:
    """Sets every dropout of the policy to zero: the modules', and the probabilities that attention functions read."""
    for part in policy.modules():
        if isinstance(part, dropout_class()):
            vars(part)["p"] = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or name == "layerdrop"):
                setattr(part, name, 0.0)
