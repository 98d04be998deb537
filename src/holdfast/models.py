"""From what users hand in to a policy that can train: loading, adapters, tokenizer, dropout.

Weights are read with `from_pretrained` (safetensors), code of other people's only when asked. A path with an
`adapter_config.json` is loaded as a PEFT model.
"""

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from huggingface_hub.errors import HFValidationError
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftType, get_peft_model, prepare_model_for_kbit_training
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from holdfast.adapters import check_policy_adapters
from holdfast.config import DPOConfig
from holdfast.internals.peft import activate
from holdfast.internals.torch import dropout_class
from holdfast.internals.transformers import has_file, loaded_from
from holdfast.logprobs import unwrap
from holdfast.reference.mixture import check_mixture, mixture_weights
from holdfast.reference.model import is_quantised, pin_quantised_layers
from holdfast.reference.named import check_adapter
from holdfast.reference.sync import is_adapted

logger = logging.getLogger(__name__)


RefModel = str | os.PathLike[str] | nn.Module | None
"""A reference as it is handed in: a module, a path or hub id, or None for the policy as it starts to train."""


def load_model(
    path: str, init_kwargs: Mapping[str, Any] | str | None, *, args: DPOConfig, is_trainable: bool
) -> nn.Module:
    """The causal language model at a local folder or of a hub id; fp32 unless `dtype` says otherwise. ValueError where
    there is none."""
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **_mapping(init_kwargs, path)}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        dtype = getattr(torch, kwargs["dtype"].removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"dtype={kwargs['dtype']!r} was asked for in loading {path!r}; use 'auto', 'float32', 'bfloat16' or "
                "'float16'."
            )
        kwargs["dtype"] = dtype
    try:
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
    asked = f"{option}={path!r}{f' with {location}' if location else ''} was to be loaded"
    reason = error.strip().splitlines()[0].rstrip(".")
    if os.path.isdir(path):
        return (
            f"{asked}, a folder that cannot be read as a model: {reason}. It holds {sorted(os.listdir(path))[:6]}. "
            "Name a folder that "
            "`save_pretrained` wrote, with config.json and weights or with adapter_config.json."
        )
    parent, name = os.path.split(path.rstrip("/"))
    beside = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    near = [os.path.join(parent, other) for other in difflib.get_close_matches(name, beside, n=1)]
    return (
        f"{asked}, but there is no such folder, and as a hub id it cannot be read either: {reason}. "
        f"{f'Did you mean {near[0]!r}? ' if near else ''}Name a local folder, or a model on the hub that this machine "
        "can reach and read."
    )


def _mapping(init_kwargs: Mapping[str, Any] | str | None, path: str) -> Mapping[str, Any]:
    if isinstance(init_kwargs, str):
        raise ValueError(
            f"Keyword arguments for loading {path!r} were given as the string {init_kwargs!r}. Pass a mapping, or JSON."
        )
    return init_kwargs or {}


def _is_adapter(path: str, kwargs: Mapping[str, Any]) -> bool:
    location = {key: kwargs[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in kwargs}
    return has_file(path, ADAPTER_CONFIG_NAME, **location)


def load_policy(model: str | nn.Module, args: DPOConfig, quantization_config: Any) -> nn.Module:
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
    policy = load_policy(model, args, quantization_config)
    _check_not_repacked(policy)
    check_policy_adapters(policy)
    policy = with_adapter(pin_quantised_layers(policy), peft_config, args.model_adapter_name)
    check_policy_adapters(policy)
    if is_adapted(policy) and args.gradient_checkpointing:
        _check_recomputable(policy)
        unwrap(policy).enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout(policy)
    return policy


def _check_not_repacked(policy: nn.Module) -> None:
    for name, parameter in policy.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The policy's `{name}` was repacked for inference, since the model ran on this CPU in eval mode; no "
                "gradient would pass through it. Load the model again, and pass it before it runs."
            )


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
    codes = [name for name in unlike if not tensors[name].is_floating_point()]
    if codes:  # their scales are no tensors of the module
        raise ValueError(
            f"{type(module).__name__} is quantised, and its processes loaded different weights: `{codes[0]}` first of "
            f"{len(codes)}. Load the same files with the same quantization_config in all of them."
        )
    for name in unlike:
        tensors[name].copy_(broadcast(tensors[name].contiguous()))
    return unlike


def ref_model_entries(ref_model: RefModel | Sequence[RefModel]) -> list[RefModel]:
    """The references that were handed in, one or several; `[None]` where the policy is its own."""
    return list(ref_model) if isinstance(ref_model, list | tuple) else [cast(RefModel, ref_model)]


