"""Every long command is asked to end at random instants, by each signal, and then run again: the exit code says which
signal it was, one message says how to go on, nothing half-written is left, nothing scored is lost, and what comes of it
is what comes of a run that nothing interrupted, bit for bit.

`make test` has one instant for a few commands and for each way to end them, `make nightly` twenty for all.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import holdfast
import interruptions
import tiny
from holdfast.cli.yaml_text import to_yaml
from holdfast.store.files import DROPPED, PARTIAL
from holdfast.store.maintenance import stores, verify
from holdfast.store.work_sharing import CLAIM

pytestmark = pytest.mark.slow

NUM_INSTANTS = 20
RUN: dict[str, Any] = {
    "model": "model",
    "data": {"train": "pairs.jsonl"},
    "reference": "model",
    "training": {
        "output_dir": "out", "beta": 0.5, "learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": 100, "max_length": 64, "report_to": "none",
        "use_cpu": True, "optim": "adamw_torch", "disable_tqdm": True,
    },
}  # fmt: skip
EVALUATED = ("data.eval=held-out.jsonl", "training.eval_strategy=steps", "training.eval_steps=2")
BY_EPOCH = tuple(f"training.{name}_strategy=epoch" for name in ("eval", "logging", "save"))
MOVING = ("training.sync_ref_model=true", "training.ref_model_sync_steps=2", "training.reference_window=3")
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "run.yaml", *EVALUATED),
    "train by epochs": ("train", "run.yaml", "data.eval=held-out.jsonl", *BY_EPOCH, "training.num_train_epochs=2"),
    "train a LoRA, saved at the end": ("train", "run.yaml", "peft={r: 2}", "reference=adapter",
                                       "training.save_strategy=no", "training.save_only_model=true"),
    "train a stream in windows": ("train", "run.yaml", "data.train={path: pairs.jsonl, streaming: true}",
                                  "reference=snapshot", "training.snapshot_device=disk", *MOVING),
    "train with workers": ("train", "run.yaml", "training.dataloader_num_workers=1",
                           "training.enable_jit_checkpoint=true"),
    "train, precomputed": ("train", "run.yaml", "reference=precomputed", "training.precompute_ref_batch_size=1"),
    "python": ("python",),
    "precompute": ("precompute", "run.yaml", "training.precompute_ref_batch_size=1"),
    "store list": ("store", "list"),
    "store verify": ("store", "verify"),
    "store gc": ("store", "gc", "--yes"),
    "store export": ("store", "export", "KEY", "exported.parquet"),
    "store import": ("store", "import", "given.parquet", "--root", "imported"),
    "demo": ("demo", "--output", "out"),
}  # fmt: skip
ENDS: dict[str, tuple[int, int]] = {
    "SIGTERM": (signal.SIGTERM, 143),
    "SIGINT": (signal.SIGINT, 130),
    "SIGUSR1": (signal.SIGUSR1, 138),
    "SIGTERM twice": (signal.SIGTERM, -signal.SIGTERM),
    "SIGKILL": (signal.SIGKILL, -signal.SIGKILL),
}
"""By name: the signal, and the exit code."""

Life = Callable[..., dict[str, Any]]


def arguments(command: str) -> list[str]:
    """The command line; a word with `=` changes a value of the run file."""
    words = COMMANDS[command]
    return [part for word in words for part in (("--set", word) if "=" in word and words[0] != "store" else (word,))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, pairs and a run file, which each command gets a copy of."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **ids)
    ).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, number in (("pairs", 16), ("held-out", 6)):
        rows = tiny.preference_rows(number, seed=number)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(to_yaml(RUN))
    return folder


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    """(argv, folder, at) -> what came of it; see `interruptions`."""
    paths = [Path(interruptions.__file__).parent, Path(holdfast.__file__).parent.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, interruptions.__file__], env=environment, **pipes) as process:

        def lived(argv: list[str], folder: Path, at: list[tuple[int, int]] | None = None) -> dict[str, Any]:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps({"argv": argv, "folder": str(folder), "at": at or []}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield lived
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module")
def control(place: Path, life: Life, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a command finds, how many events it takes, and what comes of it when nothing interrupts it."""
    known: dict[str, Any] = {}

    def of(command: str) -> Any:
        if command not in known:
            folder = tmp_path_factory.mktemp("control") / "whole"
            shutil.copytree(place, folder)
            argv = arguments(command)
            if argv[0] == "store":
                assert life(["precompute", "run.yaml"], folder)["code"] == 0
                key = next((folder / "home/store").iterdir()).name
                argv = [key if word == "KEY" else word for word in argv]
                assert life(["store", "export", key, "given.parquet"], folder)["code"] == 0
            shutil.copytree(folder, found := folder.with_name("found"))
            answer = life(argv, folder)
            assert answer["code"] == 0, answer["text"]
            known[command] = argv, found, answer["events"], result(command, folder)
        return known[command]

    return of


