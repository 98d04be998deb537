"""What a run writes down of itself and says: facts, logs, events, quantiles, terms, times; resumed as well."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ProgressCallback, TrainerCallback

from families import tiny_model
from holdfast.interruption import Stopped
from holdfast.losses import LOSSES, LossInputs, LossOptions, PairLogps
from holdfast.record import read
from holdfast.training.progress_callback import RunProgress
from holdfast.training.run_facts import changed_options, model_facts
from policies import POLICIES, config, logged, rows, sft_lora, trainer

SAVING = {"save_strategy": "steps", "save_steps": 2}
QUANTILES = ("rewards/margins_p10", "rewards/margins_p50", "rewards/margins_p90")
OF_MACHINE = ("time/", "speed/", "memory/")


class Losses(TrainerCallback):
    """Keeps what callbacks get to log."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def rewards(ours: Any, pairs: Any) -> np.ndarray:
    """The margin of each pair, from the log-probs of the trainer's policy and reference [P]."""
    batch = ours._collated(list(pairs))
    with torch.no_grad():
        from holdfast.scoring.score import score

        policy = score(ours.model, batch).logps.sums()
    reference = ours.reference.logps(batch).sums()
    gaps = ours.args.beta * (policy - reference)
    return (gaps[batch.chosen] - gaps[batch.rejected]).double().numpy()


def test_the_record_of_a_run(tmp_path: Path) -> None:
    seen = Losses()
    args = config(tmp_path, **SAVING, eval_strategy="steps", eval_steps=2, sync_ref_model=True, ref_model_sync_steps=3)
    ours = trainer(tiny_model(), args, eval_dataset=rows(5, seed=1), callbacks=[seen])
    ours.train()
    found = read(tmp_path)
    facts = found.facts
    assert (facts.outcome, facts.max_steps, facts.beta, facts.loss_types) == ("finished", 4, 0.2, ("sigmoid",))
    num_parameters = sum(each.numel() for each in ours.model.parameters())
    assert (facts.model.num_parameters, facts.model.num_trainable) == (num_parameters, num_parameters)
    assert facts.memory.gradients == 4 * num_parameters
    assert facts.memory.optimizer == 0  # plain SGD
    assert facts.reference is not None
    assert (facts.reference.moves, facts.reference.sync_steps) == (True, 3)
    assert facts.reference.weights_digest == ours._provenance.weights
    assert facts.audit is not None
    assert facts.audit.largest_gap_nats == 0.0
    assert {name: (each.num_rows, each.num_used) for name, each in facts.data.items()} == {
        "train": (12, 12), "eval": (5, 5),
    }  # fmt: skip
    kinds = [(event.step, event.kind) for event in found.events]
    assert kinds == [(2, "evaluation"), (2, "checkpoint"), (3, "sync"), (4, "evaluation"), (4, "checkpoint")]
    # What callbacks got is what is written; `log_history` has all of it but what depends on the machine.
    for log, entry, history in zip(found.logs, seen.logs, ours.state.log_history, strict=True):
        assert {**log.numbers, "epoch": log.epoch} == pytest.approx(entry)
        assert history.items() >= {k: v for k, v in entry.items() if not k.startswith(OF_MACHINE)}.items()
        assert not [name for name in history if name.startswith(OF_MACHINE)]
    seconds = [log.seconds for log in found.logs]
    assert seconds == sorted(seconds)


