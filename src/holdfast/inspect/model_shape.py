"""A model without weights: made from its config on the device `meta`, where tensors have shapes and no values.

It answers what of a model the data depend on, in the same words as the model that is trained: how many embeddings there
are, and how many positions. Given up: what only a checkpoint's weights tell, such as embeddings of another number than
the config says. Loading them is an error of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from holdfast.internals.transformers import has_file
from holdfast.policy.load import PolicyOptions, init_mapping
from holdfast.policy.reading import reading
from holdfast.scoring.causal_lm import unwrap, vocabulary_size

_OF_WEIGHTS = ("dtype", "device_map", "attn_implementation", "quantization_config", "use_safetensors")
_LOCATION = ("revision", "subfolder", "token", "cache_dir")
_ADVICE = "Name a folder that `save_pretrained` wrote, or a model on the hub that this machine can reach and read."


def model_without_weights(path: str, args: PolicyOptions) -> nn.Module:
    """The model of the local folder or hub id that a run would train; of an adapter its base, with as many embeddings
    as loading the adapter gives it. ValueError where there is no config of a causal language model."""
    kwargs: dict[str, Any] = {**init_mapping(args.model_init_kwargs, path)}
    kwargs = {name: value for name, value in kwargs.items() if name not in _OF_WEIGHTS}
    location = {name: kwargs[name] for name in _LOCATION if name in kwargs}
    request = f"the config of model={path!r} was to be read,"
    with reading(request, path, noun="model", advice=_ADVICE, subfolder=location.get("subfolder")):
        if not has_file(path, ADAPTER_CONFIG_NAME, **location):
            return _of_config(path, kwargs, trusts=args.trust_remote_code)
        adapter = PeftConfig.from_pretrained(path, **location)
        base = _of_config(str(adapter.base_model_name_or_path), _revision(adapter), trusts=args.trust_remote_code)
        if has_file(path, "tokenizer_config.json", **location):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code, **location)
            if len(tokenizer) > vocabulary_size(unwrap(base)):
                base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return base


def _revision(adapter: PeftConfig) -> dict[str, Any]:
    return {} if adapter.revision is None else {"revision": adapter.revision}


def _of_config(path: str, kwargs: Mapping[str, Any], *, trusts: bool) -> Any:
    config, _ = AutoConfig.from_pretrained(path, trust_remote_code=trusts, return_unused_kwargs=True, **kwargs)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusts)
