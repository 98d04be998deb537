"""The record of a run: what is written is read back, whatever a kill or a resumption leaves of it."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from holdfast.record import (
    Audit,
    Event,
    Log,
    RecordWriter,
    Sample,
    has_record,
    read,
)  # fmt: skip
from holdfast.record.entries import LOGS, append
from run_facts import FACTS

SAMPLE = Sample(step=2, dataset="eval", row=0, prompt="Hi \u202e", policy="there", reference="you")


@pytest.fixture
def writer(tmp_path) -> RecordWriter:
    writer = RecordWriter(tmp_path)
    writer.begin(FACTS)
    return writer


def test_what_is_written_is_read(writer, tmp_path):
    writer.log(2, 0.5, {"loss": 0.5, "is_good": True, "text": "left out", "nan": float("nan"), "step": 9})
    writer.event(2, "sync", "The reference moved.", drift=0.25)
    writer.sample(SAMPLE)
    writer.end("finished")
    found = read(tmp_path)
    assert replace(found.facts, finished=None, outcome="running") == FACTS
    assert found.facts.outcome == "finished"
    assert found.logs == (Log(step=2, epoch=0.5, seconds=found.logs[0].seconds, numbers={"loss": 0.5, "is_good": 1}),)
    assert (found.events[0].kind, found.events[0].numbers["drift"]) == ("sync", 0.25)
    assert found.samples == (SAMPLE,)


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("make", [float, np.float32, np.float64, torch.tensor], ids=["float", "fp32", "fp64", "torch"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_and_left_out_when_read(writer, tmp_path, caplog, value, make):
    """Neither raises nor is said: the run's own error says more."""
    writer.log(1, value, {"loss": make(value), "accuracy": make(0.5), "text": "left out"})
    writer.event(1, "sync", "It moved.", drift=make(value), version=1, step_text="left out")
    writer.update(
        beta=value,
        num_epochs=value,
        options={"max_grad_norm": value, "of": [value]},
        audit=Audit(line="", mean_gap_nats=value),
    )
    log, event, facts = (
        json.loads((tmp_path / "record" / name).read_text(), parse_constant=no_constant)
        for name in ("logs.jsonl", "events.jsonl", "facts.json")
    )
    assert {**log, "seconds": 0} == {"step": 1, "epoch": None, "seconds": 0, "loss": None, "accuracy": 0.5}
    assert (event["drift"], event["version"], "step_text" in event) == (None, 1, False)
    assert (facts["beta"], facts["options"]) == (None, {"max_grad_norm": None, "of": [None]})
    found = read(tmp_path)
    assert (found.logs[0].epoch, found.logs[0].numbers) == (None, {"accuracy": 0.5})
    assert found.events[0].numbers.keys() == {"version", "seconds"}
    assert math.isnan(found.facts.beta)
    assert found.facts.audit == Audit(line="", mean_gap_nats=None)
    assert caplog.records == []
    resumed = RecordWriter(tmp_path)
    resumed.resume(FACTS, 1)
    assert read(tmp_path).logs == found.logs


def test_numbers_do_not_take_the_place_of_an_entrys_own(writer, tmp_path):
    writer.log(1, 0.5, {"step": 9, "epoch": 9, "seconds": 1e9, "loss": 1.0})
    writer.event(1, "sync", "It moved.", seconds=1e9)
    found = read(tmp_path)
    assert (found.logs[0].step, found.logs[0].epoch, found.logs[0].numbers) == (1, 0.5, {"loss": 1.0})
    assert (found.logs[0].seconds or 0.0) < 1e6
    assert found.events[0].numbers["seconds"] < 1e6


def test_a_new_run_replaces_the_record(writer, tmp_path):
    writer.log(1, 0.1, {"loss": 1.0})
    RecordWriter(tmp_path).begin(replace(FACTS, max_steps=9))
    found = read(tmp_path)
    assert (found.facts.max_steps, found.logs, found.events, found.samples) == (9, (), (), ())


