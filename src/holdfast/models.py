"""From what users hand in to a policy that can train: loading, adapters, tokenizer, dropout.

Weights are read with `from_pretrained` (safetensors), code of other people's only when asked. A path with an
`adapter_config.json` is loaded as a PEFT model.
"""

import logging
import os
from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftType, get_peft_model
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import cached_file

from holdfast.config import DPOConfig
from holdfast.logprobs import unwrap
from holdfast.reference.named import check_adapter
from holdfast.reference.sync import is_adapted

logger = logging.getLogger(__name__)


def load_model(
    path: str, init_kwargs: Mapping[str, Any] | str | None, *, args: DPOConfig, is_trainable: bool
) -> nn.Module:
    """The causal language model at a local folder or of a hub id; fp32 unless `dtype` says otherwise."""
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **_mapping(init_kwargs, path)}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        dtype = getattr(torch, kwargs["dtype"].removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"dtype={kwargs['dtype']!r} was asked for in loading {path!r}; use 'auto', 'float32', 'bfloat16' or "
                "'float16'."
            )
        kwargs["dtype"] = dtype
    if _is_adapter(path, kwargs):
        return AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=is_trainable, **kwargs)
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def _mapping(init_kwargs: Mapping[str, Any] | str | None, path: str) -> Mapping[str, Any]:
    if isinstance(init_kwargs, str):
        raise ValueError(
            f"Keyword arguments for loading {path!r} were given as the string {init_kwargs!r}. Pass a mapping, or JSON."
        )
    return init_kwargs or {}


