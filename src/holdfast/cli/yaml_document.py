"""A YAML file as checked values: every key is known, every value has its declared type, every error names its line.

Scalars are read by the rules of YAML 1.2, not by PyYAML's 1.1: `1e-6` is a number, and `no` is a string (as in
`save_strategy: no`). A key given twice is an error, where YAML libraries keep the last. Given up: interpolation,
includes and several files; an override (`training.beta=0.2`) changes one value.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class RunFileError(ValueError):
    """A run file, or a `--set`, that cannot be used; the message says where, what was found, and what to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The values of a file, and the line on which each dotted key was written.

    `sections_with(name)` are the sections that have a key of that name; an error about a misplaced key names the first.
    """

    file: Path
    values: dict[str, Any]
    lines: dict[str, int]
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
        return RunFileError(f"{self.location(key)}: {message}")

    def unknown(self, key: str, names: Collection[str]) -> RunFileError:
        """The error for a key that no object has, with the nearest one that exists."""
        section, _, name = key.rpartition(".")
        owner = f"section `{section}`" if section else "run file"
        homes = sorted(set(self.sections_with(name)) - {section})
        near = difflib.get_close_matches(name, names, n=1)
        if homes:
            advice = f"Did you mean `{f'{homes[0]}.{name}'.lstrip('.')}`?"
        elif near:
            advice = f"Did you mean `{near[0]}`?"
        else:
            advice = f"The valid keys are {', '.join(sorted(names))}."
        return self.error(key, f"`{key}` is not a key of the {owner}. {advice}")

    def check(self, where: str, values: Any, hints: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the mapping at `where`, converted to their hints. RunFileError for an unknown key or a wrong
        type."""
        if not isinstance(values, dict):
            raise self.error(where, f"`{where}` must be a mapping of {_list_names(hints)}; found {_show(values)}.")
        for name in values:
            if name not in hints:
                raise self.unknown(f"{where}.{name}" if where else str(name), hints)
        return {name: self.conform(f"{where}.{name}", value, hints[name]) for name, value in values.items()}

    def conform(self, key: str, value: Any, hint: Any) -> Any:
        """The value, converted to its hint where nothing is guessed (2 for a float is 2.0). Otherwise RunFileError."""
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
            return hint(**self.check(key, value, field_hints(hint)))
        # A mapping stays a mapping where that is allowed beside a class.
        options = sorted(_options(hint), key=is_dataclass)
        for option in options:
            if is_dataclass(option) and isinstance(value, dict):
                return self.conform(key, value, option)
            if _fits(value, option):
                return self._convert(key, value, option)
        types = " or ".join(dict.fromkeys(_describe(option) for option in options))
        raise self.error(key, f"`{key}` must be {types}; found {_show(value)}.{_advice(value, options)}")

    def _convert(self, key: str, value: Any, option: Any) -> Any:
        arguments = get_args(option)
        if option in (int, float):
            return option(value)
        if get_origin(option) is tuple:
            return tuple(value)
        if isinstance(value, list) and arguments:
            return [self.conform(f"{key}.{index}", item, arguments[0]) for index, item in enumerate(value)]
        if isinstance(value, dict) and arguments:
            return {name: self.conform(f"{key}.{name}", item, arguments[1]) for name, item in value.items()}
        return value


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


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `read_run_file` reads back as the same values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


# Reading -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key `{key.value}` is given twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


# The core schema of YAML 1.2 (chapter 10.3), plus merge keys; octal, hexadecimal and sexagesimal numbers are strings.
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values in a YAML file, and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunFileError(f"{path}: no such run file. Give the path of a YAML file; docs/cli.md shows one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(
            f"{path}: the run file cannot be read ({error}). It must be a YAML text file in UTF-8."
        ) from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise RunFileError(f"{path}{line}: not readable as YAML: {error.problem}. Correct this line.") from error
    except yaml.YAMLError as error:
        raise RunFileError(f"{path}: not readable as YAML: {error}. It must be a text file.") from error
    if not isinstance(values, dict):
        raise RunFileError(f"{path}: a run file is a mapping of sections; found {_show(values)}.")
    return values, {} if node is None else dict(_lines(node))


def _lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The dotted keys of a node and the 1-based line of each."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _lines(value, f"{name}.")


def _override(values: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], frozenset[str]]:
    """The values after the overrides, and the dotted keys that they set."""
    names: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise RunFileError(f"--set {override}: expected key=value. Write, for example, --set training.beta=0.2")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise RunFileError(f"--set {override}: the value is not readable as YAML. Quote it. ({error})") from error
        values = _replace(values, key.split("."), value, override)
        names.add(key)
    return values, frozenset(names)


def _replace(values: Any, keys: Sequence[str], value: Any, override: str) -> Any:
    """A copy of nested mappings with one value replaced. RunFileError where the path to it leads through anything but
    mappings."""
    if not keys:
        return value
    if not isinstance(values, dict | None):
        raise RunFileError(
            f"--set {override}: `{keys[0]}` can only be set inside a mapping; found {_show(values)} there. "
            f"Write it as a mapping in the run file first, for example {{path: {values}, {keys[0]}: ...}}."
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
    if kind is Literal:  # the class itself knows which values it takes
        return any(type(value) is type(argument) for argument in get_args(option))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, str)
    if kind is tuple:
        return isinstance(value, list)
    return isinstance(kind, type) and isinstance(value, kind)


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
    if isinstance(value, str) and {int, float} & set(options) and _fits(yaml.load(value, Loader=_Loader), float):
        return " Write it without quotes."
    if str in options and isinstance(value, bool | int | float):
        return f' Put it in quotes: "{value}".'
    return ""


def _show(value: Any) -> str:
    kinds = {bool: "the boolean", int: "the number", float: "the number", str: "the string", list: "the list"}
    return "nothing" if value is None else f"{kinds.get(type(value), 'the value')} {value!r}"


def _list_names(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"
