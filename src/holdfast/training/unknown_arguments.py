"""How a trainer is made: arguments that it does not have are refused all at once, each with what to write.

What else is wrong of the call is said in the same error: `args` of another kind, a missing model, options that were
set on the config later.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from holdfast.arguments import check_kind
from holdfast.config import DPOConfig
from holdfast.options.script import lines_of_config_calls
from holdfast.options.unknown import UnknownNameError, argument_lines, asked_arguments, unknown_names
from holdfast.training.makings import check_model

OPTION_NAMES = tuple(field.name for field in fields(DPOConfig) if field.init)


def refusing_unknown_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which is not called where an argument is none of its own: `UnknownNameError` names all."""
    names = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = {name: value for name, value in kwargs.items() if name not in names}
        known = {name: value for name, value in kwargs.items() if name not in unknown}
        asked = asked_arguments({name: value for name, value in unknown.items() if not _is_default(name, value)})
        if asked:
            raise _refusal(dict(zip(names, args, strict=False)) | known, asked, names)
        init(self, *args, **known)

    return __init__


def _is_default(name: str, value: Any) -> bool:
    """Whether an option was given to the trainer as None, by which older constructors meant that of the config."""
    return value is None and name in OPTION_NAMES


def _refusal(known: dict[str, Any], unknown: dict[str, Any], names: list[str]) -> UnknownNameError:
    config = known.get("args")
    others = {name: getattr(config, name, None) for name in OPTION_NAMES} if config is not None else {}
    mistakes: list[str] = []
    checks = [lambda: check_model(known.get("model"), known.get("model_init")), lambda: check_kind(config)]
    if isinstance(config, DPOConfig):
        checks.append(config.check)
    for check in checks:
        try:
            check()
        except (ValueError, TypeError, ImportError) as error:
            mistakes.append(f"- {error}")
    noun = "an argument" if len(unknown) == 1 else f"{len(unknown)} arguments"
    return unknown_names(
        f"DPOTrainer was given {noun} that it does not have:",
        argument_lines(unknown, {**others, **unknown}, names, OPTION_NAMES),
        mistakes,
        lines_of_config_calls(OPTION_NAMES) if not isinstance(config, TrainingArguments) else (),
    )
