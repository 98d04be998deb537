"""What an attack begins with: a folder with a tiny model, data in every format, a run file, a run's checkpoints and a
store, made once and copied for each attack."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import tiny
from attacks.arena import run

RUN: dict[str, Any] = {
    "model": "model",
    "data": {"train": "pairs.jsonl"},
    "reference": "model",
    "training": {
        "output_dir": "out",
        "beta": 0.5,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "save_steps": 2,
        "max_length": 64,
        "report_to": "none",
        "use_cpu": True,
        "optim": "adamw_torch",
        "disable_tqdm": True,
    },
}


def make_model(folder: Path, seed: int = 0) -> None:
    """A model of two layers with its tokenizer."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of plain text."""
    return [
        {name: row[name][-1]["content"] for name in ("prompt", "chosen", "rejected")}
        for row in tiny.preference_rows(number, seed)
    ]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_place(folder: Path) -> Path:
    """The folder that attacks copy. In `out` lies a finished run with two checkpoints, in `home/store` a store that
    `precompute` filled."""
    from holdfast.cli.yaml_text import to_yaml

    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    (folder / "pairs.jsonl").write_text(jsonl(tiny.preference_rows(12)))
    (folder / "run.yaml").write_text(to_yaml(RUN))
    for command in (["train", "run.yaml"], ["precompute", "run.yaml"]):
        outcome = run(command, folder=folder)
        assert outcome.code == 0, outcome.text
    (folder / "said.txt").unlink()
    return folder


def fresh(place: Path, folder: Path) -> Path:
    """A copy of the place."""
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place, folder)
    return folder
