"""The recipes: their run files are whole, what is published came from them, and the pictures can be read."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from browser import opened
from holdfast.cli.runfile import read_run_file

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "examples" / "recipes"
PUBLISHED = ROOT / "docs" / "recipes"
NAMES = sorted(path.name for path in RECIPES.iterdir() if path.is_dir() and list(path.glob("*.yaml")))
PICTURES = [f"{name}{suffix}.svg" for name in NAMES for suffix in ("", "-narrow")]

SHOWN = [*(PUBLISHED / each for each in PICTURES[:2]), ROOT / "docs" / "references" / "choosing.svg"]


@pytest.fixture
def recipes(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(RECIPES))
    for name in ("run", "draw"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    yield run
    for name in ("run", "draw"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_a_run_file_that_writes_where_it_is_looked_for(path):
    run = read_run_file(path, ["training.use_cpu=true"])
    assert run.training_arguments().output_dir == f"recipes/{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("name", NAMES)
def test_run_files_of_a_recipe_differ_in_little(name):
    """All but a few options are the same, so that a curve shows what these do."""
    runs = [yaml.safe_load(path.read_text("utf-8")) for path in sorted((RECIPES / name).glob("*.yaml"))]
    options = [{**run.pop("training"), "reference": run.pop("reference")} for run in runs]
    assert all(run == runs[0] for run in runs)
    different = {key for each in options for key in each if any(each.get(key) != other.get(key) for other in options)}
    assert len(different - {"output_dir"}) <= 3


@pytest.mark.parametrize("name", NAMES)
def test_what_is_published_is_of_these_run_files(name):
    """Every run of the folder and no other, with as many numbers as steps; the first held-out loss is ln 2, or with
    `sft` above it, and the three ways to hold one reference are one curve."""
    found = json.loads((PUBLISHED / f"{name}.json").read_text("utf-8"))
    assert sorted(found["runs"]) == sorted(path.stem for path in (RECIPES / name).glob("*.yaml"))
    for run, curves in found["runs"].items():
        steps = curves["eval"]["step"]
        assert steps == [*range(0, 151, 10)]
        assert {len(values) for values in curves["eval"].values()} == {len(steps)}
        assert curves["eval"]["rewards/margins"][0] == 0.0
        assert (curves["eval"]["loss"][0] == 0.69315) == ("sft" not in run)
    if name == "full":
        first, *others = (curves["eval"]["logps/chosen"] for curves in found["runs"].values())
        assert all(other == pytest.approx(first, abs=1e-3) for other in others)


def test_the_tables_of_the_page_are_those_of_the_numbers(recipes, tmp_path):
    shutil.copytree(PUBLISHED, tmp_path / "recipes")
    recipes.write_tables(tmp_path / "recipes")
    assert (tmp_path / "recipes" / "index.md").read_text("utf-8") == (PUBLISHED / "index.md").read_text("utf-8")
    assert re.findall(r"<!-- table: (\S+) -->", (PUBLISHED / "index.md").read_text("utf-8")) == [
        name for name in ("lora", "full", "beta", "both-fall", "tr-dpo") if name in NAMES
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] if place else []) for place, name in enumerate(NAMES)]
)
def test_the_pictures_are_those_of_the_numbers(recipes, tmp_path, name):
    """Drawn anew they have the same texts and as many lines; their shapes are left to the version of matplotlib."""
    recipes.draw(json.loads((PUBLISHED / f"{name}.json").read_text("utf-8")), tmp_path)
    for picture in (f"{name}.svg", f"{name}-narrow.svg"):
        drawn, published = ((folder / picture).read_text("utf-8") for folder in (tmp_path, PUBLISHED))
        assert re.findall(r"<desc>.*?</desc>", drawn) == re.findall(r"<desc>.*?</desc>", published)
        assert drawn.count("<path") == published.count("<path")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("picture", SHOWN, ids=lambda path: path.name)
def test_pictures_are_read_in_light_and_dark(picture, scheme, tmp_path):
    """In a page of the picture's own width: texts of 10 pixels and more, apart from each other, of contrast 4.5."""
    page = tmp_path / "page.html"
    svg = picture.read_text("utf-8")
    back = {"light": "#fff", "dark": "#16181b"}[scheme]
    page.write_text(
        f'<!doctype html><body style="margin:0;background:{back}">{svg[svg.index("<svg") :]}</body>', "utf-8"
    )
    seen = opened(page, width=900, scheme=scheme)
    assert (seen.complaints, seen.requests, seen.overlapping) == ((), (), ())
    assert len(seen.plots) == 1
    assert seen.plots[0].label
    assert seen.smallest_text >= 10
    assert seen.faintest[0] >= 4.5, seen.faintest


@pytest.mark.slow
@pytest.mark.nightly
def test_one_command_makes_a_recipe(recipes, tmp_path, monkeypatch):
    """From nothing, with a small model: curves, answers and pictures of a recipe of one run."""
    from holdfast.quickstart.folder import write_quickstart

    work = tmp_path / "work"
    write_quickstart(work / "quickstart", num_steps=(2, 2), num_pairs=40)
    monkeypatch.setattr(
        sys, "argv", ["run.py", "lora", "--work", str(work), "--published", str(tmp_path / "published")]
    )
    monkeypatch.chdir(tmp_path)
    recipes.main()
    found = json.loads((tmp_path / "published" / "lora.json").read_text("utf-8"))
    assert found["runs"]["lora"]["eval"]["step"] == [0, 9]
    assert found["reference"]["num_answers"] == 512
    assert (tmp_path / "published" / "lora-narrow.svg").exists()
