"""Which reference it is: everything that its log-probs depend on beside the token ids, and nothing else.

Tensors (parameters and buffers) are in it by digest and settings by value, both under the names of the bare model (see
`identity.contents`). The store's key, a checkpoint's provenance and the audit's list of suspects are made from it. A
setting counts unless it is known to change no number. So a setting that nobody thought of costs a recomputation, never
a stale number. Nothing of the run is in it: no learning rate, loss, beta, seed, data or order of the data. Nor is the
number of syncs of a moving reference, since its weights say where it is.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import nn
from transformers import PretrainedConfig

from holdfast.internals.transformers import attention_of, loaded_from
from holdfast.policy.half_weights import as_loaded
from holdfast.policy.rotations import has_moving_rotations
from holdfast.policy.sharding import give_back
from holdfast.reference.identity.contents import module_contents
from holdfast.reference.identity.digests import tensor_digests
from holdfast.scoring.precision import fp32_products
from holdfast.store.key import StoreKey

_ENTRIES_WITHOUT_EFFECT = {
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "model_type", "dtype",
    "torch_dtype", "use_cache", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "bos_token_id",
    "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tie_word_embeddings",
    "initializer_range", "initializer_factor", "init_std", "chunk_size_feed_forward", "is_encoder_decoder",
    "task_specific_params", "tokenizer_class", "prefix", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "distributed_config", "base_model_tp_plan", "base_model_pp_plan", "pretraining_tp",
    "router_jitter_noise", "gradient_checkpointing",
}  # fmt: skip
"""Entries of a config that change no log-prob in eval mode, or that say what the tensors and modules say already."""
_CLASSIFIER_ENTRIES = {
    f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
}
_LAYER_TYPE_SOURCES = {"use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
"""Entries from which transformers makes `layer_types`. They change nothing once a config has `layer_types`."""
_ROW_LENGTHS = {
    "max_position_embeddings",
    "original_max_position_embeddings",
    "n_positions",
    "n_ctx",
    "seq_length",
    "max_sequence_length",
}
"""Entries that say for how long rows a model is meant. They change a number only where rotary embeddings read them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What log-probs depend on.

    `tensors` has dtype, shape and digest of each tensor, by its name in the bare model. `settings` are by dotted name.
    `attention` and `dtype` say which kinds of attention and which dtypes are in use. `description` is for people and
    counts for nothing.
    """

    tensors: Mapping[str, str]
    settings: Mapping[str, Any]
    attention: str
    dtype: str
    description: str = ""

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """The identity of what `module` computes now, with the values and active adapters of this moment. Nothing of it
        may be on the meta device. Where its weights are spread over processes, it is the identity that they have in one
        process, and collective."""
        give_back(module)
        as_loaded(module)
        contents = list(module_contents(module))
        tensors = {name: tensor for own in contents for name, tensor in own.tensors.items()}
        configs = list(_distinct_configs((own.path, own.config) for own in contents))
        settings = {f"{own.path}.{name}": value for own in contents for name, value in own.settings.items()}
        settings |= _entries(configs, module)
        root: Any = configs[0][1] if configs else None
        return cls(
            tensors=tensor_digests(tensors),
            settings=_as_json(settings),
            attention=" ".join(dict.fromkeys(str(attention_of(c)) for _, c in configs)),
            dtype=" ".join(sorted({str(t.dtype) for t in tensors.values() if t.is_floating_point()})),
            description=str(loaded_from(root) or type(module).__name__),
        )

    @classmethod
    def mixture(cls, identities: Sequence[Self], shares: Sequence[float]) -> Self:
        """The identity of several references whose log-probs are mixed with `shares`, in order."""
        tensors = {f"{i}:{name}": value for i, one in enumerate(identities) for name, value in one.tensors.items()}
        settings = {f"{i}:{name}": value for i, one in enumerate(identities) for name, value in one.settings.items()}
        return cls(
            tensors=tensors,
            settings=settings | {f"{i}:weight": repr(float(share)) for i, share in enumerate(shares)},
            attention=" ".join(one.attention for one in identities),
            dtype=" ".join(sorted({dtype for one in identities for dtype in one.dtype.split()})),
            description=" + ".join(one.description for one in identities),
        )

    @property
    def weights_digest(self) -> str:
        """Digest of the tensors, and of the shares of a mixture."""
        shares = {name: value for name, value in self.settings.items() if name.endswith(":weight")}
        return _digest([dict(self.tensors), shares])

    @property
    def config_digest(self) -> str:
        """Digest of the settings."""
        return _digest(dict(self.settings))

    def differing_from(self, other: Self) -> list[str]:
        """The names of the tensors, then of the settings, that differ."""
        names: list[str] = []
        for ours, theirs in ((self.tensors, other.tensors), (self.settings, other.settings)):
            names += [name for name in dict.fromkeys((*ours, *theirs)) if ours.get(name) != theirs.get(name)]
        return names


def config_settings(module: nn.Module) -> dict[str, Any]:
    """The entries of the configs in `module` that may change a log-prob, by dotted name, as JSON has them."""
    configs = ((path, getattr(child, "config", None)) for path, child in module.named_modules())
    found = ((path, config) for path, config in configs if isinstance(config, PretrainedConfig))
    return _as_json(_entries(_distinct_configs(found), module))


def numerics(identity: Identity, *, device: torch.device, mixed_precision: str, layout: str) -> dict[str, Any]:
    """What decides how a forward pass rounds: dtypes, autocast, layout, attention, and the kind of device."""
    return {
        "dtype": identity.dtype,
        "autocast": mixed_precision,
        "layout": layout,
        "attention": identity.attention,
        "device": device.type,
        "tf32": device.type != "cpu" and fp32_products(device) != "ieee",
    }


def store_key(identity: Identity, numerics: Mapping[str, Any], version: int | None) -> StoreKey:
    """The key of the store that holds the reference's log-probs. `version` only says which run may remove the store."""
    return StoreKey(
        weights_digest=identity.weights_digest,
        config_digest=identity.config_digest,
        numerics=numerics,
        version=version,
        description=identity.description,
    )


