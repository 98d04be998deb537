"""`holdfast store import FILE --run RUN.YAML`: what another machine computed, checked against a run and counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tiny
from holdfast.cli.app import app
from holdfast.store.maintenance import stores

NUM_PAIRS = 8


def save_model(folder: Path, seed: int = 0, **options: Any) -> None:
    tokenizer = tiny.tokenizer()
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape | ends | options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_file(folder: Path, **sections: Any) -> Path:
    training = {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    training |= sections.pop("training", {})
    path = folder / "run.yaml"
    content = {"model": str(folder / "policy"), "data": {"train": str(folder / "pairs.jsonl")}, "training": training}
    path.write_text(json.dumps(content | sections), encoding="utf-8")  # JSON is YAML
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "500"})


def pairs() -> list[dict[str, Any]]:
    """Pairs of which no two share a completion."""
    rows = tiny.preference_rows(NUM_PAIRS)
    texts = {json.dumps([row["prompt"], row[side]]) for row in rows for side in ("chosen", "rejected")}
    assert len(texts) == 2 * NUM_PAIRS
    return rows


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, pairs, and `log-probs.parquet`: what was computed for them, in a store not here."""
    save_model(tmp_path / "policy")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs())), encoding="utf-8")
    there = tmp_path / "there"
    path = run_file(tmp_path, reference="precomputed", training={"reference_store": str(there)})
    result = invoke("precompute", path)
    assert result.exit_code == 0, result.output
    (facts,) = stores(there)
    result = invoke("store", "export", facts.name, tmp_path / "log-probs.parquet", "--root", there)
    assert result.exit_code == 0, result.output
    run_file(tmp_path, reference="precomputed")
    return tmp_path


def imported(place: Path, *more: object) -> Any:
    return invoke("store", "import", place / "log-probs.parquet", "--run", place / "run.yaml", *more)


def test_what_a_run_needs_is_covered(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = imported(place)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()[-2:]
    assert first.endswith("imported, 16 of them new here")
    assert second == f"16 of the 16 completions of {place / 'run.yaml'} are in it"
    assert invoke("precompute", place / "run.yaml").exit_code == 0
    assert "(train): 16 of 16 completions found in the store, 0 scored." in caplog.text


def test_what_is_covered_in_part(place: Path) -> None:
    """Three of eight pairs have other answers, and a truncation is the run's own: 10 completions are in the file."""
    rows = pairs()
    for row in rows[:3]:
        for side in ("chosen", "rejected"):
            row[side][0]["content"] += " No."
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = imported(place, "--root", place / "elsewhere")
    assert result.stdout.splitlines()[-1].startswith("10 of the 16 completions of ")
    assert [facts.num_completions for facts in stores(place / "elsewhere")] == [16]


def test_where_the_run_keeps_its_store(place: Path) -> None:
    run_file(place, training={"reference_store": str(place / "own"), "precompute_ref_log_probs": True})
    assert imported(place).exit_code == 0
    assert len(stores(place / "own")) == 1


def test_log_probs_that_the_data_bring_along_do_not_count(place: Path) -> None:
    rows = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for row in pairs()]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert imported(place).stdout.splitlines()[-1].startswith("16 of the 16 completions of ")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda place: save_model(place / "policy", seed=1), "weights"),
        (lambda place: save_model(place / "policy", rms_norm_eps=1e-3), "config"),
        (
            lambda place: run_file(place, model={"path": str(place / "policy"), "attn_implementation": "eager"}),
            "numerics",
        ),
    ],
)
def test_the_store_of_another_run_is_refused(change: Any, named: str, place: Path) -> None:
    change(place)
    result = imported(place, "--root", place / "elsewhere")
    assert result.exit_code == 1
    assert f"whose '{named}' is " in result.stderr
    assert "Export the store of this reference, with these numerics, or compute the log-probs here." in result.stderr
    assert not (place / "elsewhere").exists()


@pytest.mark.parametrize(
    ("sections", "obstacle"),
    [
        ({"training": {"sync_ref_model": True}}, "its reference moves (sync_ref_model)"),
        ({"training": {"loss_type": "simpo"}}, "its losses compare with no reference"),
    ],
)
def test_a_run_whose_needs_cannot_be_listed(sections: dict[str, Any], obstacle: str, place: Path) -> None:
    run_file(place, **sections)
    result = imported(place)
    assert result.exit_code == 1
    assert f"cannot be listed: {obstacle}. Name a run over data with an end" in result.stderr


def test_a_stream_cannot_be_listed(place: Path) -> None:
    source = {"path": str(place / "pairs.jsonl"), "streaming": True}
    run_file(place, data={"train": source}, training={"max_steps": 2})
    result = imported(place)
    assert result.exit_code == 1
    assert "cannot be listed: the train dataset is a stream." in result.stderr
