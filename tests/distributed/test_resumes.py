"""Checkpoints over every engine: what is taken up is what was saved, on the same processes and on others.

The runs are those of `engine_resumes`. A run that was taken up is the uninterrupted one, bit for bit, and the run of
one process, up to rounding.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_engines import faults

from differences import differences

pytestmark = pytest.mark.slow

Outcome = Callable[[int, str], dict[str, Any]]

ROWS = {
    "full/device/soft": "fsdp2",
    "lora_sft/device/soft": "fsdp2_parts",
    "full/chosen/fixed": None,
    "full/chosen/soft": None,
    "full/cpu/fixed": None,
    "full/disk/hard": None,
    "full/model/soft": None,
    "full/precomputed/fixed": None,
    "full/precomputed/hard": None,
    "llama_tied/device/soft": None,
    "lora_fresh/adapter/fixed": None,
    "lora_sft/adapter/fixed": None,
    "lora_modules_to_save/device/hard": None,
}
"""The runs, and the engine over which `make test` makes one, on two processes; `make nightly` makes all of them."""

ENGINES = ("ddp", "fsdp2", "fsdp2_parts", "native")


def is_possible(engine: str, row: str) -> bool:
    """Adapters around a model that was sharded as it was loaded are refused."""
    return engine != "native" or "lora" not in row


def cases(of: Iterable[str]) -> list[Any]:
    """Every row over every engine, with the action."""
    return [
        pytest.param(2, f"{engine}/{row}/resume", marks=() if quick == engine else pytest.mark.nightly)
        for engine in of
        for row, quick in ROWS.items()
        if is_possible(engine, row)
    ]


def resume_faults(one: dict[str, Any], several: dict[str, Any], name: str) -> Iterator[str]:
    """What differs between a run that was taken up, the uninterrupted one, and that of one process."""
    if errors := several.get("errors") or one.get("errors"):
        yield f"it failed: {errors}"
        return
    yield from faults(_without_totals(one), _without_totals(several), "/".join(name.split("/")[:4]))
    facts = several["facts of each_process"]
    if "uninterrupted" not in facts:  # another launch has saved
        return
    before, after = _without_totals(facts["uninterrupted"]), _without_totals(several)
    for key in ("logs", "evaluation", "version", "drift"):
        if before[key] != after[key]:
            yield f"{key} of the run that was taken up: {next(differences(before[key], after[key]), 'rounding')}"
    ours, theirs = load_file(before["weights"]), load_file(after["weights"])
    if unlike := [name for name in ours if not torch.equal(ours[name], theirs[name])]:
        yield f"tensors of the run that was taken up are not the same bit for bit: {unlike[:3]} of {len(unlike)}"
    if not facts["final model"]:
        yield "the saved model is not the trained one"
    if any(facts["restored"]):
        yield f"evaluated otherwise when restored: {facts['restored']}"
    if not all("differs in the weights of the reference" in said for said in facts["other base"]):
        yield f"another base was not refused on each process: {facts['other base']}"


@pytest.mark.parametrize(("num_processes", "run"), cases(ENGINES))
def test_what_was_saved_is_taken_up(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    """Bit for bit the uninterrupted run, and by rounding that of one process: also restored to be evaluated, and saved
    as a plain model. Another base is refused on every process."""
    one = engine_outcome(1, f"one/{run.split('/', 1)[1]}")
    assert list(resume_faults(one, engine_outcome(num_processes, run), run)) == []


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("num_processes", "run"),
    [
        (2, f"{engine}/full/chosen/soft/{action}")
        for engine in ENGINES
        for action in ("best", "only_model", "stopped")
        if (engine, action) != ("fsdp2_parts", "only_model")  # which transformers refuses
    ],
)
def test_a_run_ends_as_in_one_process(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    """With the best model and the checkpoints that `save_total_limit` leaves; without an optimizer's state; and after
    one process was asked to end."""
    one, several = engine_outcome(1, f"one/{run.split('/', 1)[1]}"), engine_outcome(num_processes, run)
    assert list(faults(_without_totals(one), _without_totals(several), run.rpartition("/")[0])) == []
    if run.endswith("best"):
        assert (one["best"], one["left"]) == ("checkpoint-2", ["checkpoint-2", "checkpoint-6"])
    if run.endswith("stopped"):
        assert (one["codes"], one["left"]) == ([143], ["checkpoint-3"])


FROM = {
    "full/device/soft": ("fsdp2", "fsdp2_parts", "native", "ddp"),
    "full/chosen/soft": ("fsdp2", "fsdp2_parts"),
    "lora_sft/device/soft": ("fsdp2", "fsdp2_parts"),
}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("num_processes", "run"),
    [
        (num_processes, f"{engine}/{row}/from-2-{writer}")
        for row, writers in FROM.items()
        for num_processes, engine in [(1, "one"), (4, "fsdp2"), (4, "fsdp2_parts"), (4, "ddp"), (4, "native")]
        for writer in writers
        if is_possible(engine, row)
    ],
)
def test_other_processes_and_engines_go_on(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    """Whole state dicts and those in parts, taken up with another number of processes and by another engine."""
    row, _, taken = run.split("/", 1)[1].rpartition("/")
    engine_outcome(2, f"{taken.split('-')[2]}/{row}/resume")
    one = engine_outcome(1, f"one/{row}/resume")
    assert list(resume_faults(one, engine_outcome(num_processes, run), run)) == []


@pytest.mark.parametrize(
    ("num_processes", "run"),
    [
        pytest.param(2, f"{engine}/full/chosen/fixed/full-{rank}", marks=() if is_quick else pytest.mark.nightly)
        for engine, rank, is_quick in [
            ("ddp", 0, False), ("ddp", 1, False), ("fsdp2", 0, False), ("fsdp2", 1, False), ("fsdp2_parts", 0, False),
            ("fsdp2_parts", 1, True), ("native", 0, False),
        ]
    ],
)  # fmt: skip
def test_all_processes_say_that_one_has_no_room(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    """The checkpoint that could not be written is removed, and the one before is named."""
    found = engine_outcome(num_processes, run)
    assert found["left"] == ["checkpoint-2"], found
    assert found["complete"] == 1
    for said in found["said"]:
        assert "the checkpoint checkpoint-4 was to be written" in said
        assert "No space left on device" in said
        assert "checkpoint-2, the last complete checkpoint" in said


@pytest.mark.nightly
@pytest.mark.parametrize(("num_processes", "run"), [(2, "fsdp2_parts/full/chosen/fixed/full_apart")])
def test_checkpoints_in_parts_need_a_shared_folder(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    for said in engine_outcome(num_processes, run)["said"]:
        assert "needs a folder that all processes see" in said
        assert "state_dict_type='FULL_STATE_DICT'" in said


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("num_processes", "run"),
    [
        (2, "fsdp2/full/device/soft/mutated-optimizer_of_another"),
        (2, "fsdp2_parts/full/device/soft/mutated-optimizer_left_out"),
        (2, "fsdp2/full/device/soft/mutated-policy_left_out"),
        (2, "fsdp2/full/device/soft/mutated-reference_left_out"),
    ],
)
def test_what_is_left_out_is_found(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    one = engine_outcome(1, "one/full/device/soft/resume")
    assert list(resume_faults(one, engine_outcome(num_processes, run), run)) != []


def _without_totals(outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome without the mean loss over all steps, which a run that was taken up has of its own steps only."""
    return outcome | {"logs": [entry for entry in outcome["logs"] if "train_loss" not in entry]}
