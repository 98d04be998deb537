"""A model from a path or hub id, for the policy and for references alike.

Weights are read with `from_pretrained`, from safetensors. Code that ships with a model runs only where
`trust_remote_code` allows it. A path with an `adapter_config.json` is loaded as a PEFT model.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from peft import PeftConfig, PeftModelForCausalLM, TaskType
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.data.progress import bars
from holdfast.internals.transformers import has_file
from holdfast.peers.phase import doing
from holdfast.policy.init_names import present_names
from holdfast.policy.reading import reading
from holdfast.policy.sharding import shape_of

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
    there is none, where its files are damaged, or where they lack some of its weights."""
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **init_mapping(init_kwargs, path)}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        dtype = getattr(torch, kwargs["dtype"].removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"dtype={kwargs['dtype']!r} was asked for in loading {path!r}; use 'auto', 'float32', 'bfloat16' or "
                "'float16'."
            )
        kwargs["dtype"] = dtype
    option = "model" if is_trainable else "ref_model"
    where = {key: kwargs[key] for key in ("revision", "subfolder") if key in kwargs}
    request = f"{option}={path!r}{f' with {where}' if where else ''} was to be loaded,"
    subfolder = where.get("subfolder")
    with (
        doing(f"loading {'the model' if is_trainable else 'a reference model'}", is_long=True),
        reading(request, path, noun="model", advice=_ADVICE, hub_advice=_HUB_ADVICE, subfolder=subfolder),
        bars(are_shown=not args.disable_tqdm),
    ):
        if _is_adapter(path, kwargs):
            return _load_adapter(option, path, kwargs, is_trainable=is_trainable)
        return _load_whole(option, path, kwargs)


_ADVICE = (
    "Name a folder that `save_pretrained` wrote, with config.json and weights or with adapter_config.json; copy or "
    "save it again where a file is damaged."
)

_HUB_ADVICE = "Name a local folder, or a model on the hub that this machine can reach and read."


def _load_whole(option: str, path: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model without adapters at `path`. ValueError where its files lack weights, or have some of other shapes:
    transformers would draw them at random."""
    info: dict[str, Any]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, **{**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    )
    model, info = loaded
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wrong = [f"{name} ({list(found)}, not {list(asked)})" for name, found, asked in sorted(info["mismatched_keys"])]
    missing = wrong or sorted(set(info["missing_keys"]) & names)
    if missing:
        how = "of other shapes than its config says" if wrong else "missing"
        raise ValueError(
            f"{option}={path!r} was loaded as a {type(model).__name__}, and {len(missing)} of its {len(names)} weights "
            f"are {how}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. They would be random. Name a "
            "whole causal language model: its config.json and its weights must be of the same model."
        )
    if type(model).__module__.startswith("transformers_modules."):
        logger.warning("%s=%r: code that ships with it was run, as trust_remote_code allows.", option, path)
    return model


def _load_adapter(option: str, path: str, kwargs: Mapping[str, Any], *, is_trainable: bool) -> nn.Module:
    """The adapter at `path` around its base, as `AutoPeftModelForCausalLM` makes it. ValueError where the base or the
    adapter lacks weights, or where the adapter is of another task."""
    of_adapter = {name: value for name, value in kwargs.items() if name != "revision"}
    revision = kwargs.get("revision")
    peft_config = PeftConfig.from_pretrained(path, revision=revision, **of_adapter)
    base = peft_config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{option}={path!r} is an adapter whose adapter_config.json names no base (`base_model_name_or_path`: "
            f"{base!r}). Write the base's folder or hub id there."
        )
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"{option}={path!r} is an adapter for {peft_config.task_type}, not for a causal language model. Name "
            "another."
        )
    request = f"{option}={path!r} is an adapter, whose base {base!r} was to be loaded,"
    with reading(request, base, noun="model", advice=_ADVICE, hub_advice=_HUB_ADVICE):
        at_revision = {} if peft_config.revision is None else {"revision": peft_config.revision}
        model: Any = _load_whole(option, base, {**of_adapter, **at_revision})
    if has_file(path, "tokenizer_config.json", **_location(kwargs)):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, token=kwargs.get("token"), trust_remote_code=kwargs["trust_remote_code"]
        )
        if len(tokenizer) > shape_of(model.get_input_embeddings().weight)[0]:
            model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*missing adapter keys")
        return PeftModelForCausalLM.from_pretrained(
            model, path, is_trainable=is_trainable, revision=revision, **of_adapter
        )


def init_mapping(init_kwargs: Mapping[str, Any] | str | None, path: str) -> Mapping[str, Any]:
    """The keyword arguments of `from_pretrained`, under their present names; none for None. ValueError where they are
    a string, or have a name that would not be heeded."""
    if isinstance(init_kwargs, str):
        raise ValueError(
            f"Keyword arguments for loading {path!r} were given as the string {init_kwargs!r}. Pass a mapping, or JSON."
        )
    return present_names(init_kwargs or {}, f"what {path!r} is to be loaded with")


def _is_adapter(path: str, kwargs: Mapping[str, Any]) -> bool:
    return has_file(path, ADAPTER_CONFIG_NAME, **_location(kwargs))


def _location(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in kwargs}


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
