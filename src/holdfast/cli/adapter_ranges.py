"""The ranges of an adapter's fields that peft does not check, for every kind of adapter that has the field.

peft takes a rank of -4 or a dropout of 7, and fails once the model is loaded, or trains something else. Two rules hold
for every number: it is finite, and not negative unless its default is. `RULES` adds what single fields need. Given up:
fields that depend on the model, such as a rank that must divide its width. peft checks those when it builds the
adapter.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, final, get_args

from holdfast.cli.text import shortened
from holdfast.cli.yaml_document import Document, field_hints

MAX_COUNT = 1_000_000
"""No rank, layer or number of tokens of a model is larger; a seed may be."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A demand on the fields whose names `pattern` matches in full. `holds(value, default)` is asked of values that are
    not None."""

    pattern: str
    demand: str
    holds: Callable[[Any, Any], bool]


def _is_count(value: Any, default: Any) -> bool:
    """Where the default is 0, 0 says that the field is not used."""
    return _is_number(value) and min(1, default if _is_number(default) else 1) <= value <= MAX_COUNT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_regex(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError, TypeError):
        return False
    return True


def _names_modules(value: Any, default: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and _is_regex(value)
    return all(isinstance(name, str) and name.strip() for name in value)


def _are_layers(value: Any, default: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return bool(layers) and all(_is_number(layer) and 0 <= layer <= MAX_COUNT for layer in layers)


def _are_patterns(value: Any, default: Any) -> bool:
    return all(_is_regex(name) and _is_number(item) and 0 < item <= MAX_COUNT for name, item in value.items())


RULES = (
    Rule(pattern=r"(init_|target_|mini_)?r|rank|num_virtual_tokens", demand="from 1 to a million", holds=_is_count),
    Rule(
        pattern=r"adapter_len|adapter_layers|num_(layers|attention_heads|tasks|ranks|transformer_submodules|vectors|subspaces|B)"
        r"|token_dim|encoder_num_layers|(\w+_)?(hidden|intermediate)_size|shadow_num_\w+|(\w+_)?block_size|n_frequency|vector_length|topk|deltaT"
        r"|qalora_group_size|group_size|total_step|depth|gralora_k|u|n_(tasks|skills|splits)|subspace_rank",
        demand="from 1 to a million",
        holds=_is_count,
    ),
    Rule(
        pattern=r"(\w+_)?dropout(_p)?",
        demand="at least 0 and below 1, the share that is dropped",
        holds=lambda value, default: _is_number(value) and 0 <= value < 1,
    ),
    Rule(
        pattern=r"(lora_|randlora_|psoft_|shadow_)?alpha|delora_lambda|scaling",
        demand="above 0 and at most a million: at 0 the adapter would change nothing",
        holds=lambda value, default: _is_number(value) and 0 < value <= MAX_COUNT,
    ),
    Rule(
        pattern=r"beta[12]",
        demand="at least 0 and below 1",
        holds=lambda value, default: _is_number(value) and 0 <= value < 1,
    ),
    Rule(
        pattern=r"(target|exclude|feedforward)_modules|modules_to_save|target_parameters|layers_pattern",
        demand="names of modules, or one regular expression",
        holds=_names_modules,
    ),
    Rule(pattern=r"layers_to_transform", demand="numbers of layers, counted from 0", holds=_are_layers),
    Rule(
        pattern=r"(rank|alpha|lambda|block_size|n_frequency)_pattern",
        demand="a mapping of regular expressions to numbers from 1 to a million",
        holds=_are_patterns,
    ),
    Rule(
        pattern=r"inference_mode",
        demand="left out, since an adapter in inference mode does not train",
        holds=lambda value, default: value is False,
    ),
    Rule(
        pattern=r"bias",
        demand="none, all, or the kind of adapter with _only",
        holds=lambda value, default: re.fullmatch(r"none|all|\w+_only", value) is not None,
    ),
    Rule(
        pattern=r"auto_mapping|base_model_name_or_path|peft_version",
        demand="left out, since peft writes it",
        holds=lambda value, default: False,
    ),
    Rule(
        pattern=r"task_type",
        demand="CAUSAL_LM, the kind of model that is trained on preference pairs",
        holds=lambda value, default: value == "CAUSAL_LM",
    ),
)


def check_adapter(document: Document, config: type, values: dict[str, Any]) -> None:
    """RunFileError where one of the `values` of a peft config of the class `config` is out of range."""
    defaults: dict[str, Any] = {
        field.name: None if field.default is MISSING else field.default for field in fields(config)
    }
    hints = field_hints(config)
    for name, value in values.items():
        if value is None and name != "task_type":
            continue
        if (choices := _choices(hints[name])) and value not in choices:
            raise _refusal(document, name, value, " or ".join(choices))
        for rule in RULES:
            if re.fullmatch(rule.pattern, name) and not rule.holds(value, defaults[name]):
                raise _refusal(document, name, value, rule.demand)
        lowest = min(0, defaults[name]) if _is_number(defaults[name]) else 0
        for number in _numbers(value):
            highest = MAX_COUNT if isinstance(number, float) else math.inf
            if not (math.isfinite(number) and lowest <= number <= highest):
                raise _refusal(document, name, value, f"finite, at least {lowest} and at most a million")
    if values.get("target_modules") == [] and not values.get("target_parameters"):
        raise _refusal(document, "target_modules", [], "names of modules; without any, nothing would train")


def _choices(hint: Any) -> list[str]:
    """The values of the enumeration among the types of a field; none where there is none, or where `RULES` has one."""
    kinds = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    return [str(member.value) for kind in kinds if kind.__name__ != "TaskType" for member in kind]


def _refusal(document: Document, name: str, value: Any, demand: str) -> Exception:
    return document.error(f"peft.{name}", f"`peft.{name}` must be {demand}; found {shortened(repr(value))}.")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, also those inside of mappings and lists, and those that a nested config sets."""
    if is_dataclass(value):
        value = {field.name: item for field in fields(value) if (item := getattr(value, field.name)) != field.default}
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif _is_number(value):
        yield value
