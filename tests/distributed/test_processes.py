"""Law L7: N processes = 1 process, for losses, weights, metrics, references and reports (see `scenarios.py`)."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from differences import differences
from holdfast.options.metric_names import METRICS_BY_SOURCE
from policies import rows

pytestmark = pytest.mark.slow

Runs = dict[int, tuple[Path, dict[str, Any]]]

TRAININGS = [
    "train_whole_epochs",
    "train_uneven_epochs",
    "train_with_accumulation",
    "train_with_checkpointing",
    "evaluated_first",
    "train_stream",
    "train_stream_in_shards",
    "train_mixture",
    "train_masked_stream",
    "reference_model",
    "reference_model_of_lora",
    "reference_adapter_fresh",
    "reference_adapter_trained",
    "reference_precomputed",
    "reference_precomputed_of_lora",
    "reference_none",
    "reference_chosen",
    "sync_full",
    "sync_lora",
    "sync_full_in_windows",
    "sync_lora_in_windows",
    "train_uneven_epochs_in_windows",
    "train_with_accumulation_in_windows",
    "train_stream_in_windows",
    "resumed_in_windows",
    "resumed_synced_in_windows",
    "unlike_beginnings",
    "unlike_beginnings_captured",
    "unlike_adapters",
    "resumed",
    "resumed_given",
    "resumed_synced",
]
NOT_AT_ZERO_MARGIN = {"reference_none", "reference_chosen", "unlike_beginnings"}


def of(runs: Runs, name: str, num_processes: int = 2) -> Any:
    return runs[num_processes][1][name]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_metrics_by_source_are_those_of_its_rows_alone(num_processes: int, runs: Runs) -> None:
    """Also where one process has no row of a source, and where fillers repeat some."""
    found = of(runs, "evaluation_by_source", num_processes)
    for num_rows, names in ((7, ["a", "(none)", "b/c"]), (5, ["a", "(none)", "d e"])):
        for name in names:
            all_metrics = found[f"{num_rows} of {name}"]
            alone = {key: all_metrics[key] for key in all_metrics if key.removeprefix("eval_") in METRICS_BY_SOURCE}
            for kind in ("rows", "stream"):
                of_source = {key: found[f"{num_rows} {kind}"][f"{key}/{name}"] for key in alone}
                assert list(differences(of_source, alone)) == [], (num_rows, kind, name)
    assert not any("/https" in key for kind in ("too many", "too many of a stream") for key in found[kind])
    said = [line for of_process in found["said by each_process"] for line in of_process]
    assert [line for line in said if "has more than 50 different texts" in line] == said[:1]
    assert len(said) == 1


@pytest.mark.parametrize("name", [*TRAININGS, "evaluation", "evaluation_of_streams", "evaluation_by_source", "samples"])
def test_two_processes_log_what_one_does(name: str, runs: Runs) -> None:
    """Every number of every log: losses, gradient norms, metrics of training and evaluation, tokens."""
    assert list(differences(of(runs, name, 1), of(runs, name, 2))) == []


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_end_with_the_weights_of_one(name: str, runs: Runs) -> None:
    """The policy's and, where there is a module, the reference's; and both processes hold the very same."""
    one, two = (load_file(folder / name / "weights.safetensors") for folder, _ in runs.values())
    assert one.keys() == two.keys()
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], rtol=0, atol=1e-5)
    assert len(set(of(runs, name)["weights_of_each_process"])) == 1


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("name", sorted({*TRAININGS} - NOT_AT_ZERO_MARGIN))
def test_the_first_loss_is_ln_2_on_every_process(name: str, num_processes: int, runs: Runs) -> None:
    first = of(runs, name, num_processes)["first_loss_of_each_process"]
    assert first == pytest.approx([math.log(2)] * num_processes, abs=1e-6)


@pytest.mark.parametrize(
    "names",
    [
        ("reference_model", "reference_precomputed"),
        ("reference_model_of_lora", "reference_adapter_fresh"),
        ("reference_adapter_trained", "reference_precomputed_of_lora"),
        ("train_stream", "train_stream_in_shards"),
        ("train_uneven_epochs", "train_uneven_epochs_in_windows"),
        ("train_with_accumulation", "train_with_accumulation_in_windows"),
        ("train_stream", "train_stream_in_windows"),
        ("sync_full", "sync_full_in_windows"),
        ("sync_lora", "sync_lora_in_windows"),
        ("unlike_beginnings", "reference_chosen"),
        ("unlike_beginnings_captured", "reference_precomputed"),
        ("weights_in_half", "weights_as_loaded"),
    ],
)
def test_trainings_that_are_the_same(names: tuple[str, str], runs: Runs) -> None:
    """However the reference is held (L3), the stream is cut, and whatever the other processes began with."""
    first, second = (of(runs, name)["logs"] for name in names)
    assert list(differences(first, second)) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_tokens_of_fillers_do_not_count(num_processes: int, runs: Runs) -> None:
    """Two epochs of 9 rows: each row's prompt twice and both its completions, two times over."""
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows(9).to_list())
    logs = of(runs, "train_uneven_epochs", num_processes)["logs"]
    assert [entry["num_tokens"] for entry in logs if "num_tokens" in entry][-1] == 2 * tokens


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(
    "name", ["resumed", "resumed_given", "resumed_synced", "resumed_in_windows", "resumed_synced_in_windows"]
)
def test_resumed_is_uninterrupted(name: str, num_processes: int, runs: Runs) -> None:
    """Bit for bit, in losses, metrics and weights, a moved reference's too; the first logs are the checkpoint's."""
    whole = of(runs, name, num_processes)
    again = whole["resumed"]
    unlike = {"train_loss", "total_flos"}
    logs = [[{k: v for k, v in entry.items() if k not in unlike} for entry in run["logs"]] for run in (whole, again)]
    assert logs[0] == logs[1]
    assert whole["weights_of_each_process"] == again["weights_of_each_process"]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("event", ["on_step_begin", "on_evaluate_batch"])
