"""Every example is run as a script, on a small model and few pairs of the quickstart, and its numbers are looked at.

`make nightly` runs most of them; `make test` one, the notebook, and `lora.py` with the pages' code blocks.

Numbers that an example prints are compared with what must be so: a first loss worked out by hand, a fixed reference,
a reference that was moved.
"""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from holdfast.losses import LOSSES
from holdfast.quickstart.folder import Quickstart, write_quickstart

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Quickstart:
    """A model that has hardly learnt anything, and 40 pairs."""
    return write_quickstart(tmp_path_factory.mktemp("quickstart") / "q", num_steps=(2, 2), num_pairs=40)


@pytest.fixture
def run(quickstart, tmp_path, monkeypatch, capsys):
    """Runs an example, and returns what it printed."""

    def run(name: str, pairs: Path = quickstart.pairs) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(sys, "argv", [name, str(quickstart.model), str(pairs), "out"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    known = dict(LOSSES)
    yield run
    LOSSES.clear()
    LOSSES.update(known)  # without the loss of an example


def history(folder: str) -> list[dict[str, float]]:
    (state,) = sorted(Path(folder).glob("checkpoint-*/trainer_state.json"))[-1:]
    return json.loads(state.read_text("utf-8"))["log_history"]


def has_moved(saved: str, model: Path) -> bool:
    """Whether a saved model's weights are not those that it began with."""
    before, after = load_file(model / "model.safetensors"), load_file(Path(saved) / "model.safetensors")
    return any((before[name] != after[name]).any() for name in after)


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(SCRIPTS) - {"dpo"} <= tested  # dpo.py is in tests/test_docs.py


@pytest.mark.nightly
def test_lora(run):
    """Before the first step the loss is ln 2, the margin 0 and the policy where the reference is."""
    printed = dict(re.findall(r"^(eval_\S+) +(\S+) ->", run("lora"), re.MULTILINE))
    assert float(printed["eval_loss"]) == pytest.approx(math.log(2), abs=1e-4)
    assert float(printed["eval_rewards/margins"]) == 0.0
    assert float(printed["eval_reference/kl_chosen"]) == 0.0
    assert Path("out/adapter_model.safetensors").exists()


def test_full_snapshot_on_disk(run, quickstart):
    printed = run("full_snapshot_on_disk")
    size = float(re.findall(r"policy: (\S+) MB", printed)[0])
    assert size == pytest.approx((quickstart.model / "model.safetensors").stat().st_size / 1e6, rel=0.02)
    assert float(re.findall(r"reference: (\S+) MB", printed)[0]) == 0.0
    assert has_moved("out", quickstart.model)


@pytest.mark.nightly
def test_sweep(run):
    """Four runs, and one store that holds each completion once, whatever the loss and beta."""
    printed = run("sweep")
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith(("sigmoid", "hinge"))] == [
        ["sigmoid", "0.1"], ["sigmoid", "0.3"], ["hinge", "0.1"], ["hinge", "0.3"],
    ]  # fmt: skip
    assert len([path for path in Path("out/store").iterdir() if path.is_dir()]) == 1


@pytest.mark.nightly
def test_tr_dpo(run, quickstart):
    """208 pairs in batches of 16 are 13 steps an epoch, 26 in all: one sync, after step 25."""
    rows = quickstart.pairs.read_text("utf-8").splitlines()
    many = quickstart.pairs.with_name("many.jsonl")
    many.write_text("".join(f"{rows[place % len(rows)]}\n" for place in range(208)), "utf-8")
    found = re.findall(r"step +(\d+)  syncs +(\d+)", run("tr_dpo", many))
    assert found == [("5", "0"), ("10", "0"), ("15", "0"), ("20", "0"), ("25", "1")]


@pytest.mark.nightly
def test_streaming(run, quickstart):
    assert "asked ahead for 10 optimizer steps" in run("streaming")
    assert history("out")[-1]["step"] == 60
    assert has_moved("out", quickstart.model)


@pytest.mark.nightly
def test_own_loss(run):
    """At the start the margin is 0: ln 2 = 0.6931 for sigmoid, (1 - 0)^2 = 1 for the squared hinge."""
    printed = run("own_loss")
    assert re.findall(r"^(\w+) +first loss (\S+)", printed, re.MULTILINE) == [
        ("sigmoid", "0.6931"), ("squared_hinge", "1.0000"),
    ]  # fmt: skip
    assert "held-out accuracy" in printed


@pytest.mark.nightly
def test_two_references(run, quickstart):
    printed = run("two_references")
    assert "0.7 * (a copy of the policy" in printed
    assert has_moved("out/other", quickstart.model)
    assert has_moved("out/policy", quickstart.model)
