"""A YAML file as checked values: every key is known, every value has its declared type, every error names its line.

`yaml_text` says how YAML is read. Given up: interpolation, includes and several files; an override
(`training.beta=0.2`) changes one value.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from holdfast.cli.text import shortened, without_secrets
from holdfast.cli.text_file import UnreadableError, text_of
from holdfast.cli.yaml_text import MAX_DEPTH, NotReadableError, parsed, plain_scalar
from holdfast.secrets import is_secret, secrets_in

_MAX_INT = 2**63
_MAX_LISTED = 20


class RunFileError(ValueError):
    """A run file, or a `--set`, that cannot be used; the message says where, what was found, and what to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The values of a file, and the line on which each dotted key was written.

    `sections_with(name)` are the sections that have a key of that name; an error about a misplaced key names the first.
    """

    file: Path
    values: dict[str | int, Any]
    lines: Mapping[str, int]
    overridden: frozenset[str]
    sections_with: Callable[[str], Collection[str]]

    def location(self, key: str) -> str:
        """Where a reader finds a dotted key: `run.yaml, line 7`, or the `--set` that gave it."""
        if any(key == name or key.startswith(f"{name}.") for name in self.overridden):
            return f"--set {key}"
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.file}, line {self.lines[key]}" if key else str(self.file)

    def error(self, key: str, message: str) -> RunFileError:
        """The error to raise about a dotted key."""
        return RunFileError(without_secrets(f"{self.location(key)}: {message}", secrets_in(self.values)))

    def refusal(self, section: str, what: str, error: Exception) -> RunFileError:
        """The error for a section that was refused as a whole, placed at the first of its keys that `error` names."""
        reason = reason_of(error)
        keys = self.values.get(section) or {}
        named = (f"{section}.{word}" for word in re.findall(r"\w+", reason) if word in keys)
        return self.error(next(named, section), f"{what}: {reason}")

    def unknown(
        self, section: str, name: str | int, names: Collection[str], instead: str | None = None
    ) -> RunFileError:
        """The error for a key that a section ("" for the file itself) does not have, with what to write `instead` where
        that is known, else with the nearest that exists."""
        owner = f"section `{section}`" if section else "run file"
        text = str(name)
        first, _, rest = text.partition(".")
        homes = sorted(set(self.sections_with(text)) - {section})
        near = difflib.get_close_matches(text, names, n=1)
        if rest and first in names:
            advice = f"Write it as a mapping: `{first}: {{{rest}: ...}}`."
        elif homes:
            advice = f"Did you mean `{f'{homes[0]}.{text}'.lstrip('.')}`?"
        elif instead is not None:
            advice = instead
        elif near:
            advice = f"Did you mean `{near[0]}`?"
        else:
            advice = f"The valid keys are {_first_names(sorted(names))}."
        key = f"{section}.{text}".lstrip(".")
        return self.error(key, f"`{shortened(key)}` is not a key of the {owner}. {advice}")

    def unknown_keys(self, errors: Sequence[RunFileError]) -> RunFileError:
        """One error that says all of these, each on its line."""
        return RunFileError("\n".join(map(str, errors)))

    def check(self, where: str, values: Any, hints: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the mapping at `where`, converted to their hints. RunFileError for an unknown key or a wrong
        type."""
        if not isinstance(values, dict):
            raise self.error(where, f"`{where}` must be a mapping of {_list_names(hints)}; found {_show(values)}.")
        for name in values:
            if name not in hints:
                raise self.unknown(where, name, hints)
        return {name: self.conform(f"{where}.{name}", value, hints[name]) for name, value in values.items()}

    def conform(self, key: str, value: Any, hint: Any) -> Any:
        """The value, converted to its hint where nothing is guessed (2 for a float is 2.0). Otherwise RunFileError."""
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
            return self._made(key, hint, self.check(key, value, field_hints(hint)))
        # A mapping stays a mapping where that is allowed beside a class.
        options = sorted(_options(hint), key=is_dataclass)
        for option in options:
            if is_dataclass(option) and isinstance(value, dict):
                return self.conform(key, value, option)
            if _fits(value, option):
                return self._convert(key, value, option)
        types = " or ".join(dict.fromkeys(_describe(option) for option in options))
        raise self.error(key, f"`{key}` must be {types}; found {_show(value)}.{_advice(value, options)}")

    def _made(self, key: str, cls: type, values: Mapping[str, Any]) -> Any:
        try:
            return cls(**values)
        except REFUSED as error:
            raise self.error(key, f"`{key}` was refused: {reason_of(error)}") from error

    def _convert(self, key: str, value: Any, option: Any) -> Any:
        arguments = get_args(option)
        if option is Any:  # of a library, which may take numbers as keys
            return value
        if option in (int, float):
            return option(value)
        if isinstance(value, list):
            items = [self.conform(f"{key}.{index}", item, _item(arguments, index)) for index, item in enumerate(value)]
            return tuple(items) if get_origin(option) is tuple else items
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise self.error(f"{key}.{name}", f"`{key}` has the key {name}, and its keys are text. Quote it.")
            item_hint = arguments[1] if arguments else Any
            return {name: self.conform(f"{key}.{name}", item, item_hint) for name, item in value.items()}
        return value


