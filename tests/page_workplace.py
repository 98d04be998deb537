"""The folder in which the code blocks of a page run: whatever a block names is there, small and made on the spot.

A page says `path/to/model`, `pairs.jsonl` or `train_dataset` without making them. Here they are stand-ins: a Llama of
one layer, eight pairs, a run file of a few steps. What a page makes itself (by a block with a title, or by a command)
takes the place of a stand-in.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tiny
from code_blocks import ROOT
from holdfast import DPOConfig, DPOTrainer
from holdfast.quickstart.folder import write_quickstart

MODELS = ("model", "path/to/model", "path/or/hub-id", "sft", "another-sft", "path/to/sft", "org/model")
"""Names by which pages speak of a model."""

ROWS = ("pairs.jsonl", "held-out.jsonl", "maths.jsonl", "chat.jsonl", "org/chat/train.jsonl")
"""Names by which pages speak of a file of pairs."""

ADAPTERS = ("sft-adapter",)

FOLDERS_OF_THE_REPOSITORY = ("benchmarks", "dev", "docs", "examples", "tests")

RUN_FILE = """\
model: model
data: {train: pairs.jsonl, eval: held-out.jsonl}
peft: {r: 4}
training: {output_dir: out, max_steps: 2, save_steps: 1, logging_steps: 1, use_cpu: true, report_to: none}
"""


def make_model(folder: Path) -> None:
    """A Llama of one layer, with its tokenizer."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@final
class Workplace:
    """A page's folder. `folder` is made of links to `shared`, in which the stand-ins are kept for all pages."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self.folder = folder
        self._shared = shared
        self.names: dict[str, Any] = {}

    def fill(self) -> None:
        """Puts everything there that a block may name and that costs nothing."""
        if not (self._shared / "model").exists():
            make_model(self._shared / "model")
        for name in MODELS:
            self._link(name, self._shared / "model")
        for name in FOLDERS_OF_THE_REPOSITORY:
            self._link(name, ROOT / name)
        for seed, name in enumerate(ROWS):
            rows = "\n".join(json.dumps(row) for row in tiny.preference_rows(8, seed=seed))
            self.write(name, rows + "\n")
        self.write("run.yaml", RUN_FILE)
        self.write(".venv/bin/activate", "")

    def write(self, name: str, text: str) -> None:
        """A file of the page."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")

    def provide(self, text: str, train: Callable[[str], None]) -> None:
        """Makes what the text names and is not there: an adapter, the quickstart's folder, or a finished run in `out`,
        by `train(run file)`."""
        if "quickstart/" in text and "holdfast quickstart" not in text and not (self.folder / "quickstart").exists():
            write_quickstart(self.folder / "quickstart", num_steps=(2, 2), num_pairs=40)
        for name in ADAPTERS:
            if name in text and not (self.folder / name).exists():
                base = AutoModelForCausalLM.from_pretrained(self._shared / "model")
                get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(self.folder / name)
                (self.folder / name / "README.md").unlink(missing_ok=True)
        if "python examples/" not in text and _names_a_run(text) and not (self.folder / "out").exists():
            finished = self._shared / "out"
            if not finished.exists():
                self.write("stand-in.yaml", RUN_FILE)
                train("stand-in.yaml")
                shutil.copytree(self.folder / "out", finished)
            else:
                shutil.copytree(finished, self.folder / "out")

    def names_for(self, code: str) -> Mapping[str, Any]:
        """The names that the page's Python code so far has, and stand-ins for those of this code that nothing made."""
        wanted = {name for name in STAND_INS if name in _names_in(code)} - self.names.keys()
        self.names |= {name: STAND_INS[name](self) for name in wanted}
        return self.names

    def _link(self, name: str, target: Path) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target, target_is_directory=True)


def _names_a_run(text: str) -> bool:
    """Whether a command of the text reads a run's folder that should be there by now."""
    words = text.split()
    return any(
        word == "out" or word.startswith(("out/", "OUT")) for word, before in zip(words[1:], words, strict=False)
        if not before.endswith(("--output", "output_dir:", "output_dir"))
    )  # fmt: skip


def _names_in(code: str) -> set[str]:
    """The names that a piece of Python code reads or writes."""
    found: set[str] = set()

    def visit(part: Any) -> None:
        found.update(part.co_names, part.co_freevars)
        for constant in part.co_consts:
            if hasattr(constant, "co_names"):
                visit(constant)

    visit(compile(code, "block", "exec"))
    return found


def _rows(seed: int) -> Callable[[Workplace], Dataset]:
    return lambda place: Dataset.from_list(tiny.preference_rows(8, seed=seed))


def _model(place: Workplace) -> Any:
    return AutoModelForCausalLM.from_pretrained("model")


def _trainer(place: Workplace) -> DPOTrainer:
    """One that has been stopped after its first step, and is made again."""
    rows, folder = _rows(0)(place), str(place.folder / "of-the-trainer")
    for num_steps in (1, 2):
        args = DPOConfig(output_dir=folder, max_steps=num_steps, save_steps=1, use_cpu=True, report_to="none")
        trainer = DPOTrainer("model", args=args, train_dataset=rows)
        if num_steps == 1:
            trainer.train()
    return trainer


STAND_INS: Mapping[str, Callable[[Workplace], Any]] = {
    "train_dataset": _rows(0),
    "eval_dataset": _rows(1),
    "dataset": _rows(0),
    "maths": _rows(2),
    "chat": _rows(3),
    "base": _model,
    "model": _model,
    "tokenizer": lambda place: AutoTokenizer.from_pretrained("model"),
    "trainer": _trainer,
    "torch": lambda place: torch,
    "Path": lambda place: Path,
    "LoraConfig": lambda place: LoraConfig,
    "PeftModel": lambda place: PeftModel,
    "DPOConfig": lambda place: DPOConfig,
    "DPOTrainer": lambda place: DPOTrainer,
}
"""What Python code of a page may name without making it."""
