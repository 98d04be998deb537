"""How a config is made: names that it does not have are refused all at once, each with what to write.

`dataclass` writes `__init__`, of `DPOConfig` and of every subclass with fields of its own. The metaclass puts a
function around each as it is written, which has the same signature, so that parsers, `replace`, pickling and
documentation see nothing of it. Given up: a plain constructor, since a subclass's is not made from its base class's.
"""

import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from holdfast.internals.command_line import unread_keys, unread_words
from holdfast.options.renamed import RENAMED
from holdfast.options.script import lines_of_trainer_calls
from holdfast.options.unknown import UnknownNameError, asked_options, of_command_line, option_lines, unknown_names


class ConfigClass(ABCMeta):
    """The class of `DPOConfig` and its subclasses."""

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, _refusing_unknown_names(value) if name == "__init__" else value)


def _refusing_unknown_names(init: Callable[..., None]) -> Callable[..., None]:
    parameters = inspect.signature(init).parameters
    names = list(parameters)[1:]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = {} if takes_any else {name: value for name, value in kwargs.items() if name not in names}
        known = {name: value for name, value in kwargs.items() if name not in unknown}
        unknown = asked_options(unknown)
        words = _of_parsers()
        if unknown or words:
            raise _refusal(type(self), init, args, known, unknown | words, names)
        init(self, *args, **known)

    return __init__


def _of_parsers() -> dict[str, Any]:
    """The options that a parser of command lines or of files is about to refuse, whatever they ask for; none where no
    old name is among them, so that its own error says the rest."""
    unread = of_command_line(unread_words()) | unread_keys()
    return unread if RENAMED.keys() & unread else {}


def _refusal(
    kind: type, init: Callable[..., None], args: tuple[Any, ...], known: Mapping[str, Any], unknown: Mapping[str, Any],
    names: list[str],
) -> UnknownNameError:  # fmt: skip
    """The error about the `unknown` names, with what is wrong of the others, and of the script's trainer."""
    others: list[str] = []
    try:
        init(object.__new__(kind), *args, **known)
    except (ValueError, TypeError, ImportError) as error:
        others = [f"- {error}"]
    noun = "a name that is" if len(unknown) == 1 else f"{len(unknown)} names that are"
    return unknown_names(
        f"{kind.__name__} was given {noun} none of its options:",
        option_lines(unknown, known, names),
        others,
        lines_of_trainer_calls(names),
    )


def refuse_unknown_attributes(config: Any) -> None:
    """`UnknownNameError` where attributes were set on a config that stand for options which it does not have."""
    names = [field.name for field in fields(config)]
    unknown = {name: value for name, value in vars(config).items() if name in RENAMED and name not in names}
    unknown = asked_options(unknown)
    if unknown:
        known = {name: getattr(config, name) for name in names}
        head = f"{type(config).__name__} was given attributes that are none of its options:"
        raise unknown_names(head, option_lines(unknown, known, names))
