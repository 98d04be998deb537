"""A model from a path or hub id, for the policy and for references alike.

Weights are read with `from_pretrained`, from safetensors. Code that ships with a model runs only where
`trust_remote_code` allows it. A path with an `adapter_config.json` is loaded as a PEFT model.
"""

import difflib
import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from huggingface_hub.errors import HFValidationError
from peft import AutoPeftModelForCausalLM
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

from holdfast.data.progress import bars
from holdfast.internals.transformers import has_file

logger = logging.getLogger(__name__)


class PolicyOptions(Protocol):
    """The options of a run (`DPOConfig`) that say how its models are loaded and made ready."""

    model_init_kwargs: dict[str, Any] | str | None
    trust_remote_code: bool
    model_adapter_name: str | None
    gradient_checkpointing: bool
    disable_dropout: bool
    disable_tqdm: bool | None


def load_model(
    path: str, init_kwargs: Mapping[str, Any] | str | None, *, args: PolicyOptions, is_trainable: bool
) -> nn.Module:
    """The causal language model of a local folder or hub id, in fp32 unless `dtype` says otherwise. ValueError where
    there is none."""
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **init_mapping(init_kwargs, path)}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        dtype = getattr(torch, kwargs["dtype"].removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"dtype={kwargs['dtype']!r} was asked for in loading {path!r}; use 'auto', 'float32', 'bfloat16' or "
                "'float16'."
            )
        kwargs["dtype"] = dtype
    try:
        with bars(are_shown=not args.disable_tqdm):
            if _is_adapter(path, kwargs):
                return AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=is_trainable, **kwargs)
            return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        is_elsewhere = isinstance(error, OSError | HFValidationError)
        if not is_elsewhere and not (os.path.isdir(path) and "Unrecognized model" in str(error)):
            raise
        raise ValueError(_why_not_loaded(path, kwargs, is_trainable, str(error))) from error


def _why_not_loaded(path: str, kwargs: Mapping[str, Any], is_trainable: bool, error: str) -> str:
    location = {key: kwargs[key] for key in ("revision", "subfolder") if key in kwargs}
    option = "model" if is_trainable else "ref_model"
    request = f"{option}={path!r}{f' with {location}' if location else ''} was to be loaded"
    reason = error.strip().splitlines()[0].rstrip(".")
    if os.path.isdir(path):
        return (
            f"{request}, a folder that cannot be read as a model: {reason}. It holds {sorted(os.listdir(path))[:6]}. "
            "Name a folder that "
            "`save_pretrained` wrote, with config.json and weights or with adapter_config.json."
        )
    parent, name = os.path.split(path.rstrip("/"))
    beside = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    near = [os.path.join(parent, other) for other in difflib.get_close_matches(name, beside, n=1)]
    return (
        f"{request}, but there is no such folder, and as a hub id it cannot be read either: {reason}. "
        f"{f'Did you mean {near[0]!r}? ' if near else ''}Name a local folder, or a model on the hub that this machine "
        "can reach and read."
    )


def init_mapping(init_kwargs: Mapping[str, Any] | str | None, path: str) -> Mapping[str, Any]:
    """The keyword arguments of `from_pretrained`; none for None. ValueError where they are a string."""
    if isinstance(init_kwargs, str):
        raise ValueError(
            f"Keyword arguments for loading {path!r} were given as the string {init_kwargs!r}. Pass a mapping, or JSON."
        )
    return init_kwargs or {}


def _is_adapter(path: str, kwargs: Mapping[str, Any]) -> bool:
    location = {key: kwargs[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in kwargs}
    return has_file(path, ADAPTER_CONFIG_NAME, **location)


def load_policy(model: str | nn.Module, args: PolicyOptions, quantization_config: Any) -> nn.Module:
    """The policy: `model` itself, or loaded from the path or hub id that it names."""
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
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
    kwargs: dict[str, Any] = dict(init_mapping(args.model_init_kwargs, model))
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "`quantization_config` is set both as an argument of the trainer and in `model_init_kwargs`. "
                "Keep one of them."
            )
        kwargs["quantization_config"] = quantization_config
    return load_model(model, kwargs, args=args, is_trainable=True)