def test_all_processes_end_after_the_same_step(event: str, num_processes: int, runs: Runs) -> None:
    """With the code of the signal that one of them got, and one checkpoint; the run that goes on is the whole one."""
    whole = of(runs, "asked_to_end", num_processes)
    ended = whole[event]
    assert ended["ended_each_process"] == [[143, 2, ["checkpoint-2"]]] * num_processes
    logs = [
        [{k: v for k, v in entry.items() if k != "train_loss"} for entry in run["logs"]]
        for run in (whole, ended["resumed"])
    ]
    assert logs[0] == logs[1]
    assert whole["weights_of_each_process"] == ended["resumed"]["weights_of_each_process"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_sums_that_came_with_the_data_are_used_on_every_process(num_processes: int, runs: Runs) -> None:
    """And train as a reference that is asked; at the first step, rounding decides which reward is the higher."""
    given, live = (of(runs, name, num_processes) for name in ("resumed_given", "resumed"))
    assert given["kind_of_each_process"] == ["GivenReference"] * num_processes
    assert list(differences(given["losses"], live["losses"])) == []
    assert list(differences(given["logs"][1:4], live["logs"][1:4])) == []


def test_a_checkpoint_is_complete_when_its_manifest_is_there(runs: Runs) -> None:
    """The manifest marks a checkpoint as one to resume from: it comes after what the other processes write."""
    written = of(runs, "checkpoint_order")["written_by_each_process"]
    assert written.keys() == {"manifest.json", "rng_state_0.pth", "rng_state_1.pth"}
    assert written["manifest.json"] >= written["rng_state_1.pth"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stream_is_evaluated_as_its_rows(num_processes: int, runs: Runs) -> None:
    by_rows, streamed = (of(runs, name, num_processes) for name in ("evaluation", "evaluation_of_streams"))
    for kind, metrics in streamed.items():
        assert list(differences(by_rows[kind[0]], metrics)) == [], kind


@pytest.mark.parametrize("num_processes", [1, 2])
def test_compute_metrics_sees_every_row_once(num_processes: int, runs: Runs) -> None:
    """5 pairs are 10 rows of ids, and as many of logits."""
    found = of(runs, "predictions", num_processes)
    table = rows(8, seed=5).select(range(5)).to_list()
    expected = sorted(row["prompt_ids"] + row[side] for row in table for side in ("chosen_ids", "rejected_ids"))
    assert found["num_rows"] == [10, 10]
    for seen in found["seen"].values():
        assert sorted([token for token in ids if token > 0] for ids in seen["ids"]) == expected
        assert len(seen["largest"]) == 10


def test_logits_that_compute_metrics_sees(runs: Runs) -> None:
    one, two = (of(runs, "predictions", n)["seen"] for n in (1, 2))
    for kind in one:
        for row in range(10):
            length = sum(token > 0 for token in one[kind]["ids"][row])
            assert two[kind]["largest"][row][:length] == pytest.approx(one[kind]["largest"][row][:length], abs=1e-5)


def test_precomputed_shares_are_complete(runs: Runs) -> None:
    """Two processes score each completion once between them, and both then hold what one process alone computes."""
    (alone,) = of(runs, "precomputed_values", 1)["kept_by_each_process"]
    both = of(runs, "precomputed_values", 2)["kept_by_each_process"]
    assert len(alone) == 2 * 6 - 1  # two rows share their chosen completion
    assert sum(of(runs, "precomputed_values", 1)["scored_by_each_process"]) == 2 * 6 - 1
    assert sum(of(runs, "precomputed_values", 2)["scored_by_each_process"]) == 2 * 6 - 1
    for kept in both:
        assert kept.keys() == alone.keys()
        for completion, values in alone.items():
            assert kept[completion] == pytest.approx(values, abs=1e-5)
    assert both[0] == both[1]


def test_what_a_slow_process_scored_is_found_by_all(runs: Runs) -> None:
    """Under a collator of the user's too, all wait until the last one has written."""
    assert of(runs, "precomputed_by_a_collator", 1)["held_by_each_process"] == [2 * 12 - 1]
    assert of(runs, "precomputed_by_a_collator", 2)["held_by_each_process"] == [2 * 12 - 1] * 2


def test_a_wrong_reference_is_refused_on_every_process(runs: Runs) -> None:
    refused = of(runs, "audit_of_a_wrong_reference")["refused_by_each_process"]
    assert len(refused) == 2
    assert all("`model.layers.0.mlp.down_proj.weight` is not what it was" in message for message in refused)


def test_the_gap_to_a_chosen_reference_is_said_once(runs: Runs) -> None:
    assert of(runs, "reference_chosen")["said_by_each_process"] == [1, 0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "map",
            "2 of 6 rows (33.3 %) of the train dataset cannot be used and are left out. prompt fills max_length: 2",
        ),
        ("stream", "1 row(s) of the train dataset could not be used so far and were left out (prompt fills max_length"),
    ],
)
def test_unusable_rows_are_said_once(kind: str, message: str, runs: Runs) -> None:
    (said,), nothing = of(runs, "unusable_rows")[kind]["said_by_each_process"]
    assert said.startswith(message)
    assert nothing == []


def test_the_main_process_prepares_the_data_first(runs: Runs) -> None:
    first, second = of(runs, "preparation")["times_of_each_process"]
    assert first[1] <= second[0]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_all_processes_stop_where_one_breaks(num_processes: int, runs: Runs) -> None:
    """With the same step and checkpoint, whichever of them has the number that is not finite."""
    found = of(runs, "breaks", num_processes)
    (loss,), (evaluation,) = ({*found[f"{where}_of_each_process"]} for where in ("loss", "evaluation"))
    assert "The loss is infinite at step 3;" in loss
    assert "resume from /loss/checkpoint-2, the last" in loss
    assert found["loss_checkpoints"] == ["checkpoint-1", "checkpoint-2"]
    assert "The evaluation has eval_loss=nan at step 2;" in evaluation
    assert "resume from /evaluation/checkpoint-1, the last" in evaluation
    assert found["evaluation_checkpoints"] == ["checkpoint-1"]
