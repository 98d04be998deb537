"""docs/options.md has every option once, as the code declares it. `python dev/options_page.py` writes it."""

import re
from dataclasses import fields

import pytest
import transformers

import options_page
from code_blocks import ROOT
from holdfast.cli import runfile
from holdfast.cli.sources import WITH_WEIGHT
from holdfast.config import DPOConfig

TEXT = options_page.PAGE.read_text(encoding="utf-8")


def is_pinned() -> bool:
    """Whether transformers is the version that the page was written with."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return f"transformers=={transformers.__version__}\n" in constraints


def own_options() -> set[str]:
    return {f.name for f in fields(DPOConfig)} - {f.name for f in fields(transformers.TrainingArguments)}


def test_every_option_is_there_once():
    """The own ones in any version of transformers; with another one than that of the page, its options may differ."""
    shown = re.findall(r'^\| <a id="(\w+)"></a>`(\w+)` \|', TEXT, re.MULTILINE)
    assert all(anchor == name for anchor, name in shown)
    found = [name for _, name in shown]
    assert len(found) == len(set(found))
    assert own_options() <= set(found)
    if is_pinned():
        assert set(found) == {f.name for f in fields(DPOConfig)}


def test_the_page_is_what_the_code_says():
    if not is_pinned():
        pytest.skip("transformers is another version than that of the page")
    assert options_page.written(TEXT) == TEXT, "run `python dev/options_page.py`"


def test_every_option_has_a_text_and_a_group():
    for line in re.findall(r"^\| <a id.*$", TEXT, re.MULTILINE):
        name, kind, default, text = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        assert kind, name
        assert default, name
        assert len(text) > 10, name
    named = [
        name for groups in (options_page.OWN, options_page.INHERITED) for names in groups.values() for name in names
    ]
    assert len(named) == len(set(named))
    assert {name for names in options_page.OWN.values() for name in names} <= own_options()


def test_every_other_key_of_a_run_file_is_there_once():
    shown = re.findall(r"^\| `([\w.]+)` \|", TEXT, re.MULTILINE)
    expected = [key.name for key in runfile.KEYS if key.name != "training"]
    expected += [f"model.{name}" for name in runfile.MODEL]
    expected += [f"tokenizer.{name}" for name in runfile.TOKENIZER]
    expected += [f"data.train.{name}" for name in WITH_WEIGHT]
    assert sorted(shown) == sorted(expected)