def check_ref_models(ref_model: RefModel | Sequence[RefModel], args: DPOConfig) -> None:
    """ValueError or TypeError, before anything is loaded, where these cannot be the references of a run of `args`."""
    entries = ref_model_entries(ref_model)
    for entry in entries:
        if not isinstance(entry, str | os.PathLike | nn.Module | None):
            raise TypeError(
                f"`ref_model` is or holds a {type(entry).__name__}; pass a model, its path or hub id, None for the "
                "policy as it starts to train, or a list of these."
            )
    if not entries or sum(entry is None for entry in entries) > 1:
        raise ValueError(
            f"`ref_model` is a list of {len(entries)} references, {sum(entry is None for entry in entries)} of them "
            "None. Name at least one reference, and None (the policy as it starts to train) once, with the weight that "
            "it shall have."
        )
    if args.ref_model_init_kwargs is not None and not any(isinstance(entry, str | os.PathLike) for entry in entries):
        kinds = ", ".join(type(entry).__name__ for entry in entries)
        raise ValueError(
            f"`ref_model_init_kwargs` says how to load a reference, but `ref_model` is {kinds}, not a path, so it "
            "would be ignored. Pass a path, or drop it."
        )
    if args.ref_model_weights is not None and not isinstance(ref_model, list | tuple):
        raise ValueError(
            f"ref_model_weights={args.ref_model_weights} was asked for, but `ref_model` is one "
            f"{type(ref_model).__name__}, so there is nothing to weight. Pass a list of references, or drop it."
        )
    mixture_weights(args.ref_model_weights, len(entries))
    if len(entries) == 1:
        return
    check_mixture(args.loss_types, args.loss_options, args.ld_alpha)
    if args.sync_ref_model:
        raise ValueError(
            f"sync_ref_model=True was asked for with {len(entries)} references, which are mixed by their log-probs: "
            "there are no weights to mix with the policy's. Use a single `ref_model`, or sync_ref_model=False."
        )


def load_ref_models(ref_model: RefModel | Sequence[RefModel], args: DPOConfig) -> list[nn.Module | None]:
    """The reference modules that a user chose, loaded where a path or hub id was given; `ref_model_init_kwargs` are for
    each of those. None stands for the policy as it starts to train."""
    return [_load_ref_model(entry, args) for entry in ref_model_entries(ref_model)]


def _load_ref_model(ref_model: RefModel, args: DPOConfig) -> nn.Module | None:
    if ref_model is None or isinstance(ref_model, nn.Module):
        return ref_model
    path = os.fspath(ref_model)
    init_kwargs = args.ref_model_init_kwargs
    if init_kwargs is None:  # the policy's, less what says where the policy is
        given = _mapping(args.model_init_kwargs, path)
        init_kwargs = {name: value for name, value in given.items() if name not in ("revision", "subfolder")}
    module: Any = load_model(path, init_kwargs, args=args, is_trainable=False)
    if _mapping(init_kwargs, path).get("device_map") is not None and not getattr(module, "hf_device_map", None):
        # transformers records a map of several devices only; `placed` would move a model that was put on one.
        module.hf_device_map = {"": str(next(module.parameters()).device)}
    return module


def with_adapter(policy: nn.Module, peft_config: PeftConfig | None, name: str | None = None) -> nn.Module:
    """`policy` with a fresh adapter where a `peft_config` was given; with `name`, that is its name, or that of the
    adapter it carries that is to train.

    A quantised model is prepared for it as peft does: what of it is in 16 bits (norms, embeddings, head) becomes fp32.
    A plain model of which every weight is frozen trains whole, and a line says so. ValueError if `policy` carries an
    adapter already, if nothing of its adapters would train, or if it is quantised and has none.
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


def load_tokenizer(processing_class: Any, policy: nn.Module, args: DPOConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """The processing class as handed in or loaded from the policy's own path, and its tokenizer."""
    if processing_class is None:
        path = loaded_from(policy.config)
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


def placed_alike(modules: Sequence[nn.Module | None], device: torch.device) -> list[nn.Module | None]:
    """The reference modules on `device` (see `placed`), with the same values in all processes."""
    on_device = [None if module is None else placed(module, device) for module in modules]
    for module in on_device:
        if module is not None:
            same_on_all_processes(module)
    return on_device


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
        if isinstance(part, dropout_class()):
            vars(part)["p"] = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or name == "layerdrop"):
                setattr(part, name, 0.0)


def default_output_dir(model: str | nn.Module) -> str:
    """`<model name>-DPO`, for a run without a config."""
    path = model if isinstance(model, str) else loaded_from(model.config)
    return f"{os.path.basename(path.rstrip('/')) or 'model'}-DPO"
