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
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from holdfast import DPOTrainer
from holdfast.cli.app import app
from holdfast.losses import LOSSES
from holdfast.quickstart.folder import Quickstart, write_quickstart
from stores import Counting

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

    def run(name: str, pairs: Path = quickstart.pairs, output: str = "out", which: str | None = None) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
        words = [name, str(quickstart.model), str(pairs), output, *([] if which is None else [which])]
        monkeypatch.setattr(sys, "argv", words)
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


# --- one store for several runs ---------------------------------------------------------------------------------------


@pytest.fixture
def counting(monkeypatch) -> Counting:
    return Counting(monkeypatch)


@pytest.fixture
def command(quickstart, tmp_path, monkeypatch):
    """Runs a command of holdfast where `quickstart/` is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    Path("quickstart").symlink_to(quickstart.model.parent)

    def command(*words: str) -> None:
        result = CliRunner().invoke(app, [*words])
        assert result.exit_code == 0, result.output

    return command


def train(command, run_file: str, *settings: str) -> list[float]:
    """The losses that a run file of the examples logs, with these settings in place of its own."""
    settings = ("training.use_cpu=true", "training.logging_steps=1", *settings)
    words = [word for each in settings for word in ("--set", each)]
    command("train", str(EXAMPLES / run_file), *words)
    given = dict(each.split("=", 1) for each in settings)
    output = given.get("training.output_dir", OUTPUTS[run_file])
    logged = json.loads(Path(output, "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in logged if "loss" in entry]


OUTPUTS = {
    "pre_dpo/guide.yaml": "pre_dpo/guide",
    "pre_dpo/pre_dpo.yaml": "pre_dpo/policy",
    "pre_dpo/guide_lora.yaml": "pre_dpo/guide-lora",
    "pre_dpo/pre_dpo_lora.yaml": "pre_dpo/policy-lora",
    "selection/first.yaml": "selection/first",
    "selection/selected.yaml": "selection/policy",
}


def completions_of(*files: str | Path) -> set[tuple[str, str]]:
    """The different completions of files of pairs, each with its prompt."""
    rows = [json.loads(line) for file in files for line in Path(file).read_text("utf-8").splitlines()]
    return {(json.dumps(row["prompt"]), json.dumps(row[side])) for row in rows for side in ("chosen", "rejected")}


@pytest.mark.nightly
@pytest.mark.parametrize("ending", ["", "_lora"])
def test_pre_dpo(command, counting, ending):
    """Each reference is asked once about each completion, whatever beta, loss and seed the runs have; another guide is
    asked anew. The losses are those of a run that holds the guide as a second model."""
    guide, policy = f"pre_dpo/guide{ending}.yaml", f"pre_dpo/pre_dpo{ending}.yaml"
    number = len(completions_of("quickstart/pairs.jsonl", "quickstart/held-out.jsonl"))
    assert counting.during(lambda: train(command, guide)) == number
    losses: list[float] = []
    assert counting.during(lambda: losses.extend(train(command, policy))) == number
    others = ("training.beta=0.3", "training.loss_type=hinge", "training.seed=7", "training.output_dir=other")
    assert counting.during(lambda: train(command, policy, *others)) == 0
    held = train(command, policy, "reference.kind=model", "training.output_dir=held")
    assert held == pytest.approx(losses, abs=1e-5)
    assert losses[0] != pytest.approx(math.log(2), abs=1e-4)  # the policy begins elsewhere than the guide has ended
    assert counting.during(lambda: train(command, guide, "training.beta=0.02", "training.learning_rate=3e-4")) == 0
    assert counting.during(lambda: train(command, policy)) == number


@pytest.mark.nightly
@pytest.mark.parametrize("which", ["base", "before"])
def test_rounds(run, counting, monkeypatch, which):
    """Each round asks its reference about the completions that are new to it. A script that ends in the middle of the
    second round goes on to the same models, without another answer drawn or log-prob computed."""
    monkeypatch.setattr("holdfast.quickstart.village.judge", lambda prompt, a, b: float(len(a) < len(b)))
    run("rounds", output="whole", which=which)
    files = [Path("whole", f"round-{number}", "pairs.jsonl") for number in (1, 2, 3)]
    in_rounds = [len(completions_of(file)) for file in files]
    assert counting.scored == (len(completions_of(*files)) if which == "base" else sum(in_rounds))

    trainings = 0

    def interrupted(trainer: DPOTrainer, *args, **kwargs):
        nonlocal trainings
        trainings += 1
        if trainings == 2:
            raise KeyboardInterrupt
        return plain(trainer, *args, **kwargs)

    plain, total = DPOTrainer.train, counting.scored
    counting.scored = 0
    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("rounds", output="parts", which=which)
    before = counting.scored
    first, drawn = files[0].read_text("utf-8"), Path("parts/round-2/pairs.jsonl").read_bytes()
    assert Path("parts/round-1/pairs.jsonl").read_text("utf-8") == first
    printed = run("rounds", output="parts", which=which)
    assert Path("parts/round-2/pairs.jsonl").read_bytes() == drawn
    assert 0 < before < counting.scored == total
    for number in (1, 2, 3):
        ours, theirs = (load_file(Path(name, f"round-{number}", "model.safetensors")) for name in ("parts", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    references = re.findall(r"^round \d: \S+ trained against (\S+) on", printed, re.MULTILINE)[-3:]
    later = ["parts/round-1", "parts/round-2"] if which == "before" else [references[0]] * 2
    assert references[1:] == later
    with pytest.raises(SystemExit, match=r"begun with other settings \(reference\)"):
        run("rounds", output="parts", which="before" if which == "base" else "base")


@pytest.mark.nightly
def test_selection(command, counting):
    """The first policy is asked once, the reference never again; both runs make as many steps."""
    steps = len(train(command, "selection/first.yaml"))
    number = len(completions_of("quickstart/pairs.jsonl", "quickstart/held-out.jsonl"))
    assert counting.scored == number
    words = ("select", str(EXAMPLES / "selection/first.yaml"), "--set", "training.use_cpu=true")
    options = ("--run", "selection/first", "--share", "0.5", "--keep", "smallest", "--output", "selection/pairs.jsonl")
    assert counting.during(lambda: command(*words, *options)) == len(completions_of("quickstart/pairs.jsonl"))
    selected = Path("selection/pairs.jsonl").read_text("utf-8").splitlines()
    assert selected == [
        line for line in Path("quickstart/pairs.jsonl").read_text("utf-8").splitlines() if line in selected
    ]
    losses: list[float] = []
    assert counting.during(lambda: losses.extend(train(command, "selection/selected.yaml"))) == 0
    assert (len(selected), steps, len(losses)) == (20, 3, 4)  # 40 / 16 and twice 20 / 16, rounded up
