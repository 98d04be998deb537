"""The comparison of runs finds what differs, and nothing else."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recorded_runs import DATA, LAYOUTS, MOTIONS, RUNS, STILL, WAYS, product
from same_runs import differences, exact, file_record, recorded


def test_what_differs_is_named_by_its_path():
    before = {"a": {"log": [1, {"loss": "x"}]}, "b": {"log": []}, "gone": {}}
    after = {"a": {"log": [1, {"loss": "y"}, 2]}, "b": {"log": []}, "new": {}}
    assert differences(before, after) == {
        "a": ["/log/1/loss: x -> y", "/log/2: - -> 2"],
        "gone": [": {} -> no such run"],
        "new": [": no such run -> {}"],
    }


def test_floats_are_told_apart_to_the_last_bit_and_times_are_dropped():
    """0.1 + 0.2 is one step of 2^-54 above 0.3, whose mantissa ends in 3; with that step it ends in 4."""
    assert exact({"loss": [0.3, 0.1 + 0.2], "train_runtime": 1.0, "eval_steps_per_second": 2.0}) == {
        "loss": ["0x1.3333333333333p-2", "0x1.3333333333334p-2"]
    }


def test_times_of_a_runs_record_are_dropped_and_the_rest_is_kept(tmp_path: Path):
    line = '{"step": 1, "seconds": 2.5, "loss": 0.5, "time/data": 0.1, "speed/pairs_per_second": 9.0}\n'
    (tmp_path / "logs.jsonl").write_text(2 * line)
    assert file_record(tmp_path / "logs.jsonl") == 2 * [{"step": 1, "loss": "0x1.0000000000000p-1"}]
    facts = {"started": "now", "finished": None, "command": ["train"], "resumed": [{"step": 2, "time": "later"}]}
    (tmp_path / "facts.json").write_text(json.dumps(facts | {"memory": {"weights": 8}, "outcome": "finished"}))
    assert file_record(tmp_path / "facts.json") == {
        "resumed": [{"step": 2}], "memory": {"weights": 8}, "outcome": "finished",
    }  # fmt: skip


def test_the_covering():
    """Every way meets every layout, motion, and kind of data with a window; every layout every motion: as the docstring
    of the runs says, counted from their names."""
    runs = [tuple(name.split("-")) for name, _ in product() if not name.endswith("-still")]
    met = {pair for way, layout, motion, data, window in runs
           for pair in ((way, layout), (way, motion), (way, data, int(window)), (layout, motion))}  # fmt: skip
    data = {(way, *asked) for way, asked in itertools.product(WAYS, DATA)}
    pairs = {*itertools.product(WAYS, LAYOUTS), *itertools.product(WAYS, MOTIONS), *itertools.product(LAYOUTS, MOTIONS)}
    assert met == data | pairs
    assert {name for name in RUNS if name.endswith("-still")} == {f"{w}-{x}-still" for w in STILL for x in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["precomputed-padded-fixed-map-1", "resume-snapshot_disk"])
def test_a_run_is_the_same_twice_and_another_with_another_number(name: str):
    """With 1e-6 of beta more, gradients, logs and weights are others; the reference and its store are not. The states
    of random generators are left out: the checks of types in tests draw from Python's."""
    run = RUNS[name]
    first, second = recorded(run), recorded(run)
    other: Any = recorded(replace(run, options=run.options | {"beta": 0.2 * (1 + 1e-6)}))
    assert "refused" not in first
    found = differences({name: first}, {name: second}).get(name, [])
    assert [line for line in found if "rng_state.pth" not in line] == []
    where = " ".join(differences({name: first}, {name: other})[name])
    assert all(path in where for path in ("/gradients/0: ", "/log/", "/policy: ", "/files/checkpoint-4/"))
    assert "/store" not in where
    assert "manifest.json/weights" not in where
