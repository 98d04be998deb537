"""`holdfast data`: its numbers are those that the trainer of the same run file sees, and whatever is wrong is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tiny
from holdfast.cli import app as cli
from holdfast.cli.assembly import trainer_of
from holdfast.cli.runfile import read_run_file
from holdfast.data.usability import EMPTY_COMPLETION, PROMPT_FILLS

RUN = """\
model: model
data: {train: pairs.jsonl, eval: {near: near.jsonl, far: far.jsonl}}
training:
  output_dir: out
  use_cpu: true
  report_to: none
  layout: padded
  max_length: 100
  num_train_epochs: 1
  per_device_train_batch_size: 4
  logging_steps: 1
  save_strategy: "no"
  disable_tqdm: true
"""


def say(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def row(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt": say("user", prompt),
        "chosen": say("assistant", chosen),
        "rejected": say("assistant", rejected),
        **more,
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


ROWS = [
    *({**each, "source": "prose"} for each in tiny.preference_rows(20)),
    row("tell me", "yes", "no", source="short"),
    row("tell me", "no", "yes", source="short"),  # 21: the other way round
    row("tell me", "yes", "no", source="short"),  # 22: once more
    row(tiny.PROSE[:400], "yes", "no", source="long"),  # 23: a prompt that fills max_length
]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A current folder with a run file, a model and data."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    write_rows(tmp_path / "near.jsonl", [ROWS[0], *tiny.preference_rows(3, seed=9)])
    write_rows(tmp_path / "far.jsonl", tiny.preference_rows(2, seed=8))
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, ["data", "run.yaml", *map(str, arguments)])


def numbers(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    """The JSON that the command writes."""
    result = invoke("--json", "numbers.json", *arguments)
    assert result.exit_code == exit_code, result.output + result.stderr
    return json.loads(Path("numbers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("max_length", "mode", "is_tokenized"),
    [(40, "keep_start", False), (40, "keep_end", False), (None, "keep_start", False), (24, "keep_start", True)],
)
def test_the_numbers_are_those_of_training(place, max_length, mode, is_tokenized):
    """Rows, tokens and scored tokens against the trainer's dataset, its batches, and what it logs for an epoch."""
    if is_tokenized:  # with masks
        rows = [
            {"prompt_ids": [5, 6, 7 + n % 3], "chosen_ids": list(range(10, 40)), "rejected_ids": [9, n + 4, 8],
             "chosen_mask": ([0, 1, 1, 0, 0] * 6) if n % 2 else None, "rejected_mask": [1, 0, 1]}
            for n in range(10)
        ]  # fmt: skip
        write_rows(place / "pairs.jsonl", rows)
    overrides = [f"training.max_length={json.dumps(max_length)}", f"training.truncation_mode={mode}", "data.eval=null"]
    found = numbers(*(word for each in overrides for word in ("--set", each)))["datasets"]["train"]
    run = read_run_file("run.yaml", overrides)
    trainer = trainer_of(run, run.training_arguments())
    assert found["num_used"] == len(trainer.train_dataset)
    batches = list(trainer.get_train_dataloader())
    assert found["tokens"]["scored"] == sum(len(batch["target"]) for batch in batches)
    assert found["tokens"]["seen"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    trainer.train()
    assert (
        found["tokens"]["seen"] == [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log][-1]
    )


def test_no_weights_are_read_and_nothing_is_made(place):
    (place / "model" / "model.safetensors").unlink()
    before = {path.name for path in place.iterdir()}
    assert invoke().exit_code == 0
    assert {path.name for path in place.iterdir()} == before


@pytest.mark.parametrize("num_added", [0, 3])
def test_an_adapter_has_the_embeddings_of_its_loaded_base(place, num_added):
    """A larger tokenizer beside the adapter makes its base larger, as it does in training."""
    base = AutoModelForCausalLM.from_pretrained("model")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<added {n}>" for n in range(num_added)])
    tokenizer.save_pretrained("adapter")
    found = numbers("--set", "model=adapter")
    run = read_run_file("run.yaml", ["model=adapter"])
    trainer = trainer_of(run, run.training_arguments())
    assert found["num_embeddings"] == trainer.model.get_input_embeddings().weight.shape[0] == 512 + num_added
    assert found["datasets"]["train"]["num_used"] == len(trainer.train_dataset)


def test_what_is_found_in_the_rows(place):
    found = numbers()["datasets"]
    train, near = found["train"], found["eval 'near'"]
    assert train["left_out"] == {PROMPT_FILLS: {"count": 1, "num_rows": 24, "share": 1 / 24, "examples": [23]}}
    assert train["repeats"]["contradictions"]["examples"] == [20, 21, 22]
    assert train["repeats"]["identical"]["examples"] == [22]
    assert (near["leak"]["count"], near["leak"]["examples"]) == (1, [0])
    assert found["eval 'far'"]["leak"]["count"] == 0
    assert train["leak"] is None
    assert {name: each["num_rows"] for name, each in train["by_source"].items()} == {"prose": 20, "short": 3, "long": 1}
    assert "1 of 24 rows (4.2 %) of the train dataset cannot be used" in train["said"][0]
    assert train["refusal"] is None


def test_what_is_printed(place):
    result = invoke("--rows", "0", "--row", "21", "--row", "23")
    text = " ".join(result.output.split())
    assert "train: 24 rows used: 23 pairs left out, prompt fills max_length: 1 of 24 rows (4.2 %)" in text
    assert "row 21, pairs.jsonl, line 22, source short" in text
    assert "row 23, pairs.jsonl, line 24, source long, left out: prompt fills max_length" in text
    assert "train, source short: 3 rows" in text
    assert "\x1b" not in result.output
    rows = result.output.splitlines()
    start = rows.index("row 21, pairs.jsonl, line 22, source short")
    shown = [line.replace("\u27e6", "[").replace("\u27e7", "]") for line in rows[start + 2 : start + 5]]
    assert shown == ["    | [<|im_start|>]user", "    | tell me[<|im_end|>]", "    | [<|im_start|>]assistant"]
    assert rows[start + 6] == "    + no\u27e6<|im_end|>\u27e7"


def test_which_dataset_and_how_many_rows(place):
    assert list(numbers("--dataset", "train")["datasets"]) == ["train"]
    assert list(numbers("--dataset", "eval")["datasets"]) == ["eval 'near'", "eval 'far'"]
    assert list(numbers("--dataset", "far")["datasets"]) == ["eval 'far'"]
    part = numbers("--dataset", "train", "--limit", 5)["datasets"]["train"]
    assert (part["num_rows"], part["is_part"]) == (5, True)
    stream = numbers("--dataset", "train", "--limit", 5, "--set", "data.train={path: pairs.jsonl}",
                     "--set", "data.train.streaming=true", "--set", "training.max_steps=1")  # fmt: skip
    assert stream["datasets"]["train"] == part


def test_the_same_rows_are_drawn_with_the_same_seed(place):
    once, again, other = (invoke("--rows", "2", "--seed", seed).output for seed in (1, 1, 2))
    assert once == again != other


def test_the_files(place):
    assert invoke("--dataset", "train", "--html", "data.html", "--png", "data.png").exit_code == 0
    assert (place / "data.png").read_bytes().startswith(b"\x89PNG")
    html = (place / "data.html").read_text(encoding="utf-8")
    assert "&lt;|im_end|&gt;" in html
    assert "contradicted by a pair with sides swapped" in html


def test_data_that_would_end_the_run_are_shown_and_then_refused(place):
    """No row is usable: what training says is the error, and the reasons are there."""
    found = numbers("--set", "training.max_length=4", "--set", "data.eval=null", exit_code=1)["datasets"]["train"]
    assert found["left_out"][PROMPT_FILLS]["count"] == 24
    result = invoke("--set", "training.max_length=4", "--set", "data.eval=null")
    assert "the train dataset must have at least one usable row; found none in 24" in " ".join(result.stderr.split())
    assert found["refusal"] in " ".join(result.stderr.split())
    assert "left out, prompt fills max_length: 24 of 24 rows (100.0 %)" in result.output


def test_rows_beyond_the_positions_of_the_model(place):
    config = GPT2Config(vocab_size=512, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    config.save_pretrained(place / "model")
    found = numbers("--set", "data.eval=null", exit_code=1)["datasets"]["train"]
    assert "has a table of 16 positions" in found["refusal"]


BAD = row("a", "b", "c") | {"chosen": []}
WRONG = {  # what is written where -> arguments, exit code, message
    "a malformed row": (lambda p: write_rows(p / "pairs.jsonl", [*ROWS[:3], BAD]), (), 1,
                        "train dataset, row 3 (pairs.jsonl, line 4): the column 'chosen' must hold at least one"),
    "within the limit": (lambda p: write_rows(p / "pairs.jsonl", [BAD, *ROWS]), ("--limit", 2), 1,
                         "train dataset, row 0 (pairs.jsonl, line 1)"),
    "no such column": (lambda p: write_rows(p / "pairs.jsonl", [{"question": "a", "answer": "b"}]), (), 1,
                       "a preference dataset needs the columns"),
    "no such dataset": (lambda p: None, ("--dataset", "middle"), 2, "train, eval, near, far. Found 'middle'"),
    "no such row": (lambda p: None, ("--row", 24), 2, "--row 24 was asked for, but the data"),
    "a key that is none": (lambda p: None, ("--set", "training.btea=1"), 2, "Did you mean `beta`?"),
    "no such model": (lambda p: None, ("--set", "model=nowhere/at-all"), 1, "the tokenizer was to be loaded"),
    "a damaged config": (lambda p: (p / "model" / "config.json").write_text("{"), ("--set", "tokenizer=model"), 1,
                         "config.json"),
    "a folder as a file": (lambda p: None, ("--html", "."), 1, "--html is to be '.', which is a folder"),
    "a file in no folder": (lambda p: None, ("--json", "nowhere/x.json"), 1, "there is no folder 'nowhere'"),
    "a tokenizer that is too large": (lambda p: tiny.tokenizer(vocab_size=600).save_pretrained(p / "other"),
                                      ("--set", "tokenizer=other"), 1, "but the model has embeddings for 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_one_message(place, case):
    write, arguments, exit_code, message = case
    write(place)
    result = invoke(*arguments)
    assert result.exit_code == exit_code, result.output + result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_text_that_would_steer_a_terminal(place):
    write_rows(place / "pairs.jsonl", [row("\x1b]0;owned\x07\u202eabc", "\x1b[2J yes", "no", source="\x1b[31m")])
    result = invoke("--set", "data.eval=null", "--set", "training.max_length=200")
    assert result.exit_code == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(result.output)
    assert "\\x1b]0;owned\\x07\\u202eabc" in result.output


def test_an_empty_completion_is_a_reason(place):
    rows = [
        {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]},
        {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [2]},
    ]
    write_rows(place / "pairs.jsonl", rows)
    found = numbers("--set", "data.eval=null")["datasets"]["train"]
    assert found["left_out"] == {EMPTY_COMPLETION: {"count": 1, "num_rows": 2, "share": 0.5, "examples": [0]}}
