"""The commands, apart from training itself (`tests/end_to_end/test_cli_train.py`): arguments, messages, exit codes."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import holdfast
import holdfast.demo
from holdfast.cli import app as cli
from holdfast.cli import errors
from holdfast.cli.yaml_document import RunFileError

runner = CliRunner()
SMALLEST = "model: nowhere/policy\ndata: {train: pairs.jsonl}\ntraining: {use_cpu: true, output_dir: OUTPUT}\n"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST.replace("OUTPUT", str(tmp_path / "out")), encoding="utf-8")
    return path


def invoke(*arguments: object):
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"holdfast {holdfast.__version__}\n")


def test_a_mistyped_key_is_a_message_with_exit_code_2(run_file):
    result = invoke("train", run_file, "--set", "training.btea=0.2")
    assert result.exit_code == 2
    assert one_line(result.stderr) == (
        "error: --set training.btea: `training.btea` is not a key of the section `training`. Did you mean `beta`?"
    )
    assert "Traceback" not in result.output


def test_debug_keeps_the_traceback(run_file):
    result = invoke("train", run_file, "--set", "training.btea=0.2", "--debug")
    assert isinstance(result.exception, RunFileError)
    assert "error:" not in result.output


def test_a_missing_run_file(tmp_path):
    result = invoke("train", tmp_path / "nowhere.yaml")
    assert result.exit_code == 2
    assert "nowhere.yaml: no such run file." in one_line(result.stderr)


@pytest.mark.parametrize("command", ["train", "demo"])
def test_an_output_folder_that_cannot_be_written_to_is_found_before_anything_is_loaded(run_file, tmp_path, command):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "out"
    more = (run_file, "--set", f"training.output_dir={folder}") if command == "train" else ("--output", folder)
    result = invoke(command, *more)
    assert result.exit_code == 1
    assert f"error: the output folder is to be '{folder}', which cannot be written to (" in one_line(result.stderr)
    assert "Choose another folder, or change its permissions." in one_line(result.stderr)


def test_a_model_that_is_nowhere(run_file):
    result = invoke("train", run_file)
    assert result.exit_code == 1
    assert "error: the tokenizer was to be loaded from 'nowhere/policy', which failed:" in one_line(result.stderr)
    assert "as `tokenizer:` (default: the model's)." in one_line(result.stderr)


HIDDEN = "hf_never-shown"
TOKEN = f"training.hub_token={HIDDEN}"
COMMAND_LINES = {  # what follows `holdfast`, and the exit code; FILE is a run file whose model is nowhere
    "no run file": ("train", 2),
    "an empty name": ("train ''", 2),
    "a blank name": ("train ' '", 2),
    "a pipe": ("train fifo", 2),
    "a folder": ("precompute .", 2),
    "a device": ("train /dev/zero", 2),
    "an empty file": ("train /dev/null", 2),
    "a long name": (f"train {'x' * 300}", 2),
    "a variable that is not set": ("train '$NOT_SET_IN_TESTS/run.yaml'", 2),
    "a user who is not there": ("train '~nobody-of-this-name/x'", 2),
    "a name that steers the terminal": ("train '\x1b]0;owned\x07'", 2),
    "an option that steers the terminal": ("train FILE '--\x1b[31m'", 2),
    "a command that steers the terminal": ("'\x1b[2J'", 2),
    "a key that steers the terminal": ("train FILE --set 'training.\x1b[31m=1'", 2),
    "a value that steers the terminal": ("train FILE --set 'model=\"\\e]0;owned\\a\"'", 1),
    "a section that is a number": ("train FILE --set training=3", 2),
    "a number without end": (f"train FILE --set training.beta={'9' * 5000}", 2),
    "an adapter out of range": ("precompute FILE --set 'peft={r: -4}'", 2),
    "an evaluation without data": ("train FILE --set training.eval_strategy=steps", 2),
    "an empty output folder": ("train FILE --set \"training.output_dir=''\"", 2),
    "a model that is nowhere": ("train FILE", 1),
    "what cannot be computed ahead": ("precompute FILE --set training.sync_ref_model=true", 1),
    "a secret of the wrong type": (f"train FILE --set training.hub_token=[{HIDDEN}]", 2),
    "a secret that is no YAML": (f"train FILE --set 'training.hub_token=[{HIDDEN}'", 2),
    "a key inside of a secret": (f"train FILE --set {TOKEN} --set training.hub_token.x=1", 2),
    "a secret beside a mistake": (
        f"train FILE --set {TOKEN} --set training.run_name=[{HIDDEN}]",
        2,
    ),
    "a secret in a library's message": (f"train FILE --set {TOKEN} --set model=no/{HIDDEN}", 1),
    "a secret inside of a mapping": (f"train FILE --set training.model_init_kwargs={{token: [{HIDDEN}], a: 1e999}}", 2),
    "data without a run file": ("data", 2),
    "data of a model that is nowhere": ("data FILE", 1),
    "data into a folder that is none": ("data FILE --html nowhere/x.html", 1),
    "data into a name that steers the terminal": ("data FILE --json '\x1b[2J/x'", 1),
    "data into no name": ("data FILE --png ''", 2),
    "data of a set that is none": ("data FILE --dataset '\x1b[2J'", 2),
    "data, a row below 0": ("data FILE --row -1", 2),
    "data, no rows": ("data FILE --limit 0", 2),
    "data, a number without end": (f"data FILE --rows {'9' * 40}", 2),
    "a seed below 0": ("demo --seed -1", 2),
    "a seed without end": (f"demo --seed {'9' * 30}", 2),
    "a seed that is no number": ("demo --seed x", 2),
    "an empty folder of the demo": ("demo --output ''", 2),
    "an empty folder of stores": ("store list --root ''", 2),
    "a folder of stores by a variable": ("store list --root '$NOT_SET_IN_TESTS'", 2),
    "an empty file to import": ("store import ''", 2),
    "an empty file to export": ("store export abc ' '", 2),
    "no command of the store": ("store nothing", 2),
}


@pytest.mark.parametrize(("line", "exit_code"), COMMAND_LINES.values(), ids=COMMAND_LINES.keys())
def test_an_odd_command_line_is_a_message(run_file, tmp_path, monkeypatch, line, exit_code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    os.mkfifo("fifo")
    result = invoke(*shlex.split(line.replace("FILE", str(run_file))))
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    shown = result.output + result.stderr
    assert shown.strip()
    assert re.search("Traceback|[\x00-\x09\x0b-\x1f\x7f]", shown) is None
    assert HIDDEN not in shown
    assert not (tmp_path / "out" / "run.yaml").exists()


@pytest.mark.parametrize("mask", ["<secret, not written>", "<HUB_TOKEN>"])
@pytest.mark.parametrize("key", ["training.hub_token", "training.model_init_kwargs.token"])
def test_the_mask_of_a_secret_is_refused(run_file, key, mask):
    result = invoke("train", run_file, "--set", f"{key}={mask}")
    assert result.exit_code == 2
    assert f"`{key}` is '{mask}': a run writes its run file without secrets. Write it again" in one_line(result.stderr)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes.\nMore lines"),
    ],
)
def test_memory_that_is_used_up_is_a_message(monkeypatch, run_file, error):
    monkeypatch.setattr(cli, "_train", raising(error, "torch.nn"))
    result = invoke("train", run_file)
    assert result.exit_code == 1
    assert "error: the memory is used up: " in one_line(result.stderr)
    assert "set tokens_per_batch" in one_line(result.stderr)


def test_a_rank_that_is_no_number_is_the_first():
    command = [sys.executable, "-c", "from holdfast.cli.errors import RANK; print(RANK)"]
    for rank, shown in (("x", "0"), ("", "0"), ("2", "2")):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "RANK": rank})
        assert done.stdout == f"{shown}\n"


def raising(error: Exception, module: str):
    """A function that raises from the code of a module of that name."""
    namespace: dict[str, object] = {"__name__": module, "error": error}
    exec("def fail(*arguments, **options):\n    raise error", namespace)
    return namespace["fail"]


@pytest.mark.parametrize(
    ("error", "module", "is_message"),
    [
        (ValueError("ours"), "holdfast.data.load", True),
        (TypeError("ours"), "holdfast.trainer", True),
        (FileNotFoundError(2, "No such file", "pairs.jsonl"), "datasets.load", True),
        (MemoryError(), "safetensors", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "torch", True),
        (RuntimeError("shapes"), "torch", False),
        (ValueError("shapes do not match"), "torch.nn", False),
        (KeyError("ours"), "holdfast.trainer", False),
        (ValueError("a plug-in"), "holdfast_plugin", False),
    ],
)
def test_which_errors_are_messages(monkeypatch, run_file, error, module, is_message):
    monkeypatch.setattr(cli, "_train", raising(error, module))
    result = invoke("train", run_file)
    assert result.exit_code == 1
    assert ("error: " in result.stderr) is is_message
    assert isinstance(result.exception, SystemExit if is_message else type(error))


def test_brackets_in_an_error_are_not_markup(monkeypatch, run_file):
    monkeypatch.setattr(cli, "_train", raising(ValueError("found [red] in ['a', 'b']"), "holdfast.trainer"))
    assert one_line(invoke("train", run_file).stderr) == "error: found [red] in ['a', 'b']"


def test_a_later_process_says_which_one_it_is(monkeypatch, run_file):
    monkeypatch.setattr(errors, "RANK", 3)
    monkeypatch.setattr(cli, "_train", raising(ValueError("out of reach"), "holdfast.trainer"))
    assert one_line(invoke("train", run_file).stderr) == "error: [rank 3] out of reach"


def test_the_report_has_the_numbers_and_the_places(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_output", Console(width=200))
    cli._report(tmp_path, {"train_loss": 0.69314718, "epoch": 1.0})
    printed = capsys.readouterr().out
    assert "0.693147" in printed
    assert f"model, tokenizer and run.yaml: {tmp_path}\n" in printed
    assert f"logged numbers: {tmp_path / 'trainer_state.json'}\n" in printed


@dataclass
class Result:
    exit_code: int


@pytest.mark.parametrize("exit_code", [0, 1])
def test_demo_passes_on_its_options_and_fails_if_its_checks_do(monkeypatch, tmp_path, exit_code):
    calls = []
    result = Result(exit_code)
    monkeypatch.setattr(holdfast.demo, "run_demo", lambda *args, **kwargs: calls.append((args, kwargs)) or result)
    assert invoke("demo", "--output", tmp_path / "demo", "--seed", 7).exit_code == exit_code
    assert calls == [((tmp_path / "demo",), {"seed": 7})]


def test_every_default_of_a_command_can_be_used(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(holdfast.demo, "run_demo", lambda *args, **kwargs: calls.append(args) or Result(0))
    assert invoke("demo").exit_code == 0
    assert calls == [(Path("holdfast-demo"),)]
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    for command in ("list", "verify", "gc"):
        assert invoke("store", command).exit_code == 0


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert {"train", "data", "demo"} <= set(result.output.split())


def test_the_module_runs_as_a_program_and_stays_light():
    code = "import sys, holdfast.cli.app; print({'torch', 'transformers', 'datasets', 'peft'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    command = [sys.executable, "-m", "holdfast.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"holdfast {holdfast.__version__}\n"


def test_only_the_first_process_prints():
    code = "from holdfast.cli import app as cli; cli._report(__import__('pathlib').Path('out'), {'loss': 1.0})"
    printed = {
        rank: subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "RANK": rank}
        ).stdout
        for rank in ("0", "1")
    }
    assert "loss" in printed["0"]
    assert printed["1"] == ""


def test_no_command_prints_the_help():
    result = invoke()
    assert "Usage:" in result.output
    assert result.exit_code == 2


def test_app_is_the_entry_point():
    assert isinstance(cli.app, typer.Typer)
