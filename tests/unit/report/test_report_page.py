"""The report as a reader sees it: opened in a browser at several widths, light and dark, with harmful text in it."""

import json
import math
import struct
from dataclasses import replace

import pytest

from browser import opened
from holdfast.record.facts import Dataset
from holdfast.record.writer import RecordWriter
from holdfast.report.files import Files, write_page, write_report
from holdfast.report.run import read_run, read_runs
from runs import FACTS, moving, squeezed, write_run, write_state

ALWAYS = [("many", 400, "light"), ("harmful", 400, "dark"), ("several", 1600, "dark"), ("empty", 1000, "light")]
"""The windows that every run of the tests opens."""
HARM = "<script>alert(1)</script><img src=http://x/y> \x1b[31m \u202e" + "long" * 60
MAIN = [
    "Loss",
    "Margin",
    "Accuracy",
    "Rewards of both sides",
    "Distance from the reference (KL)",
    "Log-probs of both sides",
]


def with_sources(share: float) -> dict[str, float]:
    by_source = {f"rewards/{name}/{source}": share for name in ("margins", "accuracies") for source in ("maths", HARM)}
    return squeezed(share) | by_source | {"loss/sigmoid": 0.3, "loss/sft": 0.4, "my/metric": share, "win_rate": 0.4}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of runs of several kinds, by name."""
    root = tmp_path_factory.mktemp("runs")
    harmful = replace(
        moving(), options={HARM: HARM, "learning_rate": 5e-6}, loss_types=(HARM,),
        model=replace(FACTS.model, name=HARM),
        data={"train": Dataset(num_rows=10, num_used=5, left_out={HARM: 5}, sources={HARM: 5}), "eval": Dataset()},
    )  # fmt: skip
    runs = {
        "usual": write_run(root / "usual", num_samples=2),
        "many": write_run(root / "many", with_sources, num_logs=400, syncs=tuple(range(10, 200, 10)), num_samples=1),
        "harmful": write_run(root / "harm", with_sources, facts=harmful, syncs=(50, 100), num_samples=2),
        "state": write_state(root / "state"),
    }
    RecordWriter(root / "empty").begin(FACTS)
    runs["empty"] = root / "empty"
    files = {}
    for name, folder in runs.items():
        files[name] = root / f"{name}.html"
        write_page((read_run(folder),), files[name])
    files["several"] = root / "several.html"
    write_page(read_runs([runs["usual"], runs["many"], runs["state"], runs["harmful"]]), files["several"])
    return files


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        pytest.param(name, width, scheme, marks=[] if (name, width, scheme) in ALWAYS else [pytest.mark.nightly])
        for name in ("usual", "many", "harmful", "state", "empty", "several")
        for width in (400, 1000, 1600)
        for scheme in ("light", "dark")
    ],
)
def test_a_report_in_a_browser(pages, name, width, scheme):
    found = opened(pages[name], width=width, scheme=scheme)
    assert found.complaints == ()
    assert found.requests == ()
    assert found.too_wide == ()
    assert found.overlapping == ()
    assert found.smallest_text >= 9
    assert found.faintest[0] >= 4.5, found.faintest[1]
    labels = [plot.label.split(". ")[0] for plot in found.plots]
    if name != "empty":
        assert [label for label in MAIN if label not in labels] == []
    assert all(plot.width > 250 and plot.height > 50 for plot in found.plots)


def test_what_a_page_says(pages):
    text = opened(pages["usual"]).text
    for part in (
        "Which reference did I use?",
        "Did it help?",
        "Is it bad that the chosen reward falls?",
        "How do I resume?",
    ):
        assert part in text
    assert "Both fall: the usual squeeze" in text
    assert "400 held-out pairs" in text
    assert "Question 1?" in text
    assert "269 MB" in text
    assert "chosen equals rejected: 10" in text


def test_every_curve_is_there(pages):
    """Also those that no panel names, and the terms of the loss. Numbers by source are bars, and no curves."""
    found = opened(pages["many"])
    labels = [plot.label.split(". ")[0] for plot in found.plots]
    for title in (
        "Terms of the loss",
        "my/metric",
        "Win rate",
        "Held-out accuracy by source",
        "Time by part",
        "Memory by part",
    ):
        assert title in labels
    assert not [label for label in labels if "maths" in label or "rewards/margins/" in label]
    assert len(labels) == len(set(labels))


def test_a_page_that_is_loaded_again(tmp_path):
    run = read_run(write_run(tmp_path / "run", outcome=None))
    write_page((run,), tmp_path / "live.html", refresh_seconds=9)
    write_page((run,), tmp_path / "last.html")
    assert 'http-equiv="refresh" content="9"' in (tmp_path / "live.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in (tmp_path / "last.html").read_text(encoding="utf-8")


def test_picture_and_json(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_state(tmp_path / "b")])
    write_report(runs, Files.all_in(tmp_path))
    picture = (tmp_path / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (1540, 825)
    content = json.loads((tmp_path / "report.json").read_bytes())
    first, second = content["runs"]
    assert first["series"]["rewards/margins"][-1] == [200, pytest.approx(1.2)]
    assert first["seconds_by_part"] == pytest.approx({"policy": 100, "reference": 20, "data": 4, "other": 10})
    assert first["facts"]["reference"]["kind"] == "adapter"
    assert second["facts"] is None
    assert [each["question"] for each in second["answers"]] == [each["question"] for each in first["answers"]]
    recent = sum(math.log1p(math.exp(-1.2 * share)) for share in (0.85, 0.9, 0.95, 1)) / 4  # the last fifth of 18 logs
    assert first["healthy"]["loss"] == {
        "low": None, "high": 0.6931, "outside_since": None, "recent": pytest.approx(recent),
    }  # fmt: skip
