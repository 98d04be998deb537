"""One of two models that are compared: where it lies, how it is loaded, and what is known of it before it computes.

It is loaded by the function that loads a run's policy and references, so in fp32 unless another dtype is asked for.
"""

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers import PreTrainedTokenizerBase

from holdfast.internals.transformers import attention_of, has_file, loaded_from
from holdfast.policy.load import load_model
from holdfast.policy.quantised import is_quantised, pin_quantised_layers
from holdfast.policy.tokenizer import read_tokenizer
from holdfast.scoring.causal_lm import unwrap, vocabulary_size

BASE = "__base__"
"""In place of a reference: the base of the model's adapter. A run's `ref_adapter_name` has the same name for it."""

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_MAX_HEADER = 100_000_000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a model lies: a local folder or hub id, of a hub id also the revision."""

    path: str
    revision: str | None = None

    def location(self) -> dict[str, str]:
        """The keyword arguments of `from_pretrained` beside the path."""
        return {} if self.revision is None else {"revision": self.revision}


@final
@dataclass(slots=True, kw_only=True)
class Loading:
    """How both models are loaded: the options of a run that loading reads, and the `dtype` of the weights."""

    dtype: str = "float32"
    trust_remote_code: bool = False
    disable_tqdm: bool | None = None
    model_init_kwargs: dict[str, Any] | str | None = None
    model_adapter_name: str | None = None
    gradient_checkpointing: bool = False
    disable_dropout: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a model without computing with it.

    `stored` counts the values in its local files by dtype, as safetensors names them; empty for a hub id. `adapter`
    describes its active adapter, and `adapter_base` is the base that the adapter names. `quantisation` describes
    weights that are stored as integers. `tied` are the groups of names that are one tensor.
    """

    path: str
    revision: str | None
    kind: str
    num_parameters: int
    num_embeddings: int
    dtype: str
    stored: Mapping[str, int]
    attention: str
    adapter: str | None
    adapter_base: str | None
    quantisation: str | None
    tied: tuple[tuple[str, ...], ...]
    tokenizer: str | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A loaded model, its tokenizer (None where there is none), and what is known of it."""

    label: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    facts: Facts
    peft: PeftModel | None = field(default=None)


def load_side(label: str, place: Place, loading: Loading) -> Side:
    """The model at a place, in eval mode. ValueError where it cannot be loaded, or is no causal language model."""
    _check_revision(place)
    kwargs = {"dtype": loading.dtype, **place.location()}
    model = load_model(place.path, kwargs, args=loading, is_trainable=label == "MODEL")
    model = pin_quantised_layers(model.eval()).requires_grad_(False)
    tokenizer = _tokenizer(place, model, loading)
    peft = model if isinstance(model, PeftModel) else None
    return Side(label=label, model=model, tokenizer=tokenizer, facts=_facts(place, model, tokenizer), peft=peft)


def place_of_base(place: Place) -> Place:
    """The place of the base that the adapter at `place` names. ValueError where no adapter is there."""
    if not has_file(place.path, ADAPTER_CONFIG_NAME, **place.location()):
        raise ValueError(
            f"--reference {BASE} is the base of the model's adapter, but {place.path!r} has no {ADAPTER_CONFIG_NAME}. "
            "Name an adapter's folder as the model, or a model as the reference."
        )
    config = PeftConfig.from_pretrained(place.path, **place.location())
    if not config.base_model_name_or_path:
        raise ValueError(
            f"--reference {BASE} is the base of the model's adapter, but {ADAPTER_CONFIG_NAME} in {place.path!r} names "
            "none (`base_model_name_or_path`). Write the base's folder or hub id there, or as the reference."
        )
    return Place(path=str(config.base_model_name_or_path), revision=config.revision)


def _check_revision(place: Place) -> None:
    if place.revision is not None and Path(place.path).is_dir():
        raise ValueError(
            f"the revision {place.revision!r} of {place.path!r} was asked for, which is a local folder and has none. "
            "Name a hub id, or leave the revision out."
        )


def _tokenizer(place: Place, model: nn.Module, loading: Loading) -> PreTrainedTokenizerBase | None:
    """The tokenizer at the place, or of an adapter without one its base's."""
    of_base = Place(path=loaded_from(unwrap(model).config))
    for each in (place, of_base):
        if each.path and any(has_file(each.path, name, **each.location()) for name in _TOKENIZER_FILES):
            return read_tokenizer(
                each.path,
                trust_remote_code=loading.trust_remote_code,
                advice="Mend that folder, or name another model.",
                **each.location(),
            )
    return None


def _facts(place: Place, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> Facts:
    causal_lm = unwrap(model)
    parameters = list(causal_lm.parameters())
    adapter, base = _adapter(model)
    return Facts(
        path=place.path,
        revision=place.revision,
        kind=type(causal_lm).__name__,
        num_parameters=sum(each.numel() for each in parameters),
        num_embeddings=vocabulary_size(causal_lm),
        dtype=", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in parameters})),
        stored=stored_dtypes(Path(place.path)),
        attention=str(attention_of(causal_lm.config)),
        adapter=adapter,
        adapter_base=base,
        quantisation=_quantisation(model, causal_lm),
        tied=_tied(causal_lm),
        tokenizer=None if tokenizer is None else f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
    )


def stored_dtypes(folder: Path) -> dict[str, int]:
    """The number of values in the safetensors files of a folder, by the name of their dtype, the most frequent first.
    Empty where it has none, or none that can be read."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        for name, entry in _header(path).items():
            if name != "__metadata__":
                counts[str(entry["dtype"])] += int(torch.Size(entry["shape"]).numel())
    return dict(counts.most_common())


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: eight bytes with its length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(min(length, _MAX_HEADER)))


def _adapter(model: nn.Module) -> tuple[str | None, str | None]:
    """The active adapter in words, and the base that it names."""
    if not isinstance(model, PeftModel):
        return None, None
    config: Any = model.peft_config[str(model.active_adapter)]
    words = [str(getattr(config.peft_type, "value", config.peft_type))]
    for name in ("r", "lora_alpha", "num_virtual_tokens"):
        words += [f"{name} {getattr(config, name)}"] if getattr(config, name, None) is not None else []
    words += [name for name in ("use_dora", "use_rslora") if getattr(config, name, False)]
    targets = getattr(config, "target_modules", None)
    if targets:
        words.append(f"on {targets if isinstance(targets, str) else ', '.join(sorted(targets))}")
    if saved := getattr(config, "modules_to_save", None):
        words.append(f"and whole copies of {', '.join(sorted(saved))}")
    base = config.base_model_name_or_path
    return " ".join(words), None if base is None else str(base)


def _quantisation(model: nn.Module, causal_lm: nn.Module) -> str | None:
    if not is_quantised(model):
        return None
    config: Any = getattr(causal_lm.config, "quantization_config", None)
    values: Any = config if isinstance(config, Mapping) else config.to_dict() if config is not None else {}
    method = values.get("quant_method", "integers")
    kind = values.get("bnb_4bit_quant_type") if values.get("load_in_4bit") else None
    bits = 4 if values.get("load_in_4bit") else 8 if values.get("load_in_8bit") else values.get("bits")
    words = [str(getattr(method, "value", method)), *([f"{bits} bit"] if bits else []), *([str(kind)] if kind else [])]
    return " ".join(words)


def _tied(causal_lm: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(sorted(group)) for group in names.values() if len(group) > 1)
