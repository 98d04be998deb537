"""YAML text -> plain values, and the line of each key; whatever else YAML can say is one error with its line.

Scalars are read by the core schema of YAML 1.2, not by PyYAML's 1.1: `1e-6` is a number, and `no` is a string (as in
`save_strategy: no`). Of PyYAML, only its reading of the syntax is used; the values are made here. A key given twice is
an error, where YAML libraries keep the last. Given up: every tag that makes something else (dates, binary, sets,
objects), keys that are neither text nor whole numbers, and text without bounds: size, depth and the number of values
with all aliases written out are limited, so that no short text can take minutes or all memory.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, final

import yaml
from yaml.composer import ComposerError

from holdfast.cli.text_file import MAX_BYTES

MAX_DEPTH = 64
MAX_VALUES = 100_000

_CORE = "tag:yaml.org,2002:"
# The core schema of YAML 1.2 (chapter 10.3), plus merge keys; octal, hexadecimal and sexagesimal numbers are strings.
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_PATTERNS = {name: re.compile(f"(?:{pattern})") for name, (pattern, _) in _PLAIN.items()}
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class NotReadableError(Exception):
    """Text that is not YAML, or YAML of which no run file has need. Its text says why; `line` counts from 1."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """The value of a YAML text (None for an empty one), and the line on which each dotted key was written."""

    value: Any
    lines: Mapping[str, int]


def parsed(text: str) -> Parsed:
    """The value of one YAML document. NotReadableError for anything that this module does not read."""
    if (character := _FORBIDDEN.search(text)) is not None:
        line = text.count("\n", 0, character.start()) + 1
        raise NotReadableError(f"the character {character[0]!a} is not allowed in YAML", line)
    if len(text.encode()) > MAX_BYTES:
        raise NotReadableError(f"it has {len(text.encode()):,} bytes, and at most {MAX_BYTES:,} are read", None)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NotReadableError(str(error.problem or error.context), mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # \U00110000, %YAML 1.999...
        raise NotReadableError(str(error), loader.line + 1) from error
    lines: dict[str, int] = {}
    return Parsed(value=None if node is None else _Values(lines).value(node, ""), lines=lines)


def plain_scalar(text: str) -> Any:
    """The value of a scalar that stands without quotes. NotReadableError for a number that is out of range."""
    for name in ("null", "bool", "int", "float"):
        if _PATTERNS[name].fullmatch(text):
            return _scalar(name, text)
    return text


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `parsed` reads back as the same values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


# The tree of nodes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Extent:
    """How much a node is with all aliases in it written out."""

    num_values: int
    height: int


class _Loader(yaml.SafeLoader):
    """Composes nodes, within the bounds of this module. It constructs nothing."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._extents: dict[int, _Extent] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        self._check(self._depth, 1, mark)
        node = super().compose_node(parent, index)
        assert node is not None
        if not is_alias:
            self._extents[id(node)] = self._extent(node)
        extent = self._extents.get(id(node))
        if extent is None:
            raise ComposerError(None, None, "an alias stands inside of what it names", mark)
        self._check(self._depth + extent.height - 1, extent.num_values, mark)
        self._depth -= 1
        return node

    def _extent(self, node: yaml.Node) -> _Extent:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        extents = [self._extents[id(part)] for part in parts]
        return _Extent(
            num_values=1 + sum(extent.num_values for extent in extents),
            height=1 + max((extent.height for extent in extents), default=0),
        )

    def _check(self, depth: int, num_values: int, mark: Any) -> None:
        if depth > MAX_DEPTH:
            raise ComposerError(None, None, f"values are nested more than {MAX_DEPTH} deep", mark)
        if num_values > MAX_VALUES:
            problem = f"there are more than {MAX_VALUES:,} values, with aliases written out"
            raise ComposerError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_CORE}{_name}", re.compile(f"^(?:{_pattern})$"), _first)


# The values ----------------------------------------------------------------------------------------------------------


