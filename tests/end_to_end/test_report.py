"""`holdfast report`, and the report that `holdfast train` leaves: its numbers are the run's, whatever its end."""

import json
import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerCallback
from typer.testing import CliRunner

import holdfast.cli.assembly
import tiny
from browser import opened
from holdfast.cli.app import app
from page_workplace import make_model
from runs import write_run, write_state

RUN = """\
model: model
data: {train: pairs.jsonl, eval: held-out.jsonl}
peft: {r: 4, target_modules: all-linear}
training: {output_dir: out, max_steps: 6, save_steps: 2, logging_steps: 1, eval_strategy: steps, eval_steps: 3,
           per_device_train_batch_size: 2, learning_rate: 0.01, use_cpu: true, report_to: none}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, pairs and a run file."""
    folder = tmp_path_factory.mktemp("report")
    make_model(folder / "model")
    for seed, name in enumerate(("pairs", "held-out")):
        rows = "\n".join(json.dumps(row) for row in tiny.preference_rows(8, seed=seed))
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    return folder


def command(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*words], env={"COLUMNS": "80"})
    return result.exit_code, result.output


def train(output: str, *overrides: str) -> tuple[int, str]:
    options = [word for each in (f"training.output_dir={output}", *overrides) for word in ("--set", each)]
    return command("train", "run.yaml", *options)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action) -> None:
    """Lets the trainers of run files do something after a step."""

    class Acting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == step:
                action()

    make = holdfast.cli.assembly.trainer_of

    def with_callback(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.add_callback(Acting())
        return trainer

    monkeypatch.setattr(holdfast.cli.assembly, "trainer_of", with_callback)


def content(output: str) -> dict:
    (run,) = json.loads(Path(output, "report.json").read_bytes())["runs"]
    return run


@pytest.mark.slow
def test_the_report_of_a_run(folder, monkeypatch):
    """Its series are the numbers of `trainer_state.json`, its syncs are every second step, its reference is the one
    that the last checkpoint names, and the command writes the same page again."""
    monkeypatch.chdir(folder)
    code, text = train("out", "training.sync_ref_model=true", "training.ref_model_sync_steps=2")
    assert code == 0, text
    assert "out/report.html" in text
    found = content("out")
    history = json.loads(Path("out/trainer_state.json").read_bytes())["log_history"]
    for metric in ("loss", "rewards/margins", "reference/kl_chosen", "eval_loss", "eval_rewards/accuracies"):
        logged = [[entry["step"], entry[metric]] for entry in history if metric in entry]
        assert found["series"][metric][: len(logged)] == logged
    assert found["syncs"] == [2, 4, 6]
    assert (found["outcome"], found["last_step"]) == ("finished", 6)
    manifest = json.loads(Path("out/checkpoint-6/reference/manifest.json").read_bytes())
    said = " ".join(found["answers"][0]["more"])
    assert manifest["weights"][:12] in said
    assert "3 syncs so far, the last one at step 6" in said
    before = Path("out/report.html").read_bytes()
    code, text = command("report", "out")
    assert code == 0, text
    assert Path("out/report.html").read_bytes() == before
    page = opened(Path("out/report.html"), width=400)
    assert (page.complaints, page.requests, page.too_wide) == ((), (), ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "code", "outcome"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "interrupted"),
        (lambda: 1 // 0, 1, "failed"),
    ],
)
def test_the_report_of_a_run_that_did_not_finish(folder, monkeypatch, action, code, outcome):
    monkeypatch.chdir(folder)
    at_step(monkeypatch, 3, action)
    assert train(outcome)[0] == code
    found = content(outcome)
    assert found["outcome"] == outcome
    step = {"interrupted": 3, "failed": 2}[outcome]
    answer = found["answers"][3]
    assert answer["short"].startswith(f"From checkpoint-{step}, at step {step} of 6")
    assert Path(outcome, "report.png").is_file()


@pytest.mark.slow
def test_a_run_that_never_began_writes_no_report(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write_run(folder / "earlier")
    code, _ = train("earlier", "training.sync_ref_model=true", "training.ref_model_sync_steps=50")
    assert code == 1
    assert not (folder / "earlier" / "report.html").exists()


@pytest.mark.slow
def test_a_run_without_a_record_has_its_report_from_the_logs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert train("plain", "training.run_record=false")[0] == 0
    found = content("plain")
    assert found["facts"] is None
    assert [step for step, _ in found["series"]["loss"]] == [1, 2, 3, 4, 5, 6]
    assert found["answers"][0]["short"].startswith("the policy as it was handed in")


# The command ---------------------------------------------------------------------------------------------------------


def test_several_runs_go_into_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_state(tmp_path / "b")
    code, text = command("report", "a", "b")
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "report.html", "report.json", "report.png"]
    assert "a: finished, step 200 of 200" in text
    assert "b: 200 steps were logged" in text


def test_only_the_files_that_are_named_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    before = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert command("report", "a", "--json", "x.json")[0] == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x.json"]


def test_what_is_piped_has_no_control_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harm = "\x1b[31m\u202e"
    write_run(tmp_path / f"a{harm}")
    code, text = command("report", f"a{harm}")
    assert code == 0
    assert not [each for each in text if not each.isprintable() and each != "\n"]
    assert "\\x1b[31m\\u202e" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "there is no such folder"),
        (["a", "a"], "named twice"),
        (["a", "--html", "no/such/x.html"], "there is no folder 'no/such'"),
        (["a", "--png", "a"], "which is a folder"),
    ],
)
def test_messages(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    code, text = command("report", *words)
    assert code == 1
    assert message in " ".join(text.split())
    assert "Traceback" not in text
