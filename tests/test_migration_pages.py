"""The pages for people who come from other trainers: every field of theirs is there once, and every target is one here.

`peer_fields.json` has the names of the fields as their sources declare them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from typer.testing import CliRunner

from code_blocks import ROOT, blocks_of
from holdfast.cli import runfile
from holdfast.cli.app import app
from holdfast.cli.sources import WITH_WEIGHT
from holdfast.cli.yaml_document import field_hints
from holdfast.config import DPOConfig

PEERS: Mapping[str, Mapping[str, Any]] = json.loads((ROOT / "tests" / "peer_fields.json").read_text(encoding="utf-8"))
THEIRS = ("option", "field", "key", "argument")
"""The headings of tables whose first column has their names."""

page = pytest.mark.parametrize("page", PEERS)


def rows_of(page: str) -> list[list[str]]:
    """The rows of the tables of fields: their names, what is here, and how."""
    rows, is_theirs = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            is_theirs = False
        elif cells := [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]:
            is_theirs = is_theirs or cells[0] in THEIRS
            if is_theirs and cells[0] not in THEIRS and not cells[0].startswith("---"):
                rows.append(cells)
    return rows


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@page
def test_every_field_is_there_once(page):
    shown = [name for cells in rows_of(page) for name in quoted(cells[0])]
    assert sorted(shown) == sorted(PEERS[page]["names"])


@page
def test_every_row_says_what_to_do(page):
    for cells in rows_of(page):
        assert cells[1], cells
        assert cells[1] != "-" or cells[2], f"{cells[0]}: nothing to write, and no reason"


def keys() -> set[str]:
    """Every key of a run file, dotted."""
    found = {key.name for key in runfile.KEYS} | {"training", "peft"}
    found |= {f"model.{name}" for name in runfile.MODEL} | {f"tokenizer.{name}" for name in runfile.TOKENIZER}
    found |= {f"data.{which}.{name}" for which in ("train", "eval") for name in WITH_WEIGHT}
    found |= {f"training.{name}" for name in field_hints(DPOConfig).keys() - runfile.ELSEWHERE.keys()}
    return found | {f"peft.{name}" for name in field_hints(LoraConfig)} | {"training.reference"}


@page
def test_every_target_is_a_key_of_a_run_file(page):
    """Also those that the last column names. `key: value` is read, with what it needs beside it."""
    known = keys()
    for cells in rows_of(page):
        for word in (word for cell in cells[1:] for word in quoted(cell)):
            key = word.partition(":")[0]
            if re.match(r"(training|peft|model|data|tokenizer|reference)\.", key):
                assert key in known, f"{cells[0]}: {word}"
            elif word.startswith("holdfast "):
                assert CliRunner().invoke(app, [word.split()[1], "--help"]).exit_code == 0, word


@page
def test_values_that_are_written_out_are_read(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("")
    for cells in rows_of(page):
        run: dict[str, Any] = {"model": {"path": "model"}, "data": {"train": "pairs.jsonl"}}
        words = [word for cell in cells[1:3] for word in quoted(cell) if re.match(r"[a-z]+\.[\w.]+: ", word)]
        for word in words:
            key, value = word.split(": ", 1)
            *sections, name = key.replace("training.reference", "reference.kind").split(".")
            place = run
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = yaml.safe_load(value)
        if words:
            training = run.setdefault("training", {})
            training |= {"use_cpu": True, "report_to": "none"}
            for name, needed in BESIDE.items():
                if name in words:
                    training |= needed
            Path("run.yaml").write_text(yaml.safe_dump(run))
            runfile.read_run_file(Path("run.yaml")).training_arguments()


BESIDE: Mapping[str, dict[str, Any]] = {
    "training.push_to_hub: true": {"push_to_hub": False},
    "training.optim: galore_adamw": {"optim": "adamw_torch"},
    "training.optim: apollo_adamw": {"optim": "adamw_torch"},
}
"""What is not tried: pushing, and optimizers of packages that are not installed."""


@page
def test_their_file_has_their_names(page):
    """The keys of the example in the other trainer's words are fields of that page, or of transformers."""
    (theirs,) = [block for block in blocks_of(page) if block.language == "yaml" and block.title != "run.yaml"]
    names = {*PEERS[page]["names"], *field_hints(DPOConfig), "warmup_ratio"}
    assert set(yaml.safe_load(theirs.text)) <= names


@page
def test_both_files_say_the_same(page):
    """Numbers that both files have under one name, or under the name that the page gives, are the same."""
    theirs, ours = (yaml.safe_load(block.text) for block in blocks_of(page) if block.language == "yaml")
    targets = {name: quoted(cells[1]) for cells in rows_of(page) for name in quoted(cells[0])}
    compared = 0
    for name, value in theirs.items():
        target = next(iter(targets.get(name, [])), f"training.{name}").partition(":")[0]
        section, _, key = target.partition(".")
        here = (ours.get(section) or {}).get(key)
        if all(isinstance(number, int | float) and not isinstance(number, bool) for number in (value, here)):
            assert here == pytest.approx(value), name
            compared += 1
    assert compared >= 4
