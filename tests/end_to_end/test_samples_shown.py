"""Samples where people see them: win rates among the metrics, trackers, the model card, and the record of a run that
is resumed."""

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from families import tiny_model
from holdfast import DPOTrainer, WinRateCallback, record
from holdfast.record.entries import Sample
from holdfast.samples import tables
from policies import POLICIES, config, rows, trainer

OPTIONS: dict[str, Any] = {
    "generate_samples": 3, "samples_max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 2
}  # fmt: skip


def prefers(text: str) -> Any:
    """A judge that prefers the completion that is `text`."""
    return lambda prompt, first, second: 1.0 if first == text else 0.0 if second == text else 0.5


# --- win rates --------------------------------------------------------------------------------------------------------


def test_a_win_rate_is_a_metric_of_the_evaluation(tmp_path: Path) -> None:
    """The judge knows all of the policy's last completions; the three prompts are won but for those that are equal."""
    won: set[str] = set()
    judge = WinRateCallback(lambda prompt, first, second: float(first in won))
    args = config(tmp_path, **OPTIONS, metric_for_best_model="a_win_rate")
    made = trainer(tiny_model(), args, eval_dataset={"a": rows(4, 1), "b": rows(4, 2)}, callbacks=[judge])
    made.train()
    made.evaluate("a")
    before = list(made._last_samples)
    won |= {sample.policy for sample in before if sample.policy != sample.reference}
    metrics = made.evaluate()
    share = len(won) / 3
    assert share > 0
    assert metrics["eval_a_win_rate"] == pytest.approx(share + (1 - share) / 2)
    assert metrics["eval_a_win_rate_ties"] == pytest.approx(1 - share)
    assert {"eval_b_win_rate", "eval_b_win_rate_se"} <= metrics.keys()
    assert [log["eval_a_win_rate"] for log in made.state.log_history if "eval_a_win_rate" in log][-1] == metrics[
        "eval_a_win_rate"
    ]
    assert not any("win_rate" in name for name in made.evaluate(rows(3, 5)))


def test_the_best_model_may_be_that_of_the_best_win_rate(tmp_path: Path) -> None:
    """A judge whose mind is made up by step: 0.2 at step 1, 0.9 at 2, 0.4 at 3."""
    rates, made = iter([0.2, 0.9, 0.4]), None

    class Steps:
        def __init__(self) -> None:
            self.rate = 0.0

        def __call__(self, prompt: str, first: str, second: str) -> float:
            own = {sample.policy for sample in made._last_samples}
            return self.rate if first in own else 1 - self.rate

    class Next(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            judge.rate = next(rates)

    judge = Steps()
    args = config(
        tmp_path, **{**OPTIONS, "eval_steps": 1}, max_steps=3, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="win_rate",
    )  # fmt: skip
    made = trainer(
        tiny_model(), args, eval_dataset=rows(4, 1), callbacks=[Next(), WinRateCallback(judge, against="chosen")]
    )
    made.train()
    assert [log["eval_win_rate"] for log in made.state.log_history if "eval_win_rate" in log] == pytest.approx(
        [0.2, 0.9, 0.4]
    )
    assert made.state.best_global_step == 2


def test_a_judge_that_fails_ends_the_run(tmp_path: Path) -> None:
    def judge(prompt: str, first: str, second: str) -> float:
        raise KeyError("api key")

    made = trainer(tiny_model(), config(tmp_path, **OPTIONS), eval_dataset=rows(4, 1), callbacks=[
        WinRateCallback(judge, against="chosen")
    ])  # fmt: skip
    with pytest.raises(KeyError, match="api key"):
        made.evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"A WinRateCallback was given with generate_samples=0.*Set generate_samples"),
        ({**OPTIONS, "loss_type": "simpo"}, r"compare the policy with its reference, but loss_type \['simpo'\] needs"),
    ],
)
def test_a_judge_without_anything_to_compare(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), config(tmp_path, **options), eval_dataset=rows(4, 1), callbacks=[
            WinRateCallback(prefers("x"))
        ])  # fmt: skip


def test_a_judge_that_comes_later_is_heeded_or_refused(tmp_path: Path) -> None:
    made = trainer(tiny_model(), config(tmp_path / "0", **OPTIONS), eval_dataset=rows(4, 1))
    made.add_callback(WinRateCallback(prefers("x")))
    assert made.evaluate()["eval_win_rate"] == 0.5
    made = trainer(tiny_model(), config(tmp_path / "1"), eval_dataset=rows(4, 1))
    made.add_callback(WinRateCallback(prefers("x")))
    with pytest.raises(ValueError, match="A WinRateCallback was given with generate_samples=0"):
        made.evaluate()


def test_without_a_reference_there_are_the_policy_and_the_data(tmp_path: Path) -> None:
    judge = WinRateCallback(prefers("x"), against="chosen")
    made = trainer(
        tiny_model(), config(tmp_path, **OPTIONS, loss_type="simpo"), eval_dataset=rows(4, 1), callbacks=[judge]
    )
    assert made.evaluate()["eval_win_rate"] == 0.5
    assert {(each.reference, each.reference_version) for each in made._last_samples} == {(None, None)}


# --- trackers ---------------------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2Jred\u202e <script>alert(1)</script> ![x](http://elsewhere/x.png) ~~~~ | ```"


def hostile() -> list[Sample]:
    return [Sample(step=7, dataset="held out", row=3, prompt=HOSTILE, policy=HOSTILE, reference=None, chosen="c")]