def result(command: str, folder: Path) -> Any:
    """What came of a command: weights and logs; or what stores hold."""
    out = folder / "out"
    if command == "demo":
        return json.loads((out / "results.json").read_text())["arms"][0]["measurement"]
    if command.startswith(("train", "python")):
        weights = next(load_file(path) for path in sorted(out.glob("*model.safetensors")))
        digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
        unlike = ("runtime", "per_second", "flos", "train_loss")
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return digest, [{k: v for k, v in row.items() if not any(part in k for part in unlike)} for row in log]
    roots = [root for root in (folder / "home/store", folder / "imported") if root.exists()]
    assert [damage for root in roots for damage in verify(root)] == []
    return [(facts.name, facts.num_completions) for root in roots for facts in stores(root)]


def check_left(command: str, folder: Path, answer: dict[str, Any]) -> None:
    """Nothing is left that looks finished, or that nobody needs; one message says what was done."""
    text = answer["text"]
    assert "Traceback" not in text, text
    assert "Exception ignored" not in text, text
    said = [line for line in text.splitlines() if line.lower().startswith(("stopped by", "keyboardinterrupt: stopped"))]
    assert len(said) == 1, text
    if "The model is trained" not in text:
        finals = ["*model.safetensors", "run.yaml", "results.json", "train_results.json"]
        assert [path for name in finals for path in (folder / "out").glob(name)] == []
    for ending in (CLAIM, PARTIAL, DROPPED):
        assert [path for path in folder.rglob(f"*{ending}") if "_reference" not in path.parts] == []


def check_interrupted(command: str, end: str, draw: random.Random, life: Life, control: Any, folder: Path) -> None:
    argv, found, num_events, expected = control(command)
    shutil.copytree(found, folder)
    number, code = ENDS[end]
    instant = draw.randint(1, num_events)
    answer = life(argv, folder, [(instant, number), *([(instant + 1, number)] if "twice" in end else [])])
    where = f"{command}, {end} at event {instant} of {num_events}: {answer['code']}\n{answer['text'][-3000:]}"
    is_over = command == "python" and "train_runtime" in answer["text"]  # the script goes on by itself
    allowed = {0, code} | ({128 + number} if "twice" in end else set()) | ({-number} if is_over else set())
    assert answer["code"] in allowed, where
    if answer["code"] > 0:
        check_left(command, folder, answer)
    if answer["code"] != 0:
        resumed: list[str] = []
        if command.startswith(("train", "python")) and any(folder.glob("out/checkpoint-*/reference/manifest.json")):
            resumed = ["true"] if command == "python" else ["--set", "training.resume_from_checkpoint=true"]
        again = life([*argv, *resumed], folder)
        assert again["code"] == 0, f"{where}\nagain: {again['text'][-3000:]}"
        if kept := re.search(r"(\d+) of (\d+) completions \(train\) are kept", answer["text"]):
            num_kept, num_all = map(int, kept.groups())
            found_again = f"{num_kept} of {num_all} completions found in the store, {num_all - num_kept} scored"
            assert command != "precompute" or found_again in again["text"], f"{where}\nagain: {again['text'][-3000:]}"
    assert result(command, folder) == expected, where


@pytest.mark.covering(1)
@pytest.mark.parametrize("end", [*ENDS])
@pytest.mark.parametrize("command", ["train", "precompute", "python", "store import"])
def test_ended_at_an_instant(command: str, end: str, life: Life, control: Any, tmp_path: Path) -> None:
    check_interrupted(command, end, random.Random(f"{command} {end}"), life, control, tmp_path / "ended")


@pytest.mark.nightly
@pytest.mark.parametrize("end", [*ENDS])
@pytest.mark.parametrize("command", [*COMMANDS])
def test_ended_at_many_instants(command: str, end: str, life: Life, control: Any, tmp_path: Path) -> None:
    draw = random.Random(f"{command}, many, {end}")
    for number in range(3 if command == "demo" else NUM_INSTANTS):
        check_interrupted(command, end, draw, life, control, tmp_path / f"{number}")
        shutil.rmtree(tmp_path / f"{number}")
