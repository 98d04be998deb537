"""Paths that a user wrote: `~` and environment variables are expanded, in the run file and in options alike.

In a run file, a key is a path by its name; `is_path` knows them. What can also be the name of something on the hub is
expanded too, since no such name begins with `~` or has a `$`. Given up: a folder whose name has a `$`, unless it is
written `$$`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from holdfast.cli.text import shortened
from holdfast.cli.yaml_document import Document

_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\}|)")
_NAMES = {
    "accelerator_config", "deepspeed", "fsdp_config", "reference_store", "resume_from_checkpoint", "offload_folder",
}  # fmt: skip
_ENDINGS = re.compile(r"(?:.*_)?(?:path|dir|file|folder)")
_SOURCES = {"model", "tokenizer", "data.train", "data.eval", "reference.model"}
"""Keys whose short form is a path."""


def expanded(text: str) -> str:
    """The path with `~`, `~user`, `$NAME`, `${NAME}` replaced, and `$$` by `$`. ValueError, as a clause, for an empty
    path, a variable that is not set, a user who is not known, and a `$` before anything else."""
    if not text.strip():
        raise ValueError("the path is empty. Write where it is, or leave it out")
    if "\0" in text:
        raise ValueError("a path cannot hold the character NUL. Remove it")
    path = os.path.expanduser(_VARIABLE.sub(_value_of_variable, text))
    if path.startswith("~"):
        raise ValueError(f"there is no user {path.split('/')[0][1:]!r} whose home is meant. Write the path in full")
    return path


def _value_of_variable(match: re.Match[str]) -> str:
    if match[1]:
        return "$"
    name = match[2] or match[3]
    if name is None:
        raise ValueError("a `$` begins the name of a variable, $NAME or ${NAME}. Write $$ for a dollar sign")
    value = os.environ.get(name, "")
    if not value:
        state = "empty" if name in os.environ else "not set"
        raise ValueError(f"the environment variable {name} is {state}. Set it, or write the path in full")
    return value


def path_option(text: str | Path) -> Path:
    """The path that an option or argument of a command names. A usage error where it cannot be one. A default is a path
    already."""
    if isinstance(text, Path):
        return text
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} was given, and {error}.") from error


def is_path(key: str) -> bool:
    """Whether text at this dotted key of a run file is a path (or the name of something on the hub)."""
    name = key.rpartition(".")[2]
    return key in _SOURCES or name in _NAMES or _ENDINGS.fullmatch(name) is not None


def with_paths_expanded(document: Document, source_options: Mapping[str, Any]) -> dict[str | int, Any]:
    """The values of a run file with every path expanded. RunFileError for a path that cannot be.

    `source_options` tell one dataset, which has some of them, from a mapping of names to datasets.
    """

    def expand(value: Any, key: str, *, is_source: bool = False) -> Any:
        if isinstance(value, dict):
            are_sources = key in ("data.train", "data.eval") and not value.keys() & source_options
            return {
                name: expand(item, f"{key}.{name}" if key else str(name), is_source=are_sources)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [expand(item, key, is_source=is_source) for item in value]
        if not isinstance(value, str) or value.startswith("{") or not (is_source or is_path(key)):  # JSON is no path
            return value
        try:
            return expanded(value)
        except ValueError as error:
            raise document.error(key, f"`{key}` is {shortened(repr(value))}: {error}.") from error

    return expand(document.values, "")