@pytest.mark.parametrize(
    ("num_lines", "steps_left"),
    [
        (None, [1, 2, 2]),
        ({LOGS: 2}, [1, 2]),  # the third was logged after the checkpoint of step 2
        ({LOGS: 5}, [1, 2, 2]),  # of a record that has since lost lines
    ],
)
def test_a_resumed_run_goes_on_from_its_checkpoint(writer, tmp_path, num_lines, steps_left):
    for step in (1, 2, 2, 3):
        writer.log(step, None, {"loss": step})
    writer.event(3, "sync", "gone")
    resumed = RecordWriter(tmp_path)
    resumed.resume(replace(FACTS, started="later", num_processes=2), 2, num_lines)
    found = read(tmp_path)
    assert [log.step for log in found.logs] == steps_left
    assert [(event.step, event.kind) for event in found.events] == [(2, "resumed")]
    assert (found.facts.started, found.facts.num_processes) == (FACTS.started, 2)
    assert [each.step for each in found.facts.resumed] == [2]


def test_seconds_go_on_where_the_checkpoint_was(writer, tmp_path):
    file = tmp_path / "record" / LOGS
    append(file, {"step": 1, "epoch": None, "seconds": 100.0})
    append(file, {"step": 2, "epoch": None, "seconds": 200.0})
    resumed = RecordWriter(tmp_path)
    resumed.resume(FACTS, 1)
    assert 100.0 <= resumed.seconds < 150.0


def test_a_run_resumed_in_another_folder_begins_a_record_there(tmp_path):
    RecordWriter(tmp_path / "other").resume(FACTS, 5)
    found = read(tmp_path / "other")
    assert [each.step for each in found.facts.resumed] == [5]
    assert has_record(tmp_path / "other")
    assert not has_record(tmp_path)


@pytest.mark.parametrize("length", range(0, 60, 7))
def test_a_line_that_a_kill_cut_is_no_entry(writer, tmp_path, length):
    writer.log(1, 0.5, {"loss": 1.0})
    writer.log(2, 1.0, {"loss": 0.5, "rewards/margins": 0.123456789})
    file = tmp_path / "record" / LOGS
    whole = file.read_bytes().index(b"\n") + 1
    file.write_bytes(file.read_bytes()[: whole + length])
    assert [log.step for log in read(tmp_path).logs] == [1]
    resumed = RecordWriter(tmp_path)
    resumed.resume(FACTS, 1)
    resumed.log(2, 1.0, {"loss": 0.5})
    assert [log.step for log in read(tmp_path).logs] == [1, 2]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("logs.jsonl", '{"step": 1, "epoch": 1, "seconds": 1, "loss": 1}\n{"step": "x"}\n', "line 2.*step is 'x'"),
        ("logs.jsonl", '{"step": 1, "epoch": 1, "seconds": 1, "loss": "low"}\n', "line 1.*loss is 'low', not float"),
        ("logs.jsonl", "[1]\n", "line 1.*no JSON object"),
        ("events.jsonl", '{"step": 1, "kind": "sync"}\n', "line 1.*text is missing"),
        ("samples.jsonl", "{\n", "line 1.*Expecting"),
        ("facts.json", "{}", "facts.*versions is missing"),
        ("facts.json", '{"format": 2}', "its format is 2"),
        ("facts.json", "[" * 100_000, "damaged"),
    ],
)
def test_damage_is_named(writer, tmp_path, file, content, message):
    (tmp_path / "record" / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert file in str(error.value)


def test_a_folder_without_a_record(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read.*run_record=True"):
        read(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_said_once(tmp_path, caplog):
    (tmp_path / "record").write_text("a file")
    writer = RecordWriter(tmp_path)
    writer.begin(FACTS)
    writer.log(1, None, {"loss": 1.0})
    assert [record.getMessage().count("cannot be written") for record in caplog.records] == [1]


def test_unknown_keys_are_ignored(writer, tmp_path):
    file = tmp_path / "record" / "facts.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"later": 1}))
    assert read(tmp_path).facts == FACTS


def test_reading_a_record_imports_no_torch():
    code = "import sys, holdfast.record; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_events_without_seconds_are_read(tmp_path, writer):
    append(tmp_path / "record" / "events.jsonl", {"step": 1, "kind": "alarm", "text": "Falling."})
    assert read(tmp_path).events == (Event(step=1, kind="alarm", text="Falling.", numbers={}),)