def _entries(configs: Iterable[tuple[str, Any]], module: nn.Module) -> dict[str, Any]:
    """The entries of the configs of `module`, by path, that may change a log-prob."""
    is_moving = any(has_moving_rotations(child) for child in module.modules())
    entries: dict[str, Any] = {}
    for path, config in configs:
        entries |= _by_dotted_name(f"{path}.config", _without(config.to_dict(), _ignored(config, is_moving)))
    return entries


def _distinct_configs(configs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Each config once, under the path of the first module that has it."""
    seen: set[int] = set()
    for path, config in configs:
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield path, config


def _ignored(config: Any, has_moving_rotations: bool) -> set[str]:
    """The names of the entries of a config that change no number."""
    ignored = _ENTRIES_WITHOUT_EFFECT | _CLASSIFIER_ENTRIES
    ignored |= set() if has_moving_rotations else _ROW_LENGTHS
    return ignored | _LAYER_TYPE_SOURCES if getattr(config, "layer_types", None) else ignored


def _without(config: Any, names: set[str]) -> Any:
    """The nested `config` without the entries `names`, without entries about dropout, and without those that are None.
    Anything but a mapping is returned as it is."""
    if not isinstance(config, Mapping):
        return config
    entries = {key: value for key, value in config.items() if key not in names and value is not None}
    return {key: _without(value, names) for key, value in entries.items() if "drop" not in str(key)}


def _by_dotted_name(path: str, config: Mapping[Any, Any]) -> dict[str, Any]:
    """The nested `config` as one mapping, with dotted names that begin with `path`."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{path}.{key}"
        settings |= _by_dotted_name(name, value) if isinstance(value, Mapping) else {name: value}
    return settings


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON reads them again: tuples are lists, keys are texts."""
    return json.loads(json.dumps(settings, sort_keys=True, default=_as_text))


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=_as_text)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _as_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