def test_times_add_up_to_the_time_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a second passes on at each reading: the parts of a log add up to all of its seconds, and speeds are
    12 pairs of 4 steps over them. An evaluation is no part of a step."""
    from holdfast.training import pace

    now = iter(range(10**9))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: float(next(now)))
    seen = Losses()
    args = config(tmp_path, logging_steps=4, eval_strategy="steps", eval_steps=2, reference="model")
    trainer(tiny_model(), args, eval_dataset=rows(5), callbacks=[seen]).train()
    (log,) = [entry for entry in seen.logs if "loss" in entry]
    assert all(log[f"time/{part}"] >= 1 for part in ("data", "reference", "policy", "other"))
    step = sum(value for name, value in log.items() if name.startswith("time/"))
    assert log["speed/pairs_per_second"] == pytest.approx(3 / step)
    assert log["speed/tokens_per_second"] == pytest.approx(log["num_tokens"] / 4 / step)
    assert log["memory/peak_bytes"] > 2**20


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_quantiles_are_those_of_all_pairs(layout: str, tmp_path: Path) -> None:
    """Learning nothing, the margins of the policy are those of each pair against another model as reference."""
    args = config(tmp_path, learning_rate=0.0, logging_steps=4, layout=layout)
    ours = trainer(tiny_model(), args, ref_model=tiny_model(seed=3))
    ours.train()
    expected = np.quantile(rewards(ours, rows()), [0.1, 0.5, 0.9])
    assert [logged(ours, name)[0] for name in QUANTILES] == pytest.approx(expected, abs=1e-5)
    evaluated = ours.evaluate(rows(7, seed=2))
    expected = np.quantile(rewards(ours, rows(7, seed=2)), [0.1, 0.5, 0.9])
    assert [evaluated[f"eval_{name}"] for name in QUANTILES] == pytest.approx(expected, abs=1e-5)


def test_a_resumed_run_logs_the_quantiles_of_the_uninterrupted_one(tmp_path: Path) -> None:
    """A log of 3 steps, stopped after the second: the margins of the first two come from the checkpoint."""
    options = SAVING | {"logging_steps": 3, "max_steps": 6}
    whole = trainer(tiny_model(), config(tmp_path / "whole", **options))
    whole.train()
    trainer(tiny_model(), config(tmp_path / "parts", **options | {"max_steps": 2})).train()
    resumed = trainer(tiny_model(), config(tmp_path / "parts", **options))
    resumed.train(resume_from_checkpoint=True)
    for name in QUANTILES:
        assert logged(resumed, name) == logged(whole, name)
    assert [each.step for each in read(tmp_path / "parts").facts.resumed] == [2]
    steps = [log.step for log in read(tmp_path / "parts").logs if "rewards/margins" in log.numbers]
    assert steps == [3, 6]


def test_the_terms_of_a_loss_add_up_to_it(tmp_path: Path) -> None:
    """0.5 * hinge + 2 * sft; hinge = relu(1 - margin), from the margins of the pairs."""
    args = config(tmp_path, loss_type=["hinge", "sft"], loss_weights=[0.5, 2.0], learning_rate=0.0, logging_steps=4)
    ours = trainer(tiny_model(), args, ref_model=tiny_model(seed=3))
    ours.train()
    hinge, sft = logged(ours, "loss_term/hinge")[0], logged(ours, "loss_term/sft")[0]
    assert hinge == pytest.approx(0.5 * np.maximum(0, 1 - rewards(ours, rows())).mean(), abs=1e-5)
    assert hinge + sft == pytest.approx(logged(ours)[0], abs=1e-5)
    evaluated = ours.evaluate(rows())
    assert evaluated["eval_loss_term/hinge"] == pytest.approx(hinge, abs=1e-5)
    assert not [name for name in trainer(tiny_model(), config(tmp_path)).evaluate(rows()) if "loss_term" in name]


def test_the_router_is_a_term(tmp_path: Path) -> None:
    ours = trainer(tiny_model("qwen3_moe"), config(tmp_path, router_aux_loss_coef=0.5, max_steps=1))
    ours.train()
    aux = logged(ours, "loss_term/aux_loss")[0]
    assert aux == pytest.approx(0.5 * logged(ours, "aux_loss")[0])
    assert logged(ours, "loss_term/sigmoid")[0] + aux == pytest.approx(logged(ours)[0], abs=1e-5)


@pytest.mark.parametrize(("error", "outcome"), [(RuntimeError("x"), "failed"), (None, "interrupted")])
def test_how_a_run_ended(error: Exception | None, outcome: str, tmp_path: Path) -> None:
    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and error is not None:
                raise error
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    ours = trainer(tiny_model(), config(tmp_path), callbacks=[Ends()])
    with pytest.raises((RuntimeError, Stopped)):
        ours.train()
    found = read(tmp_path)
    assert (found.facts.outcome, found.logs[-1].step) == (outcome, 1 if error else 2)
    assert found.facts.finished is not None


def test_no_record_where_none_is_asked_for(tmp_path: Path) -> None:
    trainer(tiny_model(), config(tmp_path, run_record=False)).train()
    assert not (tmp_path / "record").exists()


def test_the_banner_and_the_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A learning rate far too high pushes both completions away; it is said once, and is an event."""
    with caplog.at_level(logging.WARNING):
        args = config(tmp_path, max_steps=16, learning_rate=0.05, optim="adamw_torch")
        ours = trainer(tiny_model(), args)
        ours.train()
    found = read(tmp_path)
    ours.train()
    said = [record.getMessage() for record in caplog.records if record.name == "holdfast.training.run_watch"]
    banners = [text for text in said if text.startswith("model ")]
    assert [len(text.splitlines()) for text in banners] == [6]
    (alarm,) = [event for event in found.events if event.kind == "alarm"]
    assert alarm.numbers["chosen_now"] < -1 > found.logs[-2].numbers["reference/kl_chosen"]
    assert [text for text in said if "chosen completions fall" in text] == [alarm.text]


