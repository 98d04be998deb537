"""What a report reads: the record, or the logs of a run without one, and what stands in the last checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from holdfast.checkpoint import foreign
from holdfast.report.findings import time_by_part
from holdfast.report.run import STATE, read_run, read_runs
from runs import moving, write_checkpoint, write_run, write_state


def test_a_run_with_a_record(tmp_path):
    run = read_run(write_run(tmp_path / "run", num_logs=20, num_evaluations=4, syncs=(50, 100), facts=moving()))
    steps, margins = run.series("rewards/margins")
    assert steps.tolist() == list(range(10, 201, 10))
    assert margins == pytest.approx([1.2 * step / 200 for step in steps])
    assert run.series("eval_loss")[0].tolist() == [50, 100, 150, 200]
    assert run.evaluations == ("eval_",)
    assert "eval_runtime" not in run.metrics
    assert (run.last_step, run.last("rewards/accuracies"), run.last("nothing")) == (200, pytest.approx(0.8), None)
    assert run.syncs() == [(50, "sync 1 of the reference"), (100, "sync 2 of the reference")]


def test_a_run_without_a_record(tmp_path):
    run = read_run(write_state(tmp_path / "run"))
    assert (run.facts, run.last_step, run.is_over) == (None, 200, True)
    assert run.last("rewards/margins") == pytest.approx(1.2)
    assert not [name for name in run.metrics if name.startswith("train_") or name == "total_flos"]


def test_the_logs_of_a_checkpoint_are_read_where_the_folder_has_none(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 200)
    write_state(checkpoint)
    for folder in (tmp_path, checkpoint):
        run = read_run(folder)
        assert run.last_step == 200
        assert run.checkpoint is not None
        assert run.checkpoint.step == 200
        assert run.checkpoint.manifest["weights"] == "ab" * 16


def test_syncs_are_told_from_the_logs_where_there_are_no_events(tmp_path):
    """Versions 1, 1, 2 with ages 2, 12, 2 at the steps 10, 20, 30: synced at 8 and 28."""
    logs = [(10, 1, 2), (20, 1, 12), (30, 2, 2)]
    history = [{"step": step, "reference/version": version, "reference/age": age} for step, version, age in logs]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    assert read_run(tmp_path).syncs() == [(8, "sync 1"), (28, "sync 2")]


def test_a_damaged_manifest_is_said(tmp_path):
    write_run(tmp_path)
    checkpoint = write_checkpoint(tmp_path, 100)
    (checkpoint / "reference" / "manifest.json").write_text("{", encoding="utf-8")
    run = read_run(tmp_path)
    assert run.checkpoint is not None
    assert run.checkpoint.manifest == {}
    assert "manifest.json" in run.checkpoint.damage


def test_seconds_by_part(tmp_path):
    """Logs at the steps 10 and 30: 10 steps of 1 s and 20 steps of 2 s are 50 s."""
    history = [{"step": 10, "time/policy": 1.0}, {"step": 10, "eval_loss": 1.0}, {"step": 30, "time/policy": 2.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    assert time_by_part(read_run(tmp_path)) == {"policy": 50}


def test_names_tell_runs_apart(tmp_path):
    folders = [write_state(tmp_path / one / "out") for one in ("a", "b")] + [write_state(tmp_path / "c")]
    assert [run.name for run in read_runs(folders)] == ["a/out", "b/out", f"{tmp_path.name}/c"]
    assert [run.name for run in read_runs(folders[2:])] == ["c"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "there is no such folder. Name the output folder"),
        (lambda folder: _written(folder / "file", ""), "that is a file. Name the output folder"),
        (lambda folder: folder, "neither a run's record .* nor a trainer_state.json"),
        (lambda folder: _written(folder / "trainer_state.json", "{").parent, "was read as the logs of a run and is"),
        (lambda folder: _written(folder / "trainer_state.json", "[]").parent, "damaged"),
        (lambda folder: _written(folder / "trainer_state.json", '{"log_history": [{}]}').parent, "damaged"),
    ],
)  # fmt: skip
def test_what_is_no_run(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        read_run(make(tmp_path))


def test_a_report_is_read_without_the_libraries_that_train(tmp_path):
    """They would take most of the time of the command."""
    write_run(tmp_path)
    code = (
        "import sys; from holdfast.report.files import write_own_report; from pathlib import Path; "
        f"write_own_report(Path({str(tmp_path)!r})); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_files_are_those_of_transformers():
    assert (foreign.TRAINER_STATE_NAME, foreign.TRAINING_ARGS_NAME) == (TRAINER_STATE_NAME, TRAINING_ARGS_NAME)
    assert STATE == TRAINER_STATE_NAME


def test_a_run_that_is_named_twice(tmp_path):
    write_state(tmp_path)
    with pytest.raises(ValueError, match="is named twice"):
        read_runs([tmp_path, tmp_path / "." / ""])


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