REFUSED = (
    ValueError, TypeError, ImportError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError,
    NotImplementedError, RecursionError,
)  # fmt: skip
"""What a constructor raises that refuses a user's values, by itself or because it did not foresee them."""


def reason_of(error: Exception) -> str:
    """What an error says, with its kind where its text alone would say too little."""
    text = str(error).strip()
    return (
        text
        if isinstance(error, ValueError | OSError | ImportError | Warning) and text
        else f"{type(error).__name__}: {text}"
    )


def read_document(
    path: Path, overrides: Sequence[str] = (), *, sections_with: Callable[[str], Collection[str]] = lambda name: ()
) -> Document:
    """The document at `path` after the `overrides` (`"training.beta=0.2"`: dotted key, YAML value).

    Errors: `RunFileError` for a file that is missing, or not YAML (with the line), or not a mapping; for a key given
    twice; for an override without `=`, or inside something that is not a mapping.
    """
    values, lines = _parse(path)
    values, overridden = _override(values, overrides)
    return Document(file=path, values=values, lines=lines, overridden=overridden, sections_with=sections_with)


# Reading -------------------------------------------------------------------------------------------------------------


def _parse(path: Path) -> tuple[dict[str | int, Any], Mapping[str, int]]:
    """The values in a YAML file, and the line of each dotted key."""
    try:
        found = parsed(_text(path))
    except NotReadableError as error:
        line = "" if error.line is None else f", line {error.line}"
        raise RunFileError(f"{path}{line}: not readable as YAML: {error}. Correct this line.") from error
    values = {} if found.value is None else found.value
    if not isinstance(values, dict):
        raise RunFileError(f"{path}: a run file is a mapping of sections; found {_show(values)}.")
    return values, found.lines


def _text(path: Path) -> str:
    try:
        return text_of(path)
    except FileNotFoundError:
        raise RunFileError(f"{path}: no such run file. Give the path of a YAML file; docs/cli.md shows one.") from None
    except UnreadableError as error:
        raise RunFileError(
            f"{path}: the run file cannot be read ({error}). It must be a YAML text file in UTF-8."
        ) from error


def _override(values: dict[str | int, Any], overrides: Sequence[str]) -> tuple[dict[str | int, Any], frozenset[str]]:
    """The values after the overrides, and the dotted keys that they set."""
    names: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        shown = f"{key}=***" if is_secret(key.rpartition(".")[2]) else shortened(override)
        if not equals or not all(part.strip() for part in key.split(".")) or key.count(".") >= MAX_DEPTH:
            raise RunFileError(f"--set {shown}: expected key=value. Write, for example, --set training.beta=0.2")
        value = _overriding_value(shown, text)
        try:
            values = _replace(values, key.split("."), value, shown)
        except RunFileError as error:
            raise RunFileError(without_secrets(str(error), secrets_in(values))) from error
        names.add(key)
    return values, frozenset(names)


