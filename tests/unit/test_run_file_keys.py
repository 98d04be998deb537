"""Every key of a run file with a list of odd values: each is refused by one message, or accepted for a reason.

Nothing is loaded: the files and models that the run files name do not exist.
"""

from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from peft import LoraConfig

from holdfast.cli.runfile import MODEL, TOKENIZER, read_run_file
from holdfast.cli.sources import DATASET, WITH_WEIGHT
from holdfast.cli.yaml_document import Document, RunFileError, field_hints
from holdfast.cli.yaml_text import parsed
from holdfast.config import DPOConfig

SECTIONS: dict[str, dict[str, Any]] = {
    "model": MODEL,
    "tokenizer": TOKENIZER,
    "data.train": DATASET,
    "data.train.a": WITH_WEIGHT,
    "data.eval": DATASET,
    "reference.model": MODEL,
    "training": field_hints(DPOConfig),
    "peft": field_hints(LoraConfig),
}
KEYS = {f"{section}.{name}": hint for section, hints in SECTIONS.items() for name, hint in hints.items()}
NEVER = (  # no key takes these
    "!!int abc", "!!bool x", "!!timestamp 2020-01-01", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!mine x",
    "9" * 309, "9" * 4400, "1e400", "-1e400", '"\\ud800"', "a: b: c", "[", "*a", "&a [*a]", "{null: 1}", "{[a]: 1}",
    "[" * 70 + "]" * 70,
)  # fmt: skip
ODD = (
    "null", "true", "3", "-3", "0", "1.5", ".nan", ".inf", "-.inf", "1e300", "99999999999999999999", "''", "' '", "x",
    "[]", "[1]", "[x]", "[[x]]", "[null]", "{}", "{a: 1}", "{1: x}", "{a: {b: [c]}}", '"a\\0b"', '"\\e[31mred"',
    "$NOT_SET_IN_TESTS/a", "~nobody-of-this-name/a", "a$", "'{\"a\"'", "'{\"a\": 1}'", "/dev/zero", f"'{'y' * 3000}'",
)  # fmt: skip
EACH = 2
"""How many odd values a key meets in `make test`; one more key, the next ones."""


@pytest.fixture
def check(tmp_path: Path):
    """Checks a run file with one key set, as `holdfast train` does before it loads anything."""
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{use_cpu: true, output_dir: '{tmp_path}'}}\n", encoding="utf-8")

    def check(key: str, value: str) -> Document:
        section = key.rpartition(".")[0]
        required = {"model": "model=m", "data.train": "data.train=t", "data.eval": "data.eval=e"}
        overrides = [text for name, text in required.items() if name != section and not section.startswith(f"{name}.")]
        if section in {"model", "tokenizer", "data.train", "data.train.a", "data.eval", "reference.model"}:
            overrides.append(f"{section}.path=p")
        run = read_run_file(path, [*overrides, f"{key}={value}"])
        run.training_arguments()
        return run.document

    return check


def takes(hint: Any, value: Any) -> bool:
    """Whether a value of this type can be meant for a key with this hint at all."""
    options = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    kinds = {get_origin(option) or option for option in options}
    if Any in kinds:
        return True
    of_literals = {type(item) for option in options if get_origin(option) is Literal for item in get_args(option)}
    classes = {kind for kind in kinds if isinstance(kind, type)}
    names = {str} if any(issubclass(kind, Enum) for kind in classes) else set()
    configs = {dict} if any(map(is_dataclass, classes)) else set()
    numbers = {int} if float in kinds else {float} if int in kinds else set()
    return type(value) in classes | of_literals | names | configs | numbers


def refusal(check, key: str, value: str) -> str:
    """What is said about the value, or "" where it is accepted."""
    try:
        check(key, value)
    except RunFileError as error:
        return str(error)
    return ""


def check_odd(check, key: str, value: str) -> None:
    if message := refusal(check, key, value):
        assert message.startswith(f"--set {key}") or "run.yaml, line 1: " in message  # a library may not name the key
        return
    meant = parsed(value).value
    hint = bool | str | None if key == "training.resume_from_checkpoint" else KEYS[key]
    as_number = [float(meant)] if isinstance(meant, float | int) and not isinstance(meant, bool) else []
    assert any(takes(hint, each) for each in [meant, *as_number]), f"{value} was accepted for {hint}"


def some_of(values: tuple[str, ...], index: int) -> list[str]:
    return [values[(EACH * index + number) % len(values)] for number in range(EACH)]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_with_some_odd_values(check, key):
    for value in some_of(ODD, list(KEYS).index(key)):
        check_odd(check, key, value)


@pytest.mark.nightly
@pytest.mark.parametrize("key", KEYS)
def test_a_key_with_every_odd_value(check, key):
    for value in ODD:
        check_odd(check, key, value)


@pytest.mark.parametrize("key", KEYS)
def test_what_no_key_takes(check, key):
    for value in some_of(NEVER, list(KEYS).index(key)):
        with pytest.raises(RunFileError, match=rf"^--set {key}=.*: the value is not readable as YAML. Quote it"):
            check(key, value)


@pytest.mark.parametrize("section", ["", "model", "tokenizer", "data", "reference", "peft", "training"])
@pytest.mark.parametrize("value", ["3", "true", "[1]", "[{path: x}]", ".nan", "{1: x}", "{a.b: x}", "{'': x}"])
def test_sections_that_are_none(tmp_path, section, value):
    path = tmp_path / "run.yaml"
    text = value if not section else f"{section}: {value}"
    required = "model: m\n" * (section not in ("", "model")) + "data: {train: t}\n" * (section not in ("", "data"))
    path.write_text(required + text, encoding="utf-8")
    with pytest.raises(RunFileError, match=r"run\.yaml") as error:
        read_run_file(path).training_arguments()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("key", ["a", "training.a.b", "\x1b[31m", "model\n", "a" * 5000, ".".join("a" * 60), "1", "<<"])
def test_keys_that_are_none(tmp_path, key):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: t}\n", encoding="utf-8")
    with pytest.raises(RunFileError, match="is not a key of the"):
        read_run_file(path, [f"{key}=1"]).training_arguments()


@pytest.mark.parametrize("key", [".".join("a" * 100), "training.", ".a", " =", "training. .beta"])
def test_keys_that_cannot_be(tmp_path, key):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: t}\n", encoding="utf-8")
    with pytest.raises(RunFileError, match=r"^--set .*: expected key=value"):
        read_run_file(path, [f"{key}=1"])