def test_text_that_would_steer_is_shown_as_it_stands() -> None:
    shown = tables.as_markdown(hostile())
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\\x1b[2Jred\\u202e <script>" in shown
    assert "~~~~~text\n" in shown
    assert "**reference**" not in shown
    ((step, row, prompt, policy, reference, chosen, rejected),) = tables.as_rows(hostile())
    assert (step, row, reference, chosen, rejected) == (7, 3, None, "c", None)
    assert prompt == policy == HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_has_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    made = trainer(tiny_model(), config(tmp_path, **OPTIONS, report_to="tensorboard"), eval_dataset=rows(4, 1))
    made.train()
    board = accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    events = board.Tensors("samples/eval/text_summary")
    assert [event.step for event in events] == [2, 4]
    text = events[-1].tensor_proto.string_val[0].decode()
    for sample in made._last_samples:
        assert f"### row {sample.row}" in text
        assert f"~~~text\n{sample.policy}\n~~~" in text
        assert f"~~~text\n{sample.reference}\n~~~" in text


@pytest.mark.filterwarnings("ignore")  # of trackio's own imports
def test_trackio_has_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(trackio, "log", lambda metrics, step=None: logged.append(metrics))
    monkeypatch.setattr(trackio, "init", lambda **options: None)
    monkeypatch.setattr(trackio, "finish", lambda: None)
    monkeypatch.setattr(trackio, "config", {}, raising=False)
    from transformers.integrations import TrackioCallback

    callback = TrackioCallback()
    callback._initialized = True
    tables.show_samples(hostile(), [callback])
    (found,) = logged
    assert found["train/global_step"] == 7
    (row,) = found["samples/held out"].data
    assert list(row) == list(tables.COLUMNS)
    assert row["policy"].startswith("\\x1b\\[2Jred\\u202e &lt;script&gt;alert(1)&lt;/script&gt; !\\[x](http")


def test_wandb_has_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: of the package are used `run`, `Table(columns, data)` and `log(mapping)`."""
    logged: list[dict[str, Any]] = []
    fake: Any = types.ModuleType("wandb")
    fake.run, fake.log = object(), logged.append
    fake.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tables.show_samples(hostile(), [object.__new__(WandbCallback)])
    table = [*tables.COLUMNS], tables.as_rows(hostile())
    assert logged == [{"samples/held out": table, "train/global_step": 7}]


def test_a_tracker_that_fails_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType("wandb")
    fake.run = object()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tables.show_samples(hostile(), [object.__new__(WandbCallback)])
    assert "Samples of step 7 could not be shown by WandbCallback: AttributeError" in caplog.text


# --- the model card ---------------------------------------------------------------------------------------------------


def test_the_card_has_numbers_and_a_sample(tmp_path: Path) -> None:
    made = trainer(tiny_model(), config(tmp_path, **OPTIONS), eval_dataset={"a|b": rows(4, 1)})
    made.create_model_card()
    assert "| step |" not in (tmp_path / "README.md").read_text()
    made.train()
    (tmp_path / "report.png").write_bytes(b"")
    made.create_model_card()
    text = ModelCard.load(tmp_path / "README.md").text
    last = {name: value for log in made.state.log_history for name, value in log.items()}
    evaluated = last["eval_a|b_rewards/margins"]
    assert "| | training | evaluation (a\\|b) |" in text
    assert "| step | 4 | 4 |" in text
    assert f"| rewards/margins | {last['rewards/margins']:.4g} | {evaluated:.4g} |" in text
    sample = made._last_samples[0]
    assert "at step 4 on a held-out prompt" in text
    assert f"**reference**\n\n~~~text\n{sample.reference}\n~~~" in text
    assert "(report.png)" in text


# --- the record -------------------------------------------------------------------------------------------------------


def completions_of(made: DPOTrainer) -> list[int]:
    """A list that grows by the number of prompts whenever some are completed."""
    asked: list[int] = []
    sampler = made._sampler
    assert sampler is not None
    completed = sampler._completed

    def counted(models: Any, prompts: Any) -> list[str]:
        asked.append(len(prompts))
        return completed(models, prompts)

    sampler._completed = counted
    return asked


@pytest.mark.parametrize("moves", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_resumed_run_generates_nothing_again(moves: bool, tmp_path: Path) -> None:
    """Killed after step 4: steps 2 and 4 are recorded. A reference that moves every 4 steps is at version 1 then."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 4} if moves else {}
    options = {**OPTIONS, **moving, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trainer(POLICIES["full"](), config(tmp_path / "whole", **options), eval_dataset=rows(4, 1))
    asked = completions_of(whole)
    whole.train()
    everything = record.read(tmp_path / "whole").samples
    assert [sample.step for sample in everything] == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    assert asked == [3] * (3 + 2 if moves else 3 + 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    checkpoint = str(tmp_path / "again" / "checkpoint-4")
    again = trainer(POLICIES["full"](), config(tmp_path / "again", **options), eval_dataset=rows(4, 1))
    asked = completions_of(again)
    again.train(resume_from_checkpoint=checkpoint)
    assert record.read(tmp_path / "again").samples == everything
    assert asked == [3]  # of the policy at step 6

    shorter = {**options, "samples_max_new_tokens": 2}
    other = trainer(POLICIES["full"](), config(tmp_path / "again", **shorter), eval_dataset=rows(4, 1))
    asked = completions_of(other)
    other.train(resume_from_checkpoint=checkpoint)
    assert asked == [3, 3]  # completions of another length are not compared with those


def test_what_was_evaluated_twice_is_recorded_once(tmp_path: Path) -> None:
    made = trainer(tiny_model(), config(tmp_path, **OPTIONS), eval_dataset=rows(4, 1))
    made.train()
    made.evaluate()
    assert len(record.read(tmp_path).samples) == 6
