"""The script that calls: what it writes in calls that have not run yet, read from its source.

A script makes a config, loads models for minutes, and then makes a trainer. So where one of the two is refused, the
calls of the other in the same file are read as well. Only names that are known to have changed are reported, since the
file is not run. Given up: arguments in `**mapping`, and calls in other files.
"""

import ast
import linecache
import sys
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any

from holdfast.internals.command_line import callers
from holdfast.options.renamed import ARGUMENTS, RENAMED, RENAMED_ARGUMENTS, Expression
from holdfast.options.unknown import argument_lines, asked_arguments, asked_options, option_lines

_LIBRARIES = ("holdfast", "transformers", "trl")
_MOST_CHARACTERS = 1_000_000


def lines_of_config_calls(option_names: Collection[str]) -> list[str]:
    """A line for each option in the script's calls of `DPOConfig` that it does not have."""
    return _lines("DPOConfig", option_names, option_names)


def lines_of_trainer_calls(option_names: Collection[str]) -> list[str]:
    """A line for each argument in the script's calls of `DPOTrainer` that it does not have."""
    return _lines("DPOTrainer", ARGUMENTS, option_names)


def _lines(kind: str, names: Collection[str], option_names: Collection[str]) -> list[str]:
    lines: list[str] = []
    for number, written in (call for frame in _frames() for call in _calls(_syntax(frame), kind)):
        if kind == "DPOConfig":
            moved = {name: value for name, value in written.items() if name in {*RENAMED, *ARGUMENTS} - {*names}}
            found = option_lines(asked_options(moved), written, names)
        else:
            known = {*RENAMED_ARGUMENTS, *RENAMED, *option_names} - {*names}
            moved = {name: value for name, value in written.items() if name in known}
            found = argument_lines(asked_arguments(moved), written, names, option_names)
        if found:
            lines += [f"And in the call of {kind} on line {number}:", *found]
    return lines


def names_of_import(package: str, name: str) -> list[str]:
    """The names that the script's import statement of `name` from the package imports; that name alone where the
    statement cannot be read."""
    frame = next(iter(_frames()), None)
    for node in ast.walk(_syntax(frame)) if frame is not None else ():
        if isinstance(node, ast.ImportFrom) and node.module == package and node.end_lineno is not None:
            names = [alias.name for alias in node.names]
            is_running = frame is not None and node.lineno <= frame.f_lineno <= node.end_lineno
            if name in names and is_running:
                return names
    return [name]


def _frames() -> list[FrameType]:
    """The frames of the script and of its own modules, the nearest first, one per file."""
    by_file: dict[str, FrameType] = {}
    for frame in callers():
        file, package = frame.f_code.co_filename, str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package not in _LIBRARIES and package not in sys.stdlib_module_names - {"__main__"}:
            by_file.setdefault(file, frame)
    return [frame for file, frame in by_file.items() if "site-packages" not in file]


def _syntax(frame: FrameType) -> ast.Module:
    """The syntax of a frame's file; empty where its source cannot be had."""
    text = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
    try:
        return ast.parse(text if len(text) <= _MOST_CHARACTERS else "")
    except (SyntaxError, ValueError, RecursionError):
        return ast.parse("")


def _calls(tree: ast.Module, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line and the named arguments of each call of the class `kind`, of its other names and of its subclasses that
    have no constructor of their own."""
    names = {kind}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.name == kind and alias.asname}
        elif isinstance(node, ast.ClassDef) and {_name(base) for base in node.bases} & names and _is_plain(node):
            names.add(node.name)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) in names]
    for node in sorted(calls, key=lambda node: node.lineno):
        if node.keywords:
            yield node.lineno, {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}


def _is_plain(node: ast.ClassDef) -> bool:
    """Whether the class adds neither a constructor nor fields."""
    own = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    return not own and not any(isinstance(each, ast.FunctionDef) and each.name == "__init__" for each in node.body)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _value(node: ast.expr) -> Any:
    """What is written: a constant's value, or else its text."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Expression(ast.unparse(node))