def _is_adapter(path: str, kwargs: Mapping[str, Any]) -> bool:
    location = {key: kwargs[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in kwargs}
    found = cached_file(
        path, ADAPTER_CONFIG_NAME, **location,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    return found is not None


def load_policy(model: str | nn.Module, args: DPOConfig, quantization_config: Any) -> nn.Module:
    """The policy: `model` itself, or loaded from the path or hub id that it names."""
    if not isinstance(model, str):
        for option, value in (
            ("model_init_kwargs", args.model_init_kwargs),
            ("quantization_config", quantization_config),
        ):
            if value is not None:
                raise ValueError(
                    f"`{option}` says how to load a model, but `model` is a {type(model).__name__} that is loaded "
                    f"already, so it would be ignored. Pass the model's path, or drop `{option}`."
                )
        return model
    kwargs: dict[str, Any] = dict(_mapping(args.model_init_kwargs, model))
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "`quantization_config` is set both as an argument of the trainer and in `model_init_kwargs`. "
                "Keep one of them."
            )
        kwargs["quantization_config"] = quantization_config
    return load_model(model, kwargs, args=args, is_trainable=True)


def make_policy(
    model: str | nn.Module, args: DPOConfig, quantization_config: Any, peft_config: PeftConfig | None
) -> nn.Module:
    """The policy ready to train: loaded, with its adapter, without dropout where that is asked for."""
    policy = with_adapter(load_policy(model, args, quantization_config), peft_config, args.model_adapter_name)
    if is_adapted(policy) and args.gradient_checkpointing:
        _check_recomputable(policy)
        unwrap(policy).enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout(policy)
    return policy


def _check_recomputable(policy: Any) -> None:
    """ValueError for prefix tuning: its prefix is a cache of keys and values, which recomputed layers do not see."""
    for name in policy.active_adapters:
        if policy.peft_config[name].peft_type == PeftType.PREFIX_TUNING:
            raise ValueError(
                "gradient_checkpointing=True (the default) was asked for with the prefix-tuning adapter "
                f"{name!r}, whose prefix layers lose when they are recomputed. Set gradient_checkpointing=False."
            )


@torch.no_grad()
def same_on_all_processes(module: nn.Module) -> list[str]:
    """The names of the tensors that processes had unlike values of: now they all have the main process's.

    DDP does the same to the policy, but only once training begins, when its reference is captured already. Costs one
    pass over the weights; nothing where there is one process.
    """
    if PartialState().num_processes == 1:
        return []
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    sums = {
        name: (float(tensor.float().sum()), float(tensor.float().norm()))
        for name, tensor in tensors.items()
        if not tensor.is_meta and not hasattr(tensor, "full_tensor")  # the parts of a sharded tensor differ
    }
    first, *others = gather_object([sums])
    unlike = [name for name in first if any(name in other and other[name] != first[name] for other in others)]
    for name in unlike:
        tensors[name].copy_(broadcast(tensors[name].contiguous()))
    return unlike


def load_ref_model(ref_model: str | nn.Module | None, args: DPOConfig) -> nn.Module | None:
    """The reference module that a user chose: itself, loaded from a path or hub id, or None."""
    if not isinstance(ref_model, str):
        if args.ref_model_init_kwargs is not None:
            raise ValueError(
                f"`ref_model_init_kwargs` says how to load a reference, but `ref_model` is {type(ref_model).__name__}, "
                "not a path, so it would be ignored. Pass a path, or drop it."
            )
        return ref_model
    init_kwargs = args.ref_model_init_kwargs
    if init_kwargs is None:  # the policy's, less what says where the policy is
        given = _mapping(args.model_init_kwargs, ref_model)
        init_kwargs = {name: value for name, value in given.items() if name not in ("revision", "subfolder")}
    return load_model(ref_model, init_kwargs, args=args, is_trainable=False)


def with_adapter(policy: nn.Module, peft_config: PeftConfig | None, name: str | None = None) -> nn.Module:
    """`policy` with a fresh adapter where a `peft_config` was given; with `name`, that is its name, or that of the
    adapter it carries that is to train.

    A plain model of which every weight is frozen trains whole, and a line says so. ValueError if `policy` carries an
    adapter already, or if nothing of its adapters would train.
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
        policy = get_peft_model(cast(PreTrainedModel, policy), peft_config, adapter_name=name or "default")
    elif name is not None:
        if not is_adapted(policy):
            raise ValueError(
                f"model_adapter_name={name!r} was asked for, but the policy is a {type(policy).__name__} without "
                "adapters. Pass a PeftModel or a `peft_config`, or drop it."
            )
        check_adapter("model_adapter_name", name, policy)
        policy.set_adapter(name)
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


def load_tokenizer(processing_class: Any, policy: nn.Module, args: DPOConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """The processing class as handed in or loaded from the policy's own path, and its tokenizer."""
    if processing_class is None:
        path = getattr(policy.config, "_name_or_path", "") or ""
        if not path:
            raise ValueError(
                "No `processing_class` was given, and the model was not loaded from a path where its tokenizer could "
                "be. Pass the tokenizer as `processing_class`."
            )
        init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        location = {key: init_kwargs[key] for key in ("revision", "subfolder") if key in init_kwargs}
        processing_class = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code, **location)
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a {type(processing_class).__name__}; pass a tokenizer or a processor with one."
        )
    return processing_class, tokenizer


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`, unless it has places of its own (`device_map`) or is quantised, which fixes its place."""
    is_quantised = getattr(module, "is_quantized", False)
    return module if is_quantised or getattr(module, "hf_device_map", None) else module.to(device)


def padding_id(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> int:
    """The id that fills rows up: of `pad_token`, else the tokenizer's padding, else its end-of-sequence token. It is
    never attended to and never scored."""
    token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if token is None:
        raise ValueError(
            "Rows are padded, but the tokenizer has neither a padding nor an end-of-sequence token. "
            "Set `tokenizer.pad_token`, or `pad_token` in DPOConfig."
        )
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"pad_token={token!r} was asked for, but the tokenizer ({type(tokenizer).__name__}) has no such token. "
            "Name one of its tokens, or add it and resize the model's embeddings."
        )
    return tokenizer.get_vocab()[token]


def disable_dropout(policy: nn.Module) -> None:
    """Every dropout of the policy to zero: modules, and the probabilities that attention functions read."""
    for part in policy.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or name == "layerdrop"):
                setattr(part, name, 0.0)


def default_output_dir(model: str | nn.Module) -> str:
    """`<model name>-DPO`, for a run without a config."""
    path = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    return f"{os.path.basename(path.rstrip('/')) or 'model'}-DPO"