def _scalar(name: str, text: str) -> Any:
    """The value of a scalar of the core schema. NotReadableError where the text is none, or out of range."""
    if name == "str":
        return text
    if not _PATTERNS[name].fullmatch(text):
        raise NotReadableError(f"{text[:60]!a} is not a value of the tag `!!{name}`", None)
    if name == "null":
        return None
    if name == "bool":
        return text.lower() == "true"
    return _number(name, text)


def _number(name: str, text: str) -> int | float:
    lowered = text.lower()
    if "inf" in lowered or "nan" in lowered:
        return float(lowered.replace(".", ""))
    number = float(text)
    shown = text if len(text) <= 30 else f"{text[:20]}... ({len(text):,} characters)"
    if math.isinf(number):
        raise NotReadableError(f"the number {shown} is too large: the largest is 1.8e308", None)
    if number == 0 and re.search("[1-9]", lowered.partition("e")[0]):
        raise NotReadableError(f"the number {shown} is too small to differ from 0: the smallest is 5e-324", None)
    return int(text) if name == "int" else number


class _Values:
    """Makes the values of nodes, and notes in `lines` where each dotted key was written."""

    def __init__(self, lines: dict[str, int]) -> None:
        self._lines = lines

    def value(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_CORE}map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_CORE}seq":
            return self._sequence(node, key)
        name = node.tag.removeprefix(_CORE)
        if not isinstance(node, yaml.ScalarNode) or name not in {"str", "merge", *_PATTERNS}:
            tag = f"!!{name}" if name != node.tag else node.tag
            _refuse(node, f"the tag `{tag}` cannot be used for this value; remove it")
        try:
            value = _scalar("str" if name == "merge" else name, node.value)
        except NotReadableError as error:
            _refuse(node, str(error))
        if isinstance(value, str) and (bad := re.search("[\ud800-\udfff]", value)):
            _refuse(node, f"text cannot hold the character {bad[0]!a}")
        return value

    def _sequence(self, node: yaml.SequenceNode, key: str) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            name = f"{key}.{index}"
            self._lines[name] = item.start_mark.line + 1
            items.append(self.value(item, name))
        return items

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str | int, Any]:
        merged: dict[str | int, Any] = {}
        for source in reversed(self._merged_nodes(node)):
            merged |= self._mapping(source, key)
        own: dict[str | int, Any] = {}
        seen: set[str] = set()
        for name_node, value_node in node.value:
            name = self._key(name_node)
            if str(name) in seen:
                _refuse(name_node, f"the key `{name}` is given twice; keep one")
            seen.add(str(name))
            if _is_merge(name_node):
                continue
            dotted = f"{key}.{name}" if key else str(name)
            self._lines[dotted] = name_node.start_mark.line + 1
            own[name] = self.value(value_node, dotted)
        return {**merged, **own}

    def _key(self, node: yaml.Node) -> str | int:
        if not isinstance(node, yaml.ScalarNode):
            kind = "mapping" if isinstance(node, yaml.MappingNode) else "list"
            _refuse(node, f"found unhashable key: it is a {kind}, and a key is text")
        name = self.value(node, "")
        if isinstance(name, bool) or not isinstance(name, str | int):
            _refuse(node, f"the key `{node.value}` is read as {name!r}, and a key is text; put it in quotes")
        return name

    def _merged_nodes(self, node: yaml.MappingNode) -> list[yaml.MappingNode]:
        """The mappings that `<<` takes over, the one that wins first."""
        sources: list[yaml.Node] = []
        for name, value in node.value:
            if _is_merge(name):
                sources += value.value if isinstance(value, yaml.SequenceNode) else [value]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                _refuse(source, "`<<` takes a mapping, or a list of mappings")
        return [source for source in sources if isinstance(source, yaml.MappingNode)]


def _is_merge(node: yaml.Node) -> bool:
    return node.tag == f"{_CORE}merge"


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise NotReadableError(problem, node.start_mark.line + 1)
