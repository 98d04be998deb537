"""Runs the recipes and publishes their curves: for each folder of run files here JSON and pictures in docs/recipes.

`make recipes` does all of them in some minutes on a CPU; `python examples/recipes/run.py tr-dpo beta` does two. Model
and pairs are made by `holdfast quickstart` if they are not there. What is published is written by this script alone.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from draw import draw
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.quickstart.village import mark, questions

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE.parents[1] / "docs" / "recipes"
METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
NUM_ANSWERS = 4
"""Answers to each question, drawn at temperature 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=sorted(path.name for path in HERE.iterdir() if path.is_dir()))
    parser.add_argument("--work", type=Path, default=Path("build/recipes"), help="where runs and models are kept")
    parser.add_argument("--published", type=Path, default=PUBLISHED, help="where curves are written")
    parser.add_argument("--draw", action="store_true", help="only draw what is published already, and write its table")
    options = parser.parse_args()
    for recipe in options.recipes:
        if not list((HERE / recipe).glob("*.yaml")):
            parser.error(f"there is no recipe {recipe!r}: a recipe is a folder of run files in {HERE}")
    published = options.published.resolve()
    published.mkdir(parents=True, exist_ok=True)
    if not options.draw:
        train_all(options.recipes, options.work, published)
    for recipe in options.recipes:
        draw(json.loads((published / f"{recipe}.json").read_text(encoding="utf-8")), published)
    write_tables(published)


def train_all(recipes: list[str], work: Path, published: Path) -> None:
    """Trains every recipe in the folder `work`, with a model and pairs of its own."""
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)  # the run files have paths relative to it
    if not Path("quickstart").exists():
        holdfast("quickstart")
    for recipe in recipes:
        publish(recipe, published)


def publish(recipe: str, published: Path) -> None:
    """Trains every run file of a recipe in the current folder, and writes what came of it into `published`."""
    found: dict[str, Any] = {
        "recipe": recipe,
        "versions": {name: version(name) for name in ("holdfast", "torch", "transformers", "peft")},
        "reference": answers(Path("quickstart/model")),
        "runs": {},
    }
    for run_file in sorted((HERE / recipe).glob("*.yaml")):
        holdfast("train", str(run_file))
        folder = Path("recipes", recipe, run_file.stem)
        found["runs"][run_file.stem] = curves(folder) | {"answers": answers(folder)}
    path = published / f"{recipe}.json"
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(f"{recipe}: {path}")


def write_tables(published: Path) -> None:
    """Puts the numbers of each recipe's runs into its table in `index.md`, if that page is there."""
    page = published / "index.md"
    if not page.exists():
        return
    text = page.read_text(encoding="utf-8")
    for path in sorted(published.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        begin, end = f"<!-- table: {found['recipe']} -->", "<!-- /table -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(found)}{end}{rest.split(end, 1)[1]}"
    page.write_text(text, encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """A recipe's runs at their last evaluation, and the reference, in Markdown."""
    lines = [
        "| run | held-out loss | ranked rightly | log-prob of chosen | of rejected | answers right | answers plain |",
        "|---|---|---|---|---|---|---|",
    ]
    first = next(iter(found["runs"].values()))["eval"]
    start = [f"{first[name][0]:.2f}" for name in ("logps/chosen", "logps/rejected")]
    lines.append(f"| the reference | | | {' | '.join(start)} | {shares(found['reference'])} |")
    for run, curves in found["runs"].items():
        last = {name: values[-1] for name, values in curves["eval"].items()}
        numbers = (
            f"{last['loss']:.4f}", f"{last['rewards/accuracies']:.2f}", f"{last['logps/chosen']:.2f}",
            f"{last['logps/rejected']:.2f}",
        )  # fmt: skip
        lines.append(f"| `{run}.yaml` | {' | '.join(numbers)} | {shares(curves['answers'])} |")
    return "\n".join(lines) + "\n"


def shares(answers: dict[str, float]) -> str:
    return f"{answers['right']:.2f} | {answers['plain']:.2f}"


def holdfast(*words: str) -> None:
    """Runs a command of holdfast, with a store in the current folder."""
    environment = {**os.environ, "HOLDFAST_HOME": str(Path("home").resolve())}
    subprocess.run([sys.executable, "-m", "holdfast.cli", *words], env=environment, check=True)


def curves(folder: Path) -> dict[str, Any]:
    """The logged numbers of a run: {"train" or "eval": {"step" or a metric: values}}."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    kinds = {"train": "", "eval": "eval_"}
    found: dict[str, Any] = {}
    for kind, prefix in kinds.items():
        entries = [entry for entry in history if f"{prefix}loss" in entry]
        found[kind] = {"step": [entry["step"] for entry in entries]}
        found[kind] |= {name: [round(entry[f"{prefix}{name}"], 5) for entry in entries] for name in METRICS}
    return found


@torch.no_grad()
def answers(folder: Path) -> dict[str, float]:
    """The shares of right and of plain answers among those that a model gives to all questions of the village."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    is_adapter = (folder / "adapter_config.json").exists()
    model = (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder)
    asked = [question for question in questions() for _ in range(NUM_ANSWERS)]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q.text}], add_generation_prompt=True, tokenize=False)
        for q in asked
    ]
    rows = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    torch.manual_seed(0)
    written = model.generate(**rows, max_new_tokens=40, do_sample=True)[:, rows["input_ids"].shape[1] :]
    marks = [
        mark(question, text)
        for question, text in zip(asked, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True)
    ]
    return {
        "right": round(sum(each.is_right for each in marks) / len(marks), 4),
        "plain": round(sum(each.is_plain for each in marks) / len(marks), 4),
        "num_answers": len(marks),
    }


if __name__ == "__main__":
    main()
