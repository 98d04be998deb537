"""What the quickstart writes: a model's folder, pairs to train on, others to evaluate with, and a run file.

The pairs are two different answers of the village to one question, of which the one with more points is preferred. A
column `source` says by what they differ, so that every metric comes by source too. Held-out questions ask for facts
that no pair for training is about.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.progress import bars
from holdfast.quickstart.model import NUM_STEPS_OF_FACTS, NUM_STEPS_OF_TALK, make_model, make_tokenizer
from holdfast.quickstart.village import answer, is_held_out, mark, questions

NUM_STEPS = NUM_STEPS_OF_FACTS + NUM_STEPS_OF_TALK
NUM_PAIRS, NUM_HELD_OUT = 800, 100
RUN_FILE = """\
# A LoRA with DPO. Every section and key is described in docs/cli.md.

model: {folder}/model
data:
  train: {folder}/pairs.jsonl
  eval: {folder}/held-out.jsonl
peft:
  r: 16
  target_modules: all-linear
reference: auto                  # for a LoRA: the model with its adapter off, which takes no memory
training:
  output_dir: {folder}/run
  beta: 0.1
  learning_rate: 1e-3            # for so small a model; 5e-6 to 5e-5 is usual for a LoRA of a large one
  num_train_epochs: 2
  per_device_train_batch_size: 16
  logging_steps: 5
  eval_strategy: steps
  eval_steps: 50
  save_steps: 50
  generate_samples: 4            # held-out prompts, answered by policy and reference at each evaluation
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quickstart:
    """The paths of what was written."""

    model: Path
    pairs: Path
    held_out: Path
    run_file: Path


def write_quickstart(
    folder: Path,
    *,
    seed: int = 0,
    num_steps: tuple[int, int] = (NUM_STEPS_OF_FACTS, NUM_STEPS_OF_TALK),
    num_pairs: int = NUM_PAIRS,
    on_step: Callable[[], None] = lambda: None,
) -> Quickstart:
    """Writes all of it into `folder`, which is made where missing, and returns the paths.

    `num_steps`, `num_pairs`: fewer make a worse model sooner, for tests. ValueError where one of the files is there.
    """
    written = Quickstart(
        model=folder / "model",
        pairs=folder / "pairs.jsonl",
        held_out=folder / "held-out.jsonl",
        run_file=folder / "run.yaml",
    )
    check_is_free(folder)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed, num_steps=num_steps, on_step=on_step)
    with bars(are_shown=False):
        model.save_pretrained(written.model)
    tokenizer.save_pretrained(written.model)
    draw = random.Random(seed)
    _write_rows(written.pairs, preference_rows(num_pairs, draw, held_out=False))
    _write_rows(written.held_out, preference_rows(min(num_pairs, NUM_HELD_OUT), draw, held_out=True))
    written.run_file.write_text(_run_file(folder), encoding="utf-8")
    return written


def check_is_free(folder: Path) -> None:
    """ValueError where something of that name is in the folder: nothing is overwritten."""
    for name in ("model", "pairs.jsonl", "held-out.jsonl", "run.yaml"):
        if (folder / name).exists():
            raise ValueError(
                f"the quickstart was to be written into {str(folder)!r}, but {str(folder / name)!r} is there already. "
                "Remove it, or name another folder."
            )


def preference_rows(num_rows: int, draw: random.Random, *, held_out: bool) -> list[dict[str, Any]]:
    """So many pairs as messages, about facts that are held out, or about the others. `source` is `fact` where one
    answer alone is right, and `manner` where they differ in padding only."""
    asked = [question for question in questions() if is_held_out(question) == held_out]
    rows: list[dict[str, Any]] = []
    while len(rows) < num_rows:
        question = draw.choice(asked)
        answers = [answer(question, draw), answer(question, draw)]
        marks = [mark(question, text) for text in answers]
        if marks[0].points == marks[1].points:
            continue
        better = 0 if marks[0].points > marks[1].points else 1
        rows.append(
            {
                "prompt": [{"role": "user", "content": question.text}],
                "chosen": [{"role": "assistant", "content": answers[better]}],
                "rejected": [{"role": "assistant", "content": answers[1 - better]}],
                "source": "manner" if marks[0].is_right == marks[1].is_right else "fact",
            }
        )
    return rows


def _run_file(folder: Path) -> str:
    """The run file for this folder, whose name is quoted where YAML or the expansion of paths would change it."""
    text = RUN_FILE
    for name in ("model", "pairs.jsonl", "held-out.jsonl", "run"):
        path = (folder / name).as_posix()
        is_plain = re.fullmatch(r"[\w./-]*[A-Za-z][\w./-]*", path, re.ASCII) is not None
        text = text.replace(
            f"{{folder}}/{name}\n", f"{path if is_plain else json.dumps(path.replace('$', '$$'), ensure_ascii=False)}\n"
        )
    return text


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
