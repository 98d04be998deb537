"""`holdfast inspect RUN.YAML`: its numbers are those of a naive loop over the models, before and after training."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import oracle
import tiny
from holdfast.cli.app import app

RUN = """\
model: model
data: {train: pairs.jsonl, eval: {near: near.jsonl, far: far.jsonl}}
training:
  output_dir: out
  use_cpu: true
  report_to: none
  num_train_epochs: 2
  learning_rate: 0.01
  beta: 0.5
  per_device_train_batch_size: 4
  save_strategy: "no"
  disable_tqdm: true
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A current folder with a run file, a model, eight pairs of two sources and one that is left out, and `out`, where
    the run was trained."""
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows: list[dict[str, Any]] = tiny.preference_rows(9)
    rows[3]["rejected"] = rows[3]["chosen"]
    for number, row in enumerate(rows):
        row["source"] = "odd" if number % 2 else "even"
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "near.jsonl", tiny.preference_rows(3, seed=9))
    write_rows(folder / "far.jsonl", tiny.preference_rows(2, seed=8))
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, ["train", "run.yaml"])
        assert result.exit_code == 0, result.output
        yield folder


def inspect(*arguments: str, exit_code: int = 0) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, ["inspect", "run.yaml", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def pairs_of(name: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    with Path(f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads(Path(f"{name}.json").read_text(encoding="utf-8"))


def naive(model: str, file: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each row of a file, the log-probs of the tokens of both completions."""
    tokenizer = tiny.tokenizer()
    network = AutoModelForCausalLM.from_pretrained(model)
    for row in map(json.loads, Path(file).read_text(encoding="utf-8").splitlines()):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        sides = []
        for name in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template([*row["prompt"], *row[name]])["input_ids"]
            with torch.no_grad():
                sides.append(oracle.sequence_logps(network, prompt, whole[len(prompt) :]).double().numpy())
        yield sides[0], sides[1]


def test_the_numbers_are_those_of_a_naive_loop(place):
    inspect("--run", "out", "--csv", "all.csv", "--json", "all.json")
    rows, found = pairs_of("all")
    assert [(row["dataset"], int(row["row"])) for row in rows] == [
        *(("train", number) for number in (0, 1, 2, 4, 5, 6, 7, 8)), *(("near", number) for number in range(3)),
        ("far", 0), ("far", 1),
    ]  # fmt: skip
    for name, file in (("train", "pairs.jsonl"), ("far", "far.jsonl")):
        used = [row for row in rows if row["dataset"] == name]
        before, after = list(naive("model", file)), list(naive("out", file))
        for model, logps in (("reference", before), ("policy", after)):
            for row in used:
                chosen, rejected = logps[int(row["row"])]
                assert float(row[f"{model}_chosen_logps"]) == pytest.approx(chosen.sum(), abs=1e-4)
                assert float(row[f"{model}_margin"]) == pytest.approx(chosen.sum() - rejected.sum(), abs=1e-4)
                assert float(row[f"{model}_margin_per_token"]) == pytest.approx(
                    chosen.mean() - rejected.mean(), abs=1e-5
                )
                assert (int(row["chosen_tokens"]), int(row["rejected_tokens"])) == (len(chosen), len(rejected))
        places = [int(row["row"]) for row in used]
        margins = np.array([[chosen.sum() - rejected.sum() for chosen, rejected in logps] for logps in (before, after)])
        was, now = margins[:, places]
        counted = found["datasets"][name]
        assert counted["reference"]["by_sum"]["wrong"]["count"] == (was < 0).sum()
        assert counted["policy"]["by_sum"]["wrong"]["count"] == (now < 0).sum()
        assert counted["movement"]["by_sum"]["flipped"]["count"] == ((was < 0) & (now >= 0)).sum()
        assert counted["movement"]["rose"]["count"] == (now > was).sum()
        assert counted["movement"]["loss"]["mean"] == pytest.approx(
            np.log1p(np.exp(-0.5 * (now - was))).mean(), abs=1e-5
        )
        to_flip = np.log1p(np.exp(0.5 * was[was < 0]))
        assert counted["reference"]["flipping"]["loss"]["mean"] == pytest.approx(to_flip.mean(), abs=1e-5)
    assert found["datasets"]["train"]["reference"]["likeness"]["num_known"] == 8
    sources = found["datasets"]["train"]["by_source"]
    assert {name: group["reference"]["num_pairs"] for name, group in sources.items()} == {"even": 5, "odd": 3}


def test_what_is_said_before_training(place):
    printed = inspect("--dataset", "train", "--pairs", "1", "--html", "before.html")
    assert "reference: model, as it starts to train (digest " in printed
    assert "loss: sigmoid, beta 0.5" in printed
    assert "train: 8 pairs" in printed
    assert "policy:" not in printed
    assert "near: 3 pairs" not in printed
    assert "pairs.jsonl, line " in printed
    assert "How the reference ranks the pairs" in Path("before.html").read_text(encoding="utf-8")
    assert [line for line in printed.splitlines() if not line.isprintable()] == []


def test_evaluation_data_alone(place):
    printed = inspect("--dataset", "eval", "--pairs", "0")
    assert "near: 3 pairs" in printed
    assert "far: 2 pairs" in printed
    assert "train: 8 pairs" not in printed
    assert "prompt   |" not in printed


def test_a_run_without_a_reference_is_looked_at_through_its_model(place):
    printed = inspect("--dataset", "train", "--set", "training.loss_type=simpo", "--set", "training.beta=2.0")
    assert "loss: simpo" in printed
    assert "The losses (simpo) compare with no reference" in printed
    assert "Nothing is said of it: simpo compares with no reference" in printed


def test_other_values_than_those_of_training_are_said(place):
    same = inspect("--run", "out", "--dataset", "far", "--pairs", "0", "--set", "training.logging_steps=3")
    other = inspect(
        "--run", "out", "--dataset", "far", "--pairs", "0", "--set", "training.beta=0.2", "--set",
        "training.label_smoothing=0.1", "--set", "data.train={path: pairs.jsonl}",
    )  # fmt: skip
    assert "other values" not in same
    assert (
        "The run in out was trained with other values: training.beta was 0.5 and is 0.2 here; training.label_smoothing "
        "was not set and is 0.1 here." in other
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["model"], 2, "is a folder. Name a run file"),
        (["run.yaml", "--data", "pairs.jsonl"], 2, "compares two models: name the other one with --reference"),
        (["model", "--reference", "out"], 2, "--data is missing"),
        (["model", "--reference", "out", "--data", "pairs.jsonl", "--csv", "a.csv"], 2, "shows a run's pairs"),
        (
            ["run.yaml", "--dataset", "other"],
            2,
            "--dataset is the name of a dataset of the run: train, eval, near, far",
        ),
        (["run.yaml", "--html", "no/where.html"], 1, "there is no folder 'no'"),
        (["run.yaml", "--run", "nowhere"], 1, "is no folder of that name"),
        (["missing.yaml"], 2, "missing.yaml"),
    ],
)
def test_what_cannot_be_inspected(place, arguments, exit_code, message):
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == exit_code
    assert message in " ".join(result.output.replace("│", " ").split())
