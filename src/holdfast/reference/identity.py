"""What a reference's log-probs depend on beside the token ids: the key under which they are stored.

Weights by digest, the model's config by digest, and the numerics of the forward pass. Of the config everything counts
but what is known to change no number, so that a setting nobody thought of costs a recomputation and never a stale
number. Nothing of the run is in it: not the learning rate, the loss, beta, the seed, the data or their order.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from holdfast.logprobs import unwrap
from holdfast.reference.base import Reference
from holdfast.reference.manifest import StoreKey
from holdfast.reference.mixture import MixtureReference

_OF_NO_ACCOUNT = {
    "_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "decoder_start_token_id", "tie_word_embeddings", "attention_dropout",
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "residual_dropout", "initializer_range",
    "chunk_size_feed_forward", "is_encoder_decoder", "task_specific_params", "tokenizer_class", "prefix",
}  # fmt: skip
_OF_ADAPTERS = {"base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "task_type", "peft_version"}


def store_key(
    weights: str, *, version: int | None, reference: Reference, policy: nn.Module, mixed_precision: str, layout: str
) -> StoreKey:
    """The key of what `reference`, whose weights have the digest `weights`, says in a run over `policy`."""
    configs = [_config(module) for module in _modules(reference, policy)]
    first = next(iter(_modules(reference, policy)))
    description = f"{getattr(unwrap(first).config, '_name_or_path', '') or type(unwrap(first)).__name__}"
    return StoreKey(
        weights=weights,
        config=_digest(configs),
        numerics={
            "dtype": " ".join(sorted({str(p.dtype) for module in _modules(reference, policy) for p in _few(module)})),
            "autocast": mixed_precision,
            "layout": layout,  # as much as rounding
            "attention": " ".join(_attention(module) for module in _modules(reference, policy)),
            "device": next(policy.parameters()).device.type,
            "tf32": torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest",
        },
        version=version,
        description=description,
    )


def _modules(reference: Reference, policy: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward passes the log-probs come from."""
    if isinstance(reference, MixtureReference):
        for part in reference.references:
            yield from _modules(part, policy)
    else:
        yield policy if reference.module is None else reference.module


def _few(module: nn.Module) -> Iterator[nn.Parameter]:
    seen: set[torch.dtype] = set()
    for parameter in module.parameters():
        if parameter.dtype not in seen:
            seen.add(parameter.dtype)
            yield parameter


def _attention(module: nn.Module) -> str:
    return str(getattr(unwrap(module).config, "_attn_implementation", None))


def _config(module: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = {"class": type(unwrap(module)).__name__, **unwrap(module).config.to_dict()}
    if isinstance(module, PeftModel):
        adapters = {name: module.peft_config[name].to_dict() for name in sorted(module.peft_config)}
        config["adapters"] = {name: _less(given, _OF_ADAPTERS) for name, given in adapters.items()}
    return _less(config, _OF_NO_ACCOUNT)


def _less(given: Any, names: set[str]) -> Any:
    """A nest of mappings without these names."""
    if isinstance(given, dict):
        return {key: _less(value, names) for key, value in given.items() if key not in names}
    return given


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=_as_text)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _as_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
