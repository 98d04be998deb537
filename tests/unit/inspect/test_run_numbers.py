"""The numbers of a run file's pairs: each compared with the naive oracle, whatever the run is and wherever they come
from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

import oracle
from families import tiny_model
from holdfast.cli.run_numbers import run_numbers, trained_model
from holdfast.cli.runfile import read_run_file
from holdfast.data.completions import Completions
from holdfast.data.pair_content import PairContent
from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.run_numbers import RunNumbers, ches_of, sources_of
from policies import rows, tiny_tokenizer

NUM_PAIRS = 8


def table() -> list[dict[str, Any]]:
    """Eight pairs of tokens. Rows 2 and 5 cannot be used (equal completions, no completion); row 7 has no source."""
    pairs: list[dict[str, Any]] = rows(NUM_PAIRS).to_list()
    pairs[2]["rejected_ids"] = pairs[2]["chosen_ids"]
    pairs[5]["chosen_ids"] = []
    for number, pair in enumerate(pairs):
        pair["source"] = ["help", "harm"][number % 2] if number < 7 else None
    return pairs


USED = [0, 1, 3, 4, 6, 7]


def write(folder: Path, pairs: Sequence[Any], name: str = "pairs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(folder / name)


def saved(model: nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data, and a store."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    saved(tiny_model(), tmp_path / "model")
    write(tmp_path, table())
    return tmp_path


def asked(home: Path, out: Path | None = None, **sections: Any) -> RunNumbers:
    """The numbers of a run file with these sections beside a model and data."""
    training = {"output_dir": str(home / "out"), "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    values: dict[str, Any] = {"model": str(home / "model"), "data": {"train": str(home / "pairs.jsonl")}}
    values |= sections
    values["training"] = training | sections.get("training", {})
    (home / "run.yaml").write_text(yaml.safe_dump(values))
    return run_numbers(read_run_file(home / "run.yaml"), out)


def check(found: PairNumbers, model: nn.Module, pairs: Sequence[Any], used: Sequence[int], most: int = 10**6) -> None:
    """Every number is that of the model in a naive pass over each completion alone."""
    assert found.row.tolist() == list(used)
    model = model.eval()
    for place, row in enumerate(used):
        prompt = pairs[row]["prompt_ids"]
        for side, logps, tokens in (
            ("chosen_ids", found.chosen_logps, found.chosen_tokens),
            ("rejected_ids", found.rejected_logps, found.rejected_tokens),
        ):
            ids = pairs[row][side][: most - len(prompt)]
            with torch.no_grad():
                expected = float(oracle.sequence_logps(model, prompt, ids).double().sum())
            assert float(logps[place]) == pytest.approx(expected, abs=1e-4), (row, side)
            assert tokens[place] == len(ids)
        assert found.prompt_tokens[place] == len(prompt)


def of_training(numbers: RunNumbers) -> PairNumbers:
    (dataset,) = numbers.datasets
    assert dataset.name == "train"
    return dataset.reference


def test_eight_pairs(home: Path) -> None:
    numbers = asked(home)
    found = of_training(numbers)
    check(found, tiny_model(), table(), USED)
    assert found.sources == ("help", "harm")
    assert found.source.tolist() == [0, 1, 1, 0, 0, -1]
    assert np.isfinite(found.ches).all()
    assert len(found) == 6
    (dataset,) = numbers.datasets
    assert [row["prompt_ids"] for row in dataset.rows] == [table()[row]["prompt_ids"] for row in USED]
    assert dataset.places is not None
    assert dataset.places.of(int(found.row[2])) == f"{home / 'pairs.jsonl'}, line 4"
    assert numbers.reference == f"{home / 'model'}, as it starts to train"
    assert (numbers.policy, numbers.notes, numbers.not_read) == (None, (), {})
    assert not (home / "out").exists()


def test_ches_by_hand() -> None:
    """Sums s = (1, 2) over 2 tokens and r = (3, 0) over 3: <s, r> = 3, <s, s> = 5, so CHES is -2, and by length
    3 / 6 - 5 / 4 = -0.75. Exchanged, 3 - 9 = -6, and 3 / 6 - 9 / 9 = -0.5."""
    content = PairContent(
        content=np.zeros((2, 4), np.int64), lengths=np.array([[2, 3], [3, 2]]), prompts=np.zeros(2, np.int64)
    )
    ches, normalised = ches_of(np.array([[3.0, 5.0, 9.0], [3.0, 9.0, 5.0]]), content)
    assert ches.tolist() == [-2, -6]
    assert normalised.tolist() == pytest.approx([-0.75, -0.5])


def test_the_second_time_nothing_is_scored(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = of_training(asked(home))
    monkeypatch.setattr("holdfast.reference.reference.Reference._score", None)
    again = of_training(asked(home))
    for name in ("chosen_logps", "rejected_logps", "ches", "normalised_ches"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name


def test_a_run_has_what_it_needs_by_then(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`holdfast train` of the same file finds all log-probs stored."""
    from holdfast.cli.assembly import trainer_of

    asked(home, training={"precompute_ref_log_probs": True})
    run = read_run_file(home / "run.yaml")
    monkeypatch.setattr("holdfast.reference.reference.Reference._score", None)
    trainer_of(run, run.training_arguments())


