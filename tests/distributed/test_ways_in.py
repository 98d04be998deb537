"""The command line under launchers: accelerate's with the configs of `examples/accelerate`, and two of torchrun's as on
two hosts, with and without a folder that both share."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import LlamaConfig, LlamaForCausalLM

import holdfast
import tiny
from holdfast.checkpoint import hosts
from holdfast.checkpoint.hosts import agreed_checkpoint, heed_hosts
from policies import config

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "examples" / "accelerate"
NAMES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")

RUN = {
    "model": "model",
    "data": {"train": "pairs.jsonl", "eval": "held.jsonl"},
    "reference": "precomputed",
    "training": {
        "output_dir": "out", "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
        "per_device_eval_batch_size": 1, "learning_rate": 0.05, "optim": "sgd", "save_steps": 2, "seed": 3,
        "disable_tqdm": True, "max_length": 512,
    },
}  # fmt: skip


# --- the configs ------------------------------------------------------------------------------------------------------


def environment_of(name: str) -> dict[str, str]:
    """What `accelerate launch` with this config tells the processes that it starts."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "holdfast.cli", "train", "run.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def test_every_config_is_in_the_table() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_config(name: str) -> None:
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert found.num_processes == 2
    assert f"--config_file {name}.yaml" in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    environment = environment_of(name)
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") is (name == "fsdp2")
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") is name.startswith("zero")


def test_fsdp_is_of_version_2_and_its_checkpoints_are_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in environment_of("fsdp2").items():
        if variable.startswith("FSDP_"):
            monkeypatch.setenv(variable, value)
    plugin: Any = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_takes_what_it_can_from_the_options(stage: int) -> None:
    environment = environment_of(f"zero{stage}")
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    written = ("ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_DEEPSPEED_CONFIG_FILE")
    assert {environment.get(name, "none") for name in written} <= {"none", "auto"}


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, pairs and `run.yaml`."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(tmp_path / "a" / "model")  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "a" / "model")
    for name, rows in (("pairs", tiny.preference_rows(16)), ("held", tiny.preference_rows(5, seed=4))):
        (tmp_path / "a" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "a" / "run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return tmp_path / "a"


def launched(launcher: list[str], place: Path, home: Path, *options: str, verb: str = "train") -> subprocess.Popen[str]:
    """Starts the command in `place` under a launcher: its module and the options for it."""
    command = [sys.executable, "-m", *launcher, "-m", "holdfast.cli", verb, "run.yaml"]
    for option in options:
        command += ["--set", f"training.{option}"]
    environment = os.environ | {
        "HOLDFAST_HOME": str(home), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "PYTHONPATH": str(Path(holdfast.__file__).parent.parent),
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def ended(*processes: subprocess.Popen[str], code: int = 0) -> list[tuple[str, str]]:
    """What launchers and their processes said, once all have ended with this code."""
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=240))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said.append(process.communicate())
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


ONE = ["holdfast.cli"]


def numbers(folder: Path) -> list[float]:
    """The losses, gradient norms and evaluations that a run has logged."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    evaluated = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    return [entry[name] for entry in history for name in ("loss", "grad_norm") if name in entry] + [
        evaluated[name] for name in ("eval_loss", "eval_rewards/margins")
    ]


def one_process(place: Path, home: Path) -> list[float]:
    """The numbers of the run of one process, with batches of 4 pairs."""
    environment = os.environ | {"HOLDFAST_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "holdfast.cli", "train", "run.yaml"]
    for option in ("output_dir=one", "per_device_train_batch_size=4"):
        command += ["--set", f"training.{option}"]
    subprocess.run(command, cwd=place, env=environment, check=True, capture_output=True, timeout=240)
    return numbers(place / "one")


@pytest.mark.slow
def test_the_run_file_under_accelerate_launch(place: Path, tmp_path: Path) -> None:
    launcher = ["accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml"), "--main_process_port", "0"]
    (said,) = ended(launched(launcher, place, tmp_path / "home"))
    assert numbers(place / "out") == pytest.approx(one_process(place, tmp_path / "home"), abs=1e-5)
    assert said[0].count("model, tokenizer and run.yaml:") == 1
    assert len(list((tmp_path / "home" / "store").iterdir())) == 1  # the run of one process has found it


@pytest.mark.nightly
@pytest.mark.slow
def test_one_process_under_accelerate_launch_where_several_were_meant(place: Path, tmp_path: Path) -> None:
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    ((_, errors),) = ended(launched(launcher, place, tmp_path / "home"), code=1)
    assert "several processes were asked of `accelerate launch`" in errors
    assert not (place / "out").exists()


def two_hosts(places: list[Path], homes: list[Path], *options: str, code: int = 0) -> list[tuple[str, str]]:
    """A launcher with two processes in each of the places, as on two hosts."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        launched(
            ["torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", f"--node_rank={i}", "--local-addr=127.0.0.1",
             "--master_addr=127.0.0.1", f"--master_port={port}"],
            place, home, "per_device_train_batch_size=1", *options,
        )
        for i, (place, home) in enumerate(zip(places, homes, strict=True))
    ]  # fmt: skip
    return ended(*processes, code=code)