@pytest.mark.parametrize("kind", ["full", "lora_sft", "prompt_tuning"])
def test_the_model_in_numbers(kind: str) -> None:
    policy = POLICIES[kind]()
    found = model_facts(policy)
    parameters = list(policy.parameters())
    assert found.num_parameters == sum(each.numel() for each in parameters)
    assert found.num_trainable == sum(each.numel() for each in parameters if each.requires_grad)
    assert (found.class_name, found.dtype) == ("LlamaForCausalLM", "float32")
    assert (found.adapter is None) == (kind == "full")
    assert model_facts(sft_lora()).adapter == "default: LORA r=4"


def test_options_that_were_changed_without_secrets(tmp_path: Path) -> None:
    found = changed_options(config(tmp_path, hub_token="hf_secret", model_init_kwargs={"token": "hf_other"}))
    text = json.dumps(found)
    assert "hf_" not in text
    assert found["beta"] == 0.2
    assert not {"bf16", "debug", "label_smoothing", "accelerator_config"} & set(found)


def test_transformers_bar_is_replaced_and_can_be_removed(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path, disable_tqdm=False))
    bars = [each for each in ours.callback_handler.callbacks if isinstance(each, ProgressCallback)]
    assert [type(each) for each in bars] == [RunProgress]
    ours.remove_callback(ProgressCallback)
    assert not [each for each in ours.callback_handler.callbacks if isinstance(each, ProgressCallback)]


def test_the_sum_of_terms_is_the_loss_of_pairs() -> None:
    """Against the functions of the table, at fp64."""
    from holdfast.losses import loss_terms, sum_of_terms

    draw = torch.Generator().manual_seed(0)
    chosen, rejected = (-torch.rand(5, generator=draw, dtype=torch.float64) * 9 for _ in range(2))
    ones = torch.full((5,), 4.0, dtype=torch.float64)
    sizes = {"chosen_lengths": ones.long(), "rejected_lengths": ones.long(), "chosen_likelihood": chosen}
    policy = PairLogps(chosen=chosen, rejected=rejected, **sizes)
    inputs = LossInputs(policy=policy, reference=policy, options=LossOptions())
    terms = loss_terms(policy, policy, loss_types=["hinge", "ipo"], loss_weights=[1.0, 3.0], options=LossOptions())
    expected = LOSSES["hinge"].function(inputs) + 3 * LOSSES["ipo"].function(inputs)
    assert torch.equal(sum_of_terms(terms, None), expected)
    assert torch.equal(sum_of_terms(terms, 2 * ones), 8 * expected)