def test_what_is_cut_is_not_counted(home: Path) -> None:
    """`max_length` 10: prompts have 3 to 9 tokens."""
    check(of_training(asked(home, training={"max_length": 10})), tiny_model(), table(), USED, most=10)


def test_several_evaluation_sets(home: Path) -> None:
    other = rows(3, seed=4).to_list()
    sets = {"one": write(home, other, "1.jsonl"), "two": write(home, table(), "2.jsonl")}
    data = {"train": str(home / "pairs.jsonl"), "eval": sets}
    numbers = asked(home, data=data)
    assert [dataset.name for dataset in numbers.datasets] == ["train", "one", "two"]
    for dataset, pairs, used in zip(numbers.datasets, (table(), other, table()), (USED, [0, 1, 2], USED), strict=True):
        check(dataset.reference, tiny_model(), pairs, used)
    assert numbers.datasets[1].reference.source.tolist() == [-1, -1, -1]


def test_a_named_reference(home: Path) -> None:
    saved(tiny_model(seed=3), home / "sft")
    numbers = asked(home, reference={"model": str(home / "sft")})
    check(of_training(numbers), tiny_model(seed=3), table(), USED)
    assert numbers.reference == str(home / "sft")


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"loss_type": "simpo"}},
        {"training": {"loss_type": ["sft", "orpo"], "loss_weights": [1.0, 0.5]}},
        {"training": {"loss_type": "cpo"}, "reference": "none"},
    ],
)
def test_losses_without_a_reference(home: Path, sections: dict[str, Any]) -> None:
    """The numbers are those of the model as it starts, and a note says so."""
    numbers = asked(home, **sections)
    check(of_training(numbers), tiny_model(), table(), USED)
    assert "compare with no reference" in numbers.notes[0]


def test_a_moving_reference_is_looked_at_before_it_moves(home: Path) -> None:
    numbers = asked(home, training={"sync_ref_model": True, "ref_model_sync_steps": 2})
    check(of_training(numbers), tiny_model(), table(), USED)
    assert "before its first sync" in numbers.notes[0]


def test_streams_are_left_out_with_the_reason(home: Path) -> None:
    stream = {"path": str(home / "pairs.jsonl"), "streaming": True}
    numbers = asked(home, data={"train": stream, "eval": str(home / "pairs.jsonl")})
    assert [dataset.name for dataset in numbers.datasets] == ["eval"]
    assert "it is a stream" in numbers.not_read["train"]
    check(numbers.datasets[0].reference, tiny_model(), table(), USED)
    with pytest.raises(ValueError, match=r"its train dataset is a stream, whose rows cannot be listed\. Read the data"):
        asked(home, data={"train": stream})


