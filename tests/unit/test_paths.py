"""Paths in run files and options: `~` and environment variables, at every key that is a path."""

from pathlib import Path
from typing import Any

import pytest
import typer

from holdfast.cli.paths import expanded, path_option
from holdfast.cli.runfile import read_run_file
from holdfast.cli.yaml_document import RunFileError


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home-of-tests")
    monkeypatch.setenv("DATA", "/data of tests")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home-of-tests"),
        ("~/x", "/home-of-tests/x"),
        ("$DATA/x", "/data of tests/x"),
        ("${DATA}_2/x", "/data of tests_2/x"),
        ("$HOME/$DATA", "/home-of-tests//data of tests"),
        ("a$$b", "a$b"),
        ("x~/~", "x~/~"),
        ("org/model", "org/model"),
        ("org/model.v1-2_b", "org/model.v1-2_b"),
        ("../x y", "../x y"),
    ],
)
def test_expanded(text, path):
    assert expanded(text) == path


UNUSABLE = {
    "": "the path is empty",
    " \t\n": "the path is empty",
    "$NOT_SET/x": "the environment variable NOT_SET is not set",
    "${NOT_SET}": "the environment variable NOT_SET is not set",
    "$EMPTY/x": "the environment variable EMPTY is empty",
    "a$": r"a `\$` begins the name of a variable.*Write \$\$ for a dollar sign",
    "$1/x": r"a `\$` begins the name of a variable",
    "${DATA": r"a `\$` begins the name of a variable",
    "${DATA:-x}": r"a `\$` begins the name of a variable",
    "~nobody-of-this-name/x": "there is no user 'nobody-of-this-name'",
    "a\0b": "cannot hold the character NUL",
}


@pytest.mark.parametrize(("text", "reason"), UNUSABLE.items())
def test_what_is_no_path(text, reason):
    with pytest.raises(ValueError, match=reason):
        expanded(text)
    with pytest.raises(typer.BadParameter, match=reason):
        path_option(text)


def test_the_path_of_an_option():
    assert path_option("~/x") == Path("/home-of-tests/x")


KEYS = {
    "model": lambda run: run["model"].path,
    "model.path": lambda run: run["model"].path,
    "model.cache_dir": lambda run: run["model"].options["cache_dir"],
    "tokenizer": lambda run: run["tokenizer"].path,
    "tokenizer.path": lambda run: run["tokenizer"].path,
    "data.train": lambda run: run["data.train"].path,
    "data.train.path": lambda run: run["data.train"].path,
    "data.train.easy": lambda run: run["data.train"].sources["easy"].path,
    "data.train.easy.path": lambda run: run["data.train"].sources["easy"].path,
    "data.eval": lambda run: run["data.eval"].path,
    "data.eval.path": lambda run: run["data.eval"].path,
    "data.eval.easy": lambda run: run["data.eval"]["easy"].path,
    "data.eval.easy.path": lambda run: run["data.eval"]["easy"].path,
    "reference.model": lambda run: run["reference.model"].path,
    "reference.model.path": lambda run: run["reference.model"].path,
    "reference.model.cache_dir": lambda run: run["reference.model"].options["cache_dir"],
    "training.output_dir": lambda run: run.training_arguments().output_dir,
    "training.reference_store": lambda run: run.training_arguments().reference_store,
    "training.resume_from_checkpoint": lambda run: run.training_arguments().resume_from_checkpoint,
    "training.model_init_kwargs.cache_dir": lambda run: run.training_arguments().model_init_kwargs["cache_dir"],
    "training.model_init_kwargs.offload_folder": lambda run: run.training_arguments().model_init_kwargs[
        "offload_folder"
    ],
    "peft.tokenizer_name_or_path": lambda run: run.peft_config().tokenizer_name_or_path,
}
BESIDE = {
    "model.cache_dir": ["model.path=m"],
    "reference.model.cache_dir": ["reference.model.path=m"],
    "training.reference_store": ["training.precompute_ref_log_probs=true"],
    "peft.tokenizer_name_or_path": ["peft={peft_type: PROMPT_TUNING, num_virtual_tokens: 2}"],
}
FILES = ("training.accelerator_config", "training.deepspeed", "training.fsdp_config")


def run_with(tmp_path: Path, key: str, value: str):
    path = tmp_path / "run.yaml"
    path.write_text("training: {use_cpu: true, output_dir: out}", encoding="utf-8")
    required = {"model": "m", "data.train": "t"}
    overrides = [f"{name}={text}" for name, text in required.items() if not key.startswith(name)]
    return read_run_file(path, [*overrides, *BESIDE.get(key, []), f"{key}={value}"])


@pytest.mark.parametrize("key", KEYS)
def test_every_key_that_is_a_path_is_expanded(tmp_path, key):
    run = run_with(tmp_path, key, "$DATA/x")
    assert KEYS[key](run) == "/data of tests/x"
    assert "$DATA/x" in str(run.document.values)  # the run file of the run is as it was written


@pytest.mark.parametrize("key", [*KEYS, *FILES])
@pytest.mark.parametrize("value", ["''", "' '", "$NOT_SET/x", '"a\\0b"'])
def test_every_key_that_is_a_path_refuses_what_is_none(tmp_path, key, value):
    with pytest.raises(RunFileError, match=rf"^--set {key}: `{key}` is '.*': (the path|a path|the environment)"):
        run_with(tmp_path, key, value)


@pytest.mark.parametrize("key", ["model.revision", "data.train.split", "training.run_name", "training.hub_token"])
def test_other_text_is_as_it_was_written(tmp_path, key):
    section = key.rpartition(".")[0]
    beside = [] if section == "training" else [f"{section}.path=p"]
    path = tmp_path / "run.yaml"
    path.write_text("training: {use_cpu: true, output_dir: out}", encoding="utf-8")
    overrides = [*(["model=m"] if section != "model" else []), *(["data.train=t"] if section != "data.train" else [])]
    run = read_run_file(path, [*overrides, *beside, f"{key}=$NOT_SET ~"])
    name = key.rpartition(".")[2]
    found = getattr(run.training_arguments(), name) if section == "training" else run[section].options[name]
    assert found == "$NOT_SET ~"


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no such file"),
        ("", "is not JSON"),
        ("[" * 5000, "is not JSON"),
        ("[1]", "holds a list in JSON"),
        ("{'a': 1}", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_files_of_options(tmp_path, key, content, reason):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "options.json").write_bytes(data)
    with pytest.raises(RunFileError, match=rf"^--set {key}: `{key}` .*{reason}"):
        run_with(tmp_path, key, "options.json").training_arguments()


@pytest.mark.parametrize("key", FILES)
def test_a_folder_is_no_file_of_options(tmp_path, key):
    (tmp_path / "options.json").mkdir()
    with pytest.raises(RunFileError, match="it is a directory"):
        run_with(tmp_path, key, "options.json").training_arguments()


def test_options_in_a_file(tmp_path):
    (tmp_path / "options.json").write_text('{"even_batches": false}', encoding="utf-8")
    args: Any = run_with(tmp_path, "training.accelerator_config", "options.json").training_arguments()
    assert args.accelerator_config.even_batches is False