def _overriding_value(shown: str, text: str) -> Any:
    try:
        return parsed(text).value
    except NotReadableError as error:
        raise RunFileError(f"--set {shown}: the value is not readable as YAML. Quote it. ({error})") from error


def _replace(values: Any, keys: Sequence[str], value: Any, override: str) -> Any:
    """A copy of nested mappings with one value replaced. RunFileError where the path to it leads through anything but
    mappings."""
    if not keys:
        return value
    if not isinstance(values, dict | None):
        raise RunFileError(
            f"--set {override}: `{keys[0]}` can only be set inside a mapping; found {_show(values)} there. "
            f"Write it as a mapping in the run file first, for example "
            f"{{path: {shortened(str(values))}, {keys[0]}: ...}}."
        )
    values = values or {}
    return {**values, keys[0]: _replace(values.get(keys[0]), keys[1:], value, override)}


# Types ---------------------------------------------------------------------------------------------------------------


def field_hints(cls: Any) -> dict[str, Any]:
    """The type hint of each field that the constructor of a dataclass takes."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _options(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def _fits(value: Any, option: Any) -> bool:
    kind = get_origin(option) or option
    if kind is Any:
        return True
    if kind is Literal:
        return any(_is_literal(value, argument) for argument in get_args(option))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) < _MAX_INT and value == value // 1
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, str)
    if kind is tuple:
        return isinstance(value, list) and (Ellipsis in get_args(option) or len(value) == len(get_args(option)))
    return isinstance(kind, type) and isinstance(value, kind)


def _is_literal(value: Any, argument: Any) -> bool:
    """Whether the value is a literal. One such as 'pissa_niter_[number of iters]' stands for all that begin like it."""
    if isinstance(argument, str) and "[" in argument:
        return isinstance(value, str) and value.startswith(argument.partition("[")[0])
    return type(value) is type(argument) and value == argument


def _item(arguments: Sequence[Any], index: int) -> Any:
    """The hint of an item of a list or tuple with these type arguments."""
    if not arguments:
        return Any
    return arguments[0] if len(arguments) == 1 or arguments[1] is Ellipsis else arguments[index]


def _describe(option: Any) -> str:
    kind = get_origin(option) or option
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", NoneType: "null"}
    names |= {list: "a list", tuple: "a list", dict: "a mapping"}
    if kind is Literal:
        return ", ".join(repr(argument) for argument in get_args(option))
    return names.get(kind) or ("a name" if isinstance(kind, type) and issubclass(kind, Enum) else f"a {kind}")


def _advice(value: Any, options: Sequence[Any]) -> str:
    if isinstance(value, str) and value in ("None", "none", "") and NoneType in options:
        return " Write null."
    if isinstance(value, str) and {int, float} & set(options) and _is_number(value):
        return " Write it without quotes."
    if str in options and isinstance(value, bool | int | float):
        return f' Put it in quotes: "{shortened(str(value))}".'
    if int in options and isinstance(value, int | float) and not abs(value) < _MAX_INT:
        return f" Its size is below {_MAX_INT}."
    return ""


def _is_number(text: str) -> bool:
    try:
        return _fits(plain_scalar(text), float)
    except NotReadableError:
        return False


def _show(value: Any) -> str:
    kinds = {bool: "the boolean", int: "the number", float: "the number", str: "the string", list: "the list"}
    return "nothing" if value is None else f"{kinds.get(type(value), 'the value')} {shortened(repr(value))}"


def _list_names(names: Collection[str]) -> str:
    return _first_names([f"`{name}`" for name in names]) or "nothing"


def _first_names(names: Sequence[str]) -> str:
    return ", ".join([*names[:_MAX_LISTED], *(["..."] if len(names) > _MAX_LISTED else [])])