def test_log_probs_of_the_user_are_computed_anew(home: Path) -> None:
    """Columns of sums have no hidden states, and nobody says where they come from."""
    write(home, [pair | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in table()])
    check(of_training(asked(home)), tiny_model(), table(), USED)


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def adapted(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    policy = get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False))  # type: ignore
    policy.peft_config["default"].base_model_name_or_path = None
    return policy


def test_a_run_that_saved_checkpoints_alone(home: Path) -> None:
    """The policy is that of the last one."""
    from holdfast.cli.assembly import trainer_of

    options = {"save_steps": 1, "max_steps": 2, "learning_rate": 0.1, "report_to": "none"}
    asked(home, training=options)
    run = read_run_file(home / "run.yaml")
    ours = trainer_of(run, run.training_arguments())
    ours.train()
    (dataset,) = asked(home, home / "out", training=options).datasets
    assert dataset.policy is not None
    check(dataset.policy, ours.model, table(), USED)
    assert np.abs(dataset.policy.chosen_logps - dataset.reference.chosen_logps).max() > 0.1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_trained_policy(home: Path, kind: str) -> None:
    """On the same pairs, under its own identity: the reference's numbers are found again, the policy's stored too."""
    sections: dict[str, Any] = {}
    trained = tiny_model(seed=5)
    out = home / "out"
    if kind == "lora":
        sections, trained = {"peft": LORA}, adapted(tiny_model())
        trained.peft_config["default"].base_model_name_or_path = str(home / "model")  # type: ignore
        trained.save_pretrained(out)  # type: ignore[operator]
    else:
        saved(trained, out)
    numbers = asked(home, out, **sections)
    (dataset,) = numbers.datasets
    check(dataset.reference, tiny_model(), table(), USED)
    assert dataset.policy is not None
    check(dataset.policy, trained, table(), USED)
    assert np.isfinite(dataset.policy.ches).all()
    assert numbers.policy == str(out)
    assert len([*(home / "home" / "store").iterdir()]) == 2


def test_a_folder_without_a_trained_model_is_refused_before_anything_is_loaded(home: Path) -> None:
    (home / "empty").mkdir()
    for out, found in (("empty", "no complete checkpoint and no model"), ("missing", "no folder of that name")):
        with pytest.raises(ValueError, match=f"where there is {found}. Name the output folder of a run"):
            trained_model(home / out)


def test_arrays_of_a_store_are_read_as_the_layout_reads_rows() -> None:
    """Content ids and lengths of pairs are those of single completions; a side without tokens is none of a run's."""
    from holdfast.batch import PairBatch
    from holdfast.data.layouts.padded import PaddedLayout

    data = Completions(rows(5), PaddedLayout(0), PairBatch.from_tensors, 1)
    batch = PairBatch.from_tensors(PaddedLayout(0)(rows(5).to_list()))
    ids, lengths = batch.content_ids(), batch.lengths()
    assert data.content().ids() == [*zip(ids[:5], ids[5:], strict=True)]
    assert data.content().lengths.T.reshape(-1).tolist() == lengths
    assert data.content().prompts.tolist() == [len(row["prompt_ids"]) for row in rows(5)]
    assert data.num_completions() == len(set(ids))


def test_sources() -> None:
    data = Dataset.from_dict({"source": ["b", "", "a", None, "b"]})
    codes, names = sources_of(data)
    assert (codes.tolist(), names) == ([0, -1, 1, -1, 0], ("b", "a"))
    assert sources_of(Dataset.from_dict({"x": [1, 2]}))[1] == ()
    assert sources_of(Dataset.from_dict({"source": [7, 8, 7]}))[1] == ("7", "8")


def test_where_selects_and_orders(home: Path) -> None:
    found = of_training(asked(home))
    assert found.where(found.row > 3).row.tolist() == [4, 6, 7]
    last = found.where(np.array([5, 0]))
    assert (last.row.tolist(), last.sources) == ([7, 0], found.sources)
