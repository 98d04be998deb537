"""Names that are no option of a config, or no argument of a trainer: all of them in one error, each with what to write.

Python would name the first one alone, and not what became of it. The names may come from a call, from a command line
(`internals.command_line`) or from a run file. Calls further down in the same script are read, not run, so that one
error says all there is to change. Given up: calls in other files, and what a script computes.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from holdfast.options.renamed import ARGUMENTS, RENAMED, RENAMED_ARGUMENTS, Expression, Options, spelled
from holdfast.secrets import is_secret


class UnknownNameError(TypeError, ValueError):
    """Names that are none of a config's options or of a trainer's arguments. Python raises `TypeError` for them,
    parsers of command lines `ValueError`."""


def asked_options(unknown: Options) -> dict[str, Any]:
    """Those of the `unknown` options of a config whose value asks for anything."""
    return {name: value for name, value in unknown.items() if name not in RENAMED or RENAMED[name].is_asked(value)}


def asked_arguments(unknown: Options) -> dict[str, Any]:
    """Those of the `unknown` arguments of a trainer whose value asks for anything."""
    tables = (RENAMED_ARGUMENTS, RENAMED)
    found = {name: next((table[name] for table in tables if name in table), None) for name in unknown}
    return {name: value for name, value in unknown.items() if (entry := found[name]) is None or entry.is_asked(value)}


def option_advice(name: str, value: Any, others: Options, names: Collection[str]) -> str:
    """What to write for an option that is none of a config's `names`; `others` are the options beside it."""
    if name in RENAMED:
        return RENAMED[name].advice(value, others)
    if name in ARGUMENTS:
        return f"pass it to DPOTrainer ({name}=...)"
    if name in RENAMED_ARGUMENTS:
        return RENAMED_ARGUMENTS[name].advice(value, others)
    return _nearest(name, names)


def argument_advice(
    name: str, value: Any, others: Options, names: Collection[str], option_names: Collection[str]
) -> str:
    """What to write for an argument that is none of a trainer's `names`; `option_names` are those of its config."""
    if name in RENAMED_ARGUMENTS:
        return RENAMED_ARGUMENTS[name].advice(value, others)
    if name in option_names:
        return f"move it into DPOConfig({name}={spelled(value)})"
    if name in RENAMED:
        entry = RENAMED[name]
        instead = entry.instead(value, others)
        advice = entry.advice(value, others)
        return f"{advice} in DPOConfig" if instead and entry.owner == "DPOConfig" else advice
    return _nearest(name, [*names, *option_names])


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else "there is nothing of this name; drop it"


def line(name: str, value: Any, advice: str) -> str:
    """One line of the error: the name, the value where it can be shown, and what to write."""
    text = "" if is_secret(name) else spelled(value)
    if is_secret(name) and isinstance(value, str):
        advice = advice.replace(spelled(value), "...")
    shown = f"{name}={text}" if text not in ("", "...") else name
    return f"- {shown}: {advice}{'' if advice.endswith('?') else '.'}"


def option_lines(unknown: Options, others: Options, names: Collection[str]) -> list[str]:
    """A line for each of the `unknown` options."""
    return [line(name, value, option_advice(name, value, others, names)) for name, value in unknown.items()]


def argument_lines(
    unknown: Options, others: Options, names: Collection[str], option_names: Collection[str]
) -> list[str]:
    """A line for each of the `unknown` arguments of a trainer."""
    return [
        line(name, value, argument_advice(name, value, others, names, option_names)) for name, value in unknown.items()
    ]


def unknown_names(head: str, *parts: Iterable[str]) -> UnknownNameError:
    """The error with these lines under its first sentence."""
    return UnknownNameError("\n".join([head, *(text for part in parts for text in part)]))


def of_command_line(words: Sequence[str]) -> dict[str, Any]:
    """The options among the words that a parser of command lines had no use for: `--name value`, `--name=value`."""
    found: dict[str, Any] = {}
    name: str | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = _typed(value) if equals else True
        elif name is not None:
            found[name] = _typed(word)
    return found


def _typed(text: str) -> Any:
    """What a word of a command line says: a number, a truth value, nothing, or itself."""
    constants: Mapping[str, Any] = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return Expression(text) if text.startswith(("{", "[")) else text
