"""Commands and keys that pages name within a sentence or a table exist, with the options that are named."""

import re

import pytest
import typer.main
from typer.core import TyperGroup

from code_blocks import ROOT, pages
from holdfast.cli import runfile
from holdfast.cli.app import app
from holdfast.cli.yaml_document import field_hints
from holdfast.config import DPOConfig

_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
NOT_THERE = {"training.lr", "training.name"}
"""Keys that a page names to say that they do not exist, or as an example of a name."""


def inline(page: str) -> list[str]:
    """The pieces of code in a page's text."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def command_of(words: list[str]) -> tuple[set[str], list[str]]:
    """The options of the command that the words begin with, and the words behind it. AssertionError for one that is
    none."""
    command = typer.main.get_command(app)
    rest = words
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith(("-", "[")):
        assert rest[0] in command.commands, f"holdfast has no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    return {name for option in command.params for name in option.opts} | {"--help"}, rest


@pytest.mark.parametrize("page", pages())
def test_commands_exist(page):
    for code in inline(page):
        if code.startswith("holdfast ") and "[" not in code.split()[1]:
            options, rest = command_of(code.split()[1:])
            named = {word.strip("[]").partition("=")[0] for word in rest if word.strip("[").startswith("--")}
            assert named <= options, code


@pytest.mark.parametrize("page", pages())
def test_keys_exist(page):
    known = field_hints(DPOConfig).keys() - runfile.ELSEWHERE.keys() | {"reference"}
    for code in inline(page):
        for name in re.findall(r"(?<!\.)\btraining\.([a-z]\w*)\b(?!\.py|\()", code):
            assert name in known or f"training.{name}" in NOT_THERE, code
