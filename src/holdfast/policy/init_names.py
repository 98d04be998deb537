"""Older names among the keyword arguments of `from_pretrained`: taken by their present name, or refused.

Scripts of some years pass names that transformers has renamed, moved into a config, or dropped. It ignores some of them
and answers others with an error about a model's constructor. Here each is right or one message. Given up: names that
only a model's own code knows, which transformers passes on.
"""

from collections.abc import Mapping
from typing import Any

import torch

_RENAMED: Mapping[str, str] = {"torch_dtype": "dtype", "use_auth_token": "token"}

_BITS = "pass quantization_config=BitsAndBytesConfig(...) with it, to the trainer or here"
_WEIGHTS = "convert the weights to safetensors first"
_INSTEAD: Mapping[str, str] = {
    "load_in_4bit": _BITS,
    "load_in_8bit": _BITS,
    "use_flash_attention_2": "write attn_implementation='flash_attention_2'",
    "from_tf": _WEIGHTS,
    "from_flax": _WEIGHTS,
    "fp16": "write dtype='float16'",
    "bf16": "write dtype='bfloat16'",
    "device": "write device_map",
    "mirror": "set HF_ENDPOINT in the environment",
    "offload_state_dict": "leave it out: tensors are read one by one",
    "state_dict": "load the weights into a model, and pass that",
    "output_loading_info": "leave it out: missing weights are an error",
}
"""What to do instead of an older or unusable name. False and None ask for nothing and are dropped."""

_PREFIXES: Mapping[str, str] = {"bnb_4bit_": _BITS, "llm_int8_": _BITS}
_WITHOUT_EFFECT = ("_fast_init", "resume_download")
"""Names that change no weight: loading always does what they once asked for."""


def present_names(init_kwargs: Mapping[str, Any], option: str) -> dict[str, Any]:
    """The keyword arguments under the names that transformers has for them now. `option` names them in messages.

    ValueError where one asks for something that would be ignored, and where an older and a present name disagree.
    """
    kwargs: dict[str, Any] = {}
    for name, value in init_kwargs.items():
        if name in _WITHOUT_EFFECT or name in _RENAMED:
            continue
        instead = _INSTEAD.get(name) or next((way for start, way in _PREFIXES.items() if name.startswith(start)), None)
        if instead is None:
            kwargs[name] = value
        elif value is not None and value is not False:
            raise ValueError(f"{option} has {name}={value!r}, which would not be heeded; {instead}.")
    for old, name in _RENAMED.items():
        value = init_kwargs.get(old)
        if value is None:
            continue
        if kwargs.get(name) is not None and _plain(kwargs[name]) != _plain(value):
            raise ValueError(
                f"{option} has {name}={_shown(name, kwargs[name])} and its older name {old}={_shown(name, value)}. "
                f"Keep {name}."
            )
        kwargs[name] = value
    return kwargs


def _plain(value: Any) -> Any:
    """A dtype by its name, in whichever form it is written."""
    text = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else value
    dtype = getattr(torch, text, None) if isinstance(text, str) else None
    return dtype if isinstance(dtype, torch.dtype) else text


def _shown(name: str, value: Any) -> str:
    return "(not shown)" if name == "token" else repr(value)