@pytest.mark.nightly
@pytest.mark.slow
def test_two_hosts_with_a_folder_that_both_share(place: Path, tmp_path: Path) -> None:
    said = two_hosts([place, place], [tmp_path / "home"] * 2)
    one = one_process(place, tmp_path / "home of one")
    assert numbers(place / "out") == pytest.approx(one, abs=1e-5)
    assert [output.count("model, tokenizer and run.yaml:") for output, _ in said] == [1, 0]
    assert said[1][0] == ""
    assert "is not one folder" not in said[0][1]
    names = [
        sorted(path.name for path in (home / "store").rglob("*.safetensors"))
        for home in (tmp_path / "home", tmp_path / "home of one")
    ]
    assert len(names[0]) == len(set(names[0]))
    assert (tmp_path / "home" / "store").is_dir()


@pytest.mark.nightly
@pytest.mark.slow
def test_two_hosts_without_a_shared_folder(place: Path, tmp_path: Path) -> None:
    """Each has all of the checkpoint, so the run goes on from what each host has, the same step on all."""
    other, homes = tmp_path / "b", [tmp_path / "home a", tmp_path / "home b"]
    shutil.copytree(place, other)
    said = two_hosts([place, other], homes)
    whole = numbers(place / "out")
    assert whole == pytest.approx(one_process(place, tmp_path / "home of one"), abs=1e-5)
    assert "is not one folder for all hosts" in said[0][1]
    for folder in (place, other):
        assert (folder / "out" / "checkpoint-2" / "model.safetensors").is_file()
    assert len({*homes[0].rglob("*.safetensors")}) == len({*homes[1].rglob("*.safetensors")}) > 0
    shutil.rmtree(other / "out" / "checkpoint-4")
    two_hosts([place, other], homes, "resume_from_checkpoint=true")
    assert numbers(place / "out") == whole
    shutil.rmtree(other / "out")
    for _, errors in two_hosts([place, other], homes, "resume_from_checkpoint=true", code=1):
        assert "process 0: checkpoint-4, process 1: checkpoint-4, process 2: none, process 3: none" in errors


# --- what the processes tell each other -------------------------------------------------------------------------------


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives this process another one, on another host, which answers as it is told."""

    def answers(*answer: Any, is_main: bool = True) -> None:
        state = SimpleNamespace(
            num_processes=2, is_main_process=is_main, local_process_index=0, wait_for_everyone=lambda: None
        )
        monkeypatch.setattr(hosts, "PartialState", lambda: state)
        monkeypatch.setattr(hosts, "gather_object", lambda own: [*own, *answer])
        monkeypatch.setattr(hosts, "broadcast_object_list", lambda names: names)
        monkeypatch.setattr(hosts, "_SECONDS", 0.0)

    return answers


def checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}" / "reference").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "reference" / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [((None, "checkpoint-4", [2, 4]), 4), ((None, "checkpoint-2", [2]), 2), ((None, "checkpoint-6", [2, 6]), 2)],
)
def test_all_resume_the_newest_step_that_each_has(
    theirs: tuple[Any, ...], expected: int, other: Callable[..., None], tmp_path: Path
) -> None:
    checkpoints(tmp_path, 2, 4)
    other(theirs)
    assert agreed_checkpoint(True, tmp_path) == tmp_path / f"checkpoint-{expected}"


@pytest.mark.parametrize("theirs", [("there is none", None, None), (None, "checkpoint-3", [3])])
def test_all_stop_where_there_is_no_common_step(
    theirs: tuple[Any, ...], other: Callable[..., None], tmp_path: Path
) -> None:
    checkpoints(tmp_path, 2, 4)
    other(theirs)
    with pytest.raises(ValueError, match=r"process 0: checkpoint-4, process 1: .*Use a folder that all hosts share"):
        agreed_checkpoint(True, tmp_path)


def test_a_folder_of_its_own_on_each_host(other: Callable[..., None], tmp_path: Path) -> None:
    args = config(tmp_path, save_strategy="steps")
    other((False, 0))
    changed = heed_hosts(args)
    assert (args.save_on_each_node, changed.save_on_each_node) == (False, True)
    other((True, 0))
    assert heed_hosts(args) is args
    assert [path.name for path in tmp_path.iterdir()] == []


def test_one_folder_that_each_host_would_write_to(other: Callable[..., None], tmp_path: Path) -> None:
    args = config(tmp_path, save_on_each_node=True)
    other((True, 0))
    with pytest.raises(ValueError, match=r"save_on_each_node=True was asked for, but output_dir=.* for all 2 hosts"):
        heed_hosts(args)
    other((True, 1))  # two processes of one host
    assert heed_hosts(args) is args
