"""The page of a run that goes on: never more than its share of the time, and no end of the run where it fails."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from holdfast.cli.report import reported
from holdfast.report import live
from holdfast.report.live import LiveReport
from runs import write_run


class Clock:
    """A clock that stands still but for what a test lets pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def log(report: LiveReport, folder: Path, *, is_first: bool = True, begins: bool = False) -> None:
    arguments: Any = SimpleNamespace(output_dir=str(folder))
    state = TrainerState(is_world_process_zero=is_first)
    (report.on_train_begin if begins else report.on_log)(arguments, state, TrainerControl())


@pytest.mark.parametrize("cost", [0.1, 0.5, 3.0])
def test_pages_take_at_most_their_share(tmp_path, monkeypatch, cost):
    """A log each second, and a page that takes `cost` seconds: at every instant at most 2 % were spent, and in the end
    nearly as much."""
    clock = Clock(monkeypatch)
    written: list[float] = []

    def write(runs, path, refresh_seconds) -> None:
        assert runs[0].last_step == 200
        clock.now += cost
        written.append(clock.now)

    monkeypatch.setattr(live, "write_page", write)
    report = LiveReport()
    log(report, write_run(tmp_path), begins=True)
    began = clock.now
    for _ in range(2000):
        clock.now += 1
        log(report, tmp_path)
        assert len(written) * cost <= 0.02 * (clock.now - began) or len(written) <= 1
    assert len(written) == report.num_written
    assert len(written) * cost >= 0.02 * (clock.now - began) - 2 * cost
    assert written[0] - began >= 0.5 / 0.02


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    report = LiveReport()
    log(report, write_run(tmp_path), begins=True, is_first=False)
    clock.now += 1e6
    log(report, tmp_path, is_first=False)
    assert (report.has_begun, report.num_written) == (False, 0)
    assert not (tmp_path / "report.html").exists()


def test_a_page_is_one_that_is_loaded_again(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    report = LiveReport(refresh_seconds=7)
    log(report, write_run(tmp_path, outcome=None), begins=True)
    clock.now += 1e6
    log(report, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh" content="7"' in text
    assert "running, step 200 of 200" in text


def test_a_page_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, caplog):
    clock = Clock(monkeypatch)
    write_run(tmp_path)
    (tmp_path / "record" / "logs.jsonl").write_text("[]\n", encoding="utf-8")
    report = LiveReport()
    log(report, tmp_path, begins=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.now += 1e6
            log(report, tmp_path)
    assert len(caplog.records) == 1
    assert "logs.jsonl, line 1" in caplog.text
    assert report.num_written == 0


def test_a_run_without_a_record_has_no_page_before_its_end(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    report = LiveReport()
    log(report, tmp_path, begins=True)
    clock.now += 1e6
    log(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("damaged"), KeyError("a defect"), OSError("the disk is full")])
def test_a_run_is_not_lost_over_its_report(tmp_path, monkeypatch, caplog, error):
    """What the run returns, and what it raises, is its own."""

    def write(folder: Path) -> None:
        raise error

    monkeypatch.setattr("holdfast.report.files.write_own_report", write)
    callbacks: list[LiveReport] = []
    trainer: Any = SimpleNamespace(add_callback=callbacks.append, args=SimpleNamespace(run_record=True))
    with reported(trainer, tmp_path) as write_report:
        callbacks[0].has_begun = True
        write_report()
    assert len(caplog.records) == 2
    assert type(error).__name__ in caplog.text
    with pytest.raises(RuntimeError, match="of the run"), reported(trainer, tmp_path):
        raise RuntimeError("of the run")
