"""A run prints one date: resumed another day, in another folder, without caches, it goes on bit for bit."""

import json
import logging
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from transformers.utils import chat_template_utils

import tiny
from families import tiny_model
from holdfast.data import dates
from holdfast.data.formats import read_preference
from holdfast.data.prepare import prepare_dataset
from holdfast.data.tokenize import tokenize
from policies import config, logged, trainer

pytestmark = pytest.mark.slow

TEMPLATE = "{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}" + tiny.CHAT_TEMPLATE
DATED = tiny.tokenizer(vocab_size=300)
DATED.chat_template = TEMPLATE
PLAIN = tiny.tokenizer(vocab_size=300)
ROWS = tiny.preference_rows(12)
SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
AHEAD = {"precompute_ref_log_probs": True}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 1}


def set_clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """The clock as holdfast sees it, and as transformers does."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(day)

    chat_template_utils._compile_jinja_template.cache_clear()
    monkeypatch.setattr(chat_template_utils, "datetime", Clock, raising=False)
    monkeypatch.setattr(dates, "today", lambda: day)


def dated(folder: Path, stream: bool = False, tokenizer: Any = DATED, **options: Any) -> Any:
    data: Any = Dataset.from_list(ROWS)
    args = config(folder, **SAVING | options)
    policy = tiny_model(vocab_size=300)
    return trainer(
        policy, args, train_dataset=data.to_iterable_dataset() if stream else data,
        eval_dataset=Dataset.from_list(ROWS[:5]), processing_class=tokenizer,
    )  # fmt: skip


WAYS: dict[str, dict[str, Any]] = {
    "live": {},
    "ahead": AHEAD,
    "moving": MOVING,
    "stream": {"stream": True},
    "asked for": {"template_date": "2026-01-31"},
    "asked for, ahead": {"template_date": "2026-01-31", **AHEAD},
}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if way in ("stream", "asked for, ahead") else pytest.mark.nightly) for way in WAYS],
)
def test_resumed_the_next_day(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    day = WAYS[way].get("template_date", "2026-02-28")
    set_clock(monkeypatch, "2026-02-28")
    whole = dated(tmp_path / "whole", **WAYS[way])
    whole.train()
    dated(tmp_path / "parts", **WAYS[way], max_steps=2).train()
    set_clock(monkeypatch, "2026-03-01")
    later = dated(tmp_path / "later", **WAYS[way])
    later.train()
    assert (logged(later) == logged(whole)) == ("template_date" in WAYS[way])
    caplog.clear()
    resumed = dated(tmp_path / "parts", **WAYS[way], resume_from_checkpoint=True if "ahead" in way else None)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    manifest = json.loads((tmp_path / "parts" / "checkpoint-4" / "reference" / "manifest.json").read_text())
    assert manifest["template_date"] == day
    said = [message for message in caplog.messages if "Chat templates print the date 2026-02-28" in message]
    assert len(said) == (0 if "ahead" in way or "template_date" in WAYS[way] else 1)
    if "ahead" in way:
        assert [message for message in caplog.messages if "(train): 24 of 24" in message and ", 0 scored" in message]


def test_scored_ahead_for_another_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer scored today's rows when it was made, and finds those of the recorded date in the store."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    set_clock(monkeypatch, "2026-02-28")
    whole = dated(tmp_path / "whole", **AHEAD)
    whole.train()
    dated(tmp_path / "parts", **AHEAD, max_steps=2).train()
    set_clock(monkeypatch, "2026-03-01")
    resumed = dated(tmp_path / "parts", **AHEAD)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)


def test_a_date_that_contradicts_the_checkpoint_is_refused(tmp_path: Path) -> None:
    dated(tmp_path, max_steps=2, template_date="2026-01-31").train()
    with pytest.raises(ValueError, match=r"template_date='2026-02-01' was asked for, but .*printed 2026-01-31 in the"):
        dated(tmp_path, template_date="2026-02-01").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("written", ["31.1.2026", "2026-1-31", "20260131", "2026-02-30", "", 20260131])
def test_what_is_no_date_is_refused(written: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"template_date=.* was asked for; it is a date as YYYY-MM-DD"):
        config(tmp_path, template_date=written)


TEXT_ROWS = [{"prompt": "a", "chosen": " b", "rejected": " c"}]


@pytest.mark.parametrize(
    ("tokenizer", "rows", "why"),
    [(PLAIN, ROWS, "does not call `strftime_now`"), (DATED, TEXT_ROWS, "the rows hold no messages")],
)
def test_a_date_that_nothing_prints_is_refused(tokenizer: Any, rows: Any, why: str, tmp_path: Path) -> None:
    args = config(tmp_path, template_date="2026-01-31")
    with pytest.raises(ValueError, match=rf"template_date='2026-01-31' was asked for, but no date is printed: .*{why}"):
        trainer(tiny_model(vocab_size=300), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


@pytest.mark.parametrize("template", [TEMPLATE, {"default": TEMPLATE, "tool_use": tiny.CHAT_TEMPLATE}])
def test_the_printed_date_is_the_given_one(template: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.tokenizer(vocab_size=300)
    tokenizer.chat_template = template
    set_clock(monkeypatch, "2026-03-01")
    assert dates.prints_date(tokenizer)
    for date, printed in ((None, "01 Mar 2026"), ("2024-02-29", "29 Feb 2024")):
        pair = tokenize(read_preference(ROWS[0]), tokenizer, date)
        assert str(tokenizer.decode(pair.prompt_ids)).startswith(f"Today is {printed}. ")
        assert pair.prompt_is_prefix


FORMATS = ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "100%% on %%d %d", "%j %H:%M:%S %p", "%D %y", "", "no date"]


@pytest.mark.parametrize("begin", ["", "\n", "\n\n  ", "  {% if true %}", "  {%- if true %}", "{% if true %}\n\n"])
@pytest.mark.parametrize("wanted", FORMATS)
def test_the_template_prints_what_transformers_would(wanted: str, begin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On that day: directives, white space at the beginning, a macro that asks, and the question whether it exists."""
    tokenizer = tiny.tokenizer(vocab_size=300)
    asked = "strftime_now(" + json.dumps(wanted) + ")"
    text = "{% macro ask() %}{{ " + asked + " }}{% endmacro %}"
    text += "{% if strftime_now is defined %}[{{ ask() }}|{{ " + asked + "[:2] }}]{% endif %}"
    template = begin + text + ("{% endif %}" if "if" in begin else "")
    set_clock(monkeypatch, "2024-02-09")
    expected = tokenizer.apply_chat_template(ROWS[0]["prompt"], chat_template=template, tokenize=False)
    set_clock(monkeypatch, "2026-11-30")
    template = dates.template_with_date(template, "2024-02-09")
    assert tokenizer.apply_chat_template(ROWS[0]["prompt"], chat_template=template, tokenize=False) == expected
    assert datetime(2024, 2, 9).strftime(wanted) in expected


