"""The options that are one of several names, or true or false: what each may be.

`transformers` compares some of them late (`log_level`, `report_to`), some never, and some with its enumerations, whose
error does not name the option. Here all are compared first, and the nearest name is given.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from accelerate.utils import DynamoBackend
from transformers.debug_utils import DebugOption
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from holdfast.losses.options import require_known, shown


def _values(names: Iterable[Enum]) -> tuple[str, ...]:
    return tuple(str(name.value) for name in names)


NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "optim": _values(OptimizerNames),
        "lr_scheduler_type": _values(SchedulerType),
        "eval_strategy": _values(IntervalStrategy),
        "logging_strategy": _values(IntervalStrategy),
        "save_strategy": _values(SaveStrategy),
        "hub_strategy": _values(HubStrategy),
        "include_num_input_tokens_seen": ("no", "all", "non_padding"),
        "torch_compile_backend": tuple(backend.value.lower() for backend in DynamoBackend),
        "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    }
)
"""The names that an option may be. Further ones are declared as `choices` in the fields of `TrainingArguments`."""


def check_names(args: Any) -> None:
    """ValueError where an option is none of its names, and where a truth value is none. `np.bool_`, 0 and 1 become
    truth values."""
    choices = {field.name: tuple(field.metadata["choices"]) for field in fields(args) if "choices" in field.metadata}
    for name, names in {**choices, **NAMES}.items():
        value = getattr(args, name, None)
        value = value.value if isinstance(value, Enum) else value
        if value is not None and not (name == "include_num_input_tokens_seen" and isinstance(value, bool)):
            text = value if isinstance(value, str) else shown(value)
            require_known(name, text.lower() if name == "torch_compile_backend" else text, names)
    for name in _never_none(type(args)):
        if getattr(args, name) is None:
            raise ValueError(f"{name}=None was asked for; it has no such value. Leave it out for its default.")
    for name in _truth_values(type(args)):
        value = getattr(args, name)
        if value is not None and not isinstance(value, bool):
            if not isinstance(value, int | np.bool_) or value not in (0, 1):
                raise ValueError(f"{name}={shown(value)} was asked for; it is a truth value. Write True or False.")
            setattr(args, name, bool(value))
    _check_kinds(args)
    check_debug(args.debug)
    check_report_to(args.report_to)


@functools.cache
def _kinds(options: type) -> dict[str, set[Any]]:
    """The types that the value of each option may have."""
    hints = get_type_hints(options)
    is_union = {name: get_origin(hint) in (Union, UnionType) for name, hint in hints.items()}
    return {
        field.name: set(get_args(hints[field.name])) if is_union[field.name] else {hints[field.name]}
        for field in fields(options)
    }


_OF_OTHER_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"accelerator_config": (AcceleratorConfig,), "fsdp": (bool, list), "resume_from_checkpoint": (bool,)}
)
"""Kinds that an option may be of beside those of its annotation. A number is a path to none of them: `transformers`
would read and close the open file of that number, 1 being the output of the command."""


def _check_kinds(args: Any) -> None:
    """ValueError where an option that is a text, a mapping or a list is of another kind."""
    for name, kinds in _kinds(type(args)).items():
        plain = {get_origin(kind) or kind for kind in kinds} - {NoneType}
        if not plain or not plain <= {str, dict, list} or name == "template_date":  # whose own check says more
            continue
        texts = (str, os.PathLike, Enum) if str in plain else ()
        allowed = (*texts, *((Mapping,) if dict in plain else ()), *((list, tuple) if list in plain else ()))
        allowed += _OF_OTHER_KINDS.get(name, ())
        value = getattr(args, name)
        if value is not None and not isinstance(value, allowed):
            found = {str: "a text", dict: "a mapping", list: "a list"}
            words = " or ".join(word for kind, word in found.items() if kind in plain)
            raise ValueError(f"{name}={shown(value)} was asked for; it is {words}. Write one, or leave it out.")


@functools.cache
def _truth_values(options: type) -> list[str]:
    """The options that are True, False or, for some, None."""
    return [name for name, kinds in _kinds(options).items() if bool in kinds and kinds <= {bool, NoneType}]


@functools.cache
def _never_none(options: type) -> list[str]:
    """The options that have a value always. `debug` has none where a parser of command lines was not given it."""
    return [name for name, kinds in _kinds(options).items() if not {NoneType, Any} & kinds and name != "debug"]


def check_debug(value: Any) -> None:
    """ValueError where `debug` names something that `transformers` cannot debug."""
    if not isinstance(value, str | list | None):
        raise ValueError(f"debug={shown(value)} was asked for; it is a text of names. Use {_values(DebugOption)[0]!r}.")
    for name in value.split() if isinstance(value, str) else value or []:
        known = name.value if isinstance(name, Enum) else name
        require_known("debug", known if isinstance(known, str) else shown(known), _values(DebugOption))


def check_report_to(value: Any) -> None:
    """ValueError where `report_to` names a service that `transformers` does not know or that is not installed."""
    names = [value] if isinstance(value, str) or value is None else value
    available = get_available_reporting_integrations()
    for name in names:
        if name in (None, "none", "all") or name in available:
            continue
        refusal = _refusal(lambda name=name: get_reporting_integration_callbacks([name])[0]())
        if refusal is not None:
            raise ValueError(
                f"report_to={shown(name)} was asked for, to which no run can report here: {refusal} Installed are "
                f"{', '.join(available) or 'none'}. Install it, or use report_to='none'."
            )


def _refusal(make: Callable[[], Any]) -> str | None:
    """What a service's callback says of why it cannot be made; None where it can."""
    try:
        make()
    except Exception as error:  # each service has its own
        return f"{str(error).strip().splitlines()[0].rstrip('.')}."
    return None
