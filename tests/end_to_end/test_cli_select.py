"""`holdfast select`: the rows are those that a naive loop would choose, and nothing is scored twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import oracle
import tiny
from holdfast.cli.app import app
from stores import Counting

RUN = """\
model: model
data:
  train: pairs.jsonl
  eval: {near: near.jsonl, far: far.jsonl}
  columns: {prompt: question, chosen: good, rejected: bad}
reference: precomputed
training:
  output_dir: out
  reference_store: store
  use_cpu: true
  report_to: none
  num_train_epochs: 2
  learning_rate: 0.01
  beta: 0.5
  per_device_train_batch_size: 4
  save_strategy: "no"
  disable_tqdm: true
"""
NAMES = {"question": "prompt", "good": "chosen", "bad": "rejected"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows under other names, with a number of their own."""
    written = [
        {"id": number} | {name: row[own] for name, own in NAMES.items()} | {"source": "odd" if number % 2 else "even"}
        for number, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in written), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A current folder with a run file, a model, ten pairs of which row 3 cannot be used, and the trained run `out`."""
    folder = tmp_path_factory.mktemp("select")
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows: list[dict[str, Any]] = tiny.preference_rows(10)
    rows[3]["rejected"] = rows[3]["chosen"]
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "near.jsonl", tiny.preference_rows(3, seed=9))
    write_rows(folder / "far.jsonl", tiny.preference_rows(2, seed=8))
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command("train", "run.yaml")
        yield folder


def command(*arguments: str, exit_code: int = 0) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def select(*arguments: str, exit_code: int = 0) -> str:
    return command("select", "run.yaml", *arguments, exit_code=exit_code)


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def naive_margins(model: str, file: str) -> list[float]:
    """log p(good) - log p(bad) of each row of a file, nats."""
    tokenizer = tiny.tokenizer()
    network = AutoModelForCausalLM.from_pretrained(model)
    found = []
    for row in lines_of(file):
        prompt = tokenizer.apply_chat_template(row["question"], add_generation_prompt=True)["input_ids"]
        sums = []
        for name in ("good", "bad"):
            whole = tokenizer.apply_chat_template([*row["question"], *row[name]])["input_ids"]
            with torch.no_grad():
                sums.append(float(oracle.sequence_logps(network, prompt, whole[len(prompt) :]).double().sum()))
        found.append(sums[0] - sums[1])
    return found


def test_the_rows_are_those_of_a_naive_loop(place, monkeypatch):
    """The smaller four of nine implicit margins (0.45 * 9 = 4.05), as they stand in the file; training on them scores
    nothing, and neither does another choice."""
    counting = Counting(monkeypatch)
    printed = select("--run", "out", "--share", "0.45", "--keep", "smallest", "--output", "hard.jsonl")
    assert counting.scored == 18  # nine pairs by the policy; the reference's log-probs are stored
    before, after = naive_margins("model", "pairs.jsonl"), naive_margins("out", "pairs.jsonl")
    implicit = {row: 0.5 * (after[row] - before[row]) for row in range(10) if row != 3}
    expected = sorted(sorted(implicit, key=lambda row: implicit[row])[:4])
    assert lines_of("hard.jsonl") == [lines_of("pairs.jsonl")[row] for row in expected]
    assert "train: 4 of 9 pairs, smallest" in printed
    assert "1 of 10 rows are not used by the run, and not chosen" in printed
    counting.scored = 0
    select(
        "--run", "out", "--share", "0.5", "--keep", "largest", "--by", "policy_margin", "--margin-column", "m",
        "--output", "likely.parquet",
    )  # fmt: skip
    (said,) = [line for line in printed.splitlines() if line.startswith("to train on them: ")]
    assert said.removeprefix("to train on them: ") == (
        "holdfast train run.yaml --set data.train=hard.jsonl --set training.output_dir=hard"
    )
    command("train", "run.yaml", "--set", "data.train=hard.jsonl", "--set", "training.output_dir=hard")
    assert counting.scored == 0
    from datasets import Dataset

    found: Any = Dataset.from_parquet("likely.parquet")
    likely = sorted(sorted(implicit, key=lambda row: -after[row])[:5])  # 4.5 is 5
    assert found["id"][:] == likely
    assert found["m"][:] == pytest.approx([after[row] for row in likely], abs=1e-4)


def test_evaluation_sets_and_the_reference_alone(place, monkeypatch):
    counting = Counting(monkeypatch)
    printed = select(
        "--share", "0.5", "--keep", "smallest", "--by", "reference_margin", "--absolute", "--dataset", "near",
        "--output", "near-hard.jsonl",
    )  # fmt: skip
    margins = naive_margins("model", "near.jsonl")
    places = sorted(sorted(range(3), key=lambda row: abs(margins[row]))[:2])
    assert [row["id"] for row in lines_of("near-hard.jsonl")] == places
    assert "to train on them" not in printed
    assert counting.scored == 0
    printed = select(
        "--share", "0.34", "--keep", "random", "--dataset", "near", "--seed", "5", "--output", "drawn.jsonl"
    )
    assert "near: 1 of 3 pairs, drawn by seed 5" in printed
    assert [row["id"] for row in lines_of("drawn.jsonl")] == [np.random.default_rng(5).permutation(3)[0]]
    printed = select("--share", "1", "--keep", "random", "--dataset", "eval", "--output", "x.jsonl", exit_code=2)
    assert "the run has several evaluation sets: near, far. Name one." in " ".join(printed.split())


@pytest.mark.nightly
def test_a_mixture_is_written_as_it_was_made(place):
    """Its columns have holdfast's names, so the run file's `columns` are taken back."""
    mixed = "data.train={a: {path: pairs.jsonl}, b: {path: near.jsonl}}"
    printed = select(
        "--share", "0.5", "--keep", "smallest", "--by", "reference_margin", "--set", mixed, "--output", "mixed.jsonl"
    )
    (said,) = [line for line in printed.splitlines() if line.startswith("to train on them: ")]
    assert "--set data.columns=null" in said
    assert mixed not in said
    rows = lines_of("mixed.jsonl")
    assert len(rows) == 6
    assert {row["source"] for row in rows} <= {"a", "b"}
    command("data", "run.yaml", "--set", "data.train=mixed.jsonl", "--set", "data.columns=null", "--dataset", "train")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--run", "out", "--share", "0"], 2, "a share of the pairs is above 0 and at most 1; found 0"),
        (["--run", "out", "--share", "1.5"], 2, "found 1.5"),
        (["--run", "out", "--share", "nan"], 2, "found nan"),
        (["--share", "0.5"], 2, "Name its folder with --run OUT"),
        (["--share", "0.5", "--by", "policy_margin"], 2, "Name its folder with --run OUT"),
        (["--run", "out", "--share", "0.5", "--by", "reference_margin"], 2, "is of the reference alone"),
        (["--run", "out", "--share", "0.5", "--by", "margin"], 2, "is not one of"),
        (["--run", "nowhere", "--share", "0.5"], 1, "there is no folder of that name"),
        (["--run", "model", "--share", "0.5"], 1, "both give the same log-probs"),
        (["--run", "out", "--share", "0.5", "--dataset", "test"], 2, "train, eval, near, far"),
        (["--run", "out", "--share", "0.5", "--output", "pairs.jsonl"], 1, "there already"),
        (["--run", "out", "--share", "0.5", "--output", "x.csv"], 1, "ends in .jsonl or .parquet"),
        (["--run", "out", "--share", "0.5", "--output", "no/x.jsonl"], 1, "there is no folder 'no'"),
        (["--run", "out", "--share", "0.5", "--margin-column", "id"], 1, "is a column of the data"),
        (["--run", "out", "--share", "0.5", "--set", "data.train={path: pairs.jsonl, streaming: true}",
          "--set", "training.max_steps=1"], 1, "its train dataset is a stream"),
        (["--run", "other", "--share", "0.5"], 1, "its tokenizer is another one: 2 of the run's"),
    ],
)  # fmt: skip
def test_mistakes(place, arguments, exit_code, message):
    if "other" in arguments and not Path("other").exists():
        tokenizer: Any = AutoTokenizer.from_pretrained("model")
        LlamaForCausalLM.from_pretrained("out").save_pretrained("other")
        tokenizer.save_pretrained("other")
        text = Path("other/tokenizer.json").read_text(encoding="utf-8")
        found = json.loads(text)
        vocab = found["model"]["vocab"]
        first, second = list(vocab)[-2:]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        Path("other/tokenizer.json").write_text(json.dumps(found), encoding="utf-8")
    if "--output" not in arguments:
        arguments = [*arguments, "--output", "mistake.jsonl"]
    printed = select(*arguments, "--keep", "smallest", exit_code=exit_code)
    assert message in " ".join(printed.replace("│", " ").split())
    assert not Path("mistake.jsonl").exists()


@pytest.mark.nightly
def test_another_beta_of_the_trained_run_is_said(place):
    printed = select(
        "--run", "out", "--share", "0.5", "--keep", "smallest", "--set", "training.beta=0.1", "--output", "beta.jsonl"
    )
    assert "training.beta was 0.5 and is 0.1 here" in printed