def test_the_date_is_part_of_the_cache_key_only_where_it_is_printed(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    data: Any = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path), split="train")
    for tokenizer, num_keys in ((PLAIN, 1), (DATED, 2)):
        parts: list[Any] = [prepare_dataset(data, tokenizer, template_date=day) for day in ("2026-01-31", "2026-02-01")]
        assert len({part._fingerprint for part in parts}) == num_keys


# --- another machine --------------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, os, sys
from pathlib import Path
from test_dates import SAVING, DATED
import test_dates
from datasets import load_dataset
from transformers.utils import chat_template_utils
from datetime import datetime
from holdfast.data import dates
from families import tiny_model
from policies import config, logged, trainer

folder, day, steps, options = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
stream = options.pop("stream", False)
class Clock(datetime):
    @classmethod
    def now(cls, tz=None): return datetime.fromisoformat(day)
chat_template_utils.datetime = Clock
dates.today = lambda: day
data = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", streaming=stream)
args = config(folder / "out", **SAVING | options)
ours = trainer(tiny_model(vocab_size=300), args, train_dataset=data, processing_class=DATED)
if steps < 4:
    from transformers import TrainerCallback
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == steps: os._exit(9)  # as a kill after a save
    ours.add_callback(Stop())
ours.train(resume_from_checkpoint=(folder / "out" / "checkpoint-2").exists())
print(json.dumps(logged(ours)))
"""


def elsewhere(folder: Path, day: str, steps: int, options: dict[str, Any]) -> list[float] | None:
    """The losses of a run in a fresh process whose caches are those of `folder`; None where it was stopped."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "home"),
        "HOLDFAST_HOME": str(folder / "store"),
    }
    command = [sys.executable, "-c", ELSEWHERE, str(folder), day, str(steps), json.dumps(options)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == (0 if steps == 4 else 9), process.stderr[-3000:]
    return json.loads(process.stdout.strip().splitlines()[-1]) if steps == 4 else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.nightly),
        pytest.param(MOVING, marks=pytest.mark.nightly),
        pytest.param({"stream": True}, marks=pytest.mark.nightly),
        AHEAD | {"resume_from_checkpoint": "true"},
    ],
)
def test_a_copied_folder_goes_on_without_caches(options: dict[str, Any], tmp_path: Path) -> None:
    """Stopped after a save, copied, resumed a day later by a process that finds no cache of datasets or log-probs."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        Dataset.from_list(ROWS).to_json(tmp_path / name / "rows.jsonl")
    whole = elsewhere(tmp_path / "whole", "2026-02-28", 4, options)
    elsewhere(tmp_path / "stopped", "2026-02-28", 2, options)
    (tmp_path / "copied").mkdir()
    shutil.copytree(tmp_path / "stopped" / "out", tmp_path / "copied" / "out")
    shutil.move(tmp_path / "stopped" / "rows.jsonl", tmp_path / "copied" / "rows.jsonl")
    shutil.rmtree(tmp_path / "stopped")
    assert elsewhere(tmp_path / "copied", "2026-03-01", 4, options) == whole
