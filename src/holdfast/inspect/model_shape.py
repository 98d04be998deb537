"""A model without weights: made from its config on the device `meta`, where tensors have shapes and no values.

It answers what of a model the data depend on, in the same words as the model that is trained: how many embeddings there
are, and how many positions. Given up: what only a checkpoint's weights tell, such as embeddings of another number than
the config says. Loading them is an error of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from holdfast.internals.transformers import has_file
from holdfast.policy.load import PolicyOptions, init_mapping
from holdfast.policy.reading import reading
from holdfast.scoring.causal_lm import unwrap, vocabulary_size

_OF_WEIGHTS = ("dtype", "device_map", "attn_implementation", "quantization_config", "use_safetensors")
_LOCATION = ("revision", "subfolder", "token", "cache_dir")
_ADAPTER_CONFIG = "adapter_config.json"
_ADVICE = "Name a folder that `save_pretrained` wrote, or a model on the hub that this machine can reach and read."


def model_without_weights(path: str, args: PolicyOptions) -> nn.Module:
    """The model of the local folder or hub id that a run would train, of an adapter its base. ValueError where there is
    no config of a causal language model."""
    kwargs: dict[str, Any] = {**init_mapping(args.model_init_kwargs, path)}
    kwargs = {name: value for name, value in kwargs.items() if name not in _OF_WEIGHTS}
    location = {name: kwargs[name] for name in _LOCATION if name in kwargs}
    with reading(
        f"the config of model={path!r} was to be read,",
        path,
        noun="model",
        advice=_ADVICE,
        subfolder=location.get("subfolder"),
    ):
        if has_file(path, _ADAPTER_CONFIG, **location):
            adapter = PeftConfig.from_pretrained(path, **location)
            path, kwargs = str(adapter.base_model_name_or_path), {"revision": adapter.revision}
        return _of_config(path, kwargs, trusts=args.trust_remote_code)


def _of_config(path: str, kwargs: Mapping[str, Any], *, trusts: bool) -> nn.Module:
    config, _ = AutoConfig.from_pretrained(path, trust_remote_code=trusts, return_unused_kwargs=True, **kwargs)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusts)


def num_embeddings(model: nn.Module, path: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids the policy has embeddings for. An adapter's tokenizer may be larger than its base's
    embeddings, which are then resized."""
    number = vocabulary_size(unwrap(model))
    is_adapter = has_file(path, _ADAPTER_CONFIG)
    return max(number, len(tokenizer)) if is_adapter else number
