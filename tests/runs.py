"""Output folders of runs that never were: records with numbers from formulas, for tests of what is read from them."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.manifest import to_text
from holdfast.record.entries import Sample
from holdfast.record.facts import Audit, Dataset, Facts, Layout, Memory, Model, Reference
from holdfast.record.writer import RecordWriter

Curve = Callable[[float], float]
"""A number at a share of the run, from 0 to 1."""

FACTS = Facts(
    versions={"holdfast": "0.1.0", "torch": "2.13.0"},
    started="2026-01-02T03:04:05+00:00",
    command=("/usr/bin/holdfast", "train", "run.yaml", "--set", "training.beta=0.1"),
    model=Model(
        name="models/small", class_name="LlamaForCausalLM", num_parameters=134_515_008, num_trainable=1_843_200,
        dtype="bfloat16", adapter="LoRA r=16",
    ),
    reference=Reference(
        description="the policy as it was handed in: adapters off, inside the policy, asked per batch, fixed",
        kind="adapter", weights_digest="0123456789abcdef" * 2, held_bytes=0,
    ),
    audit=Audit(
        line="it gives the policy's log-probs on the first batch (largest gap 0 nats in one token)",
        mean_gap_nats=0.0, largest_gap_nats=0.0,
    ),
    layout=Layout(name="prefix-shared", line="prefix-shared rows"),
    data={
        "train": Dataset(num_rows=1000, num_used=990, left_out={"chosen equals rejected": 10}, sources=None),
        "eval": Dataset(num_rows=400, num_used=400, left_out={}, sources=None),
    },
    memory=Memory(weights=269_000_000, reference=0, gradients=7_372_800, optimizer=14_745_600),
    loss_types=("sigmoid",),
    beta=0.1,
    options={"beta": 0.1, "learning_rate": 5e-6, "output_dir": "out"},
    num_processes=1,
    device="cpu",
    max_steps=200,
    num_epochs=1.0,
)  # fmt: skip


def squeezed(share: float, speed: float = 1.0) -> dict[str, float]:
    """The numbers of a run in which both completions fall and the rejected ones further, at beta 0.1: at the end by 8
    and 20 nats, so the margin is 1.2."""
    chosen, rejected = -8 * speed * share, -20 * speed * share
    margin = 0.1 * (chosen - rejected)
    return {
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": 0.1 * chosen,
        "rewards/rejected": 0.1 * rejected,
        "rewards/margins": margin,
        "rewards/margins_p10": margin - 0.5 * share,
        "rewards/margins_p50": margin,
        "rewards/margins_p90": margin + 0.7 * share,
        "rewards/accuracies": 0.5 + 0.3 * share,
        "reference/kl_chosen": chosen,
        "reference/kl_rejected": rejected,
        "logps/chosen": -100 + chosen,
        "logps/rejected": -120 + rejected,
        "grad_norm": 2 - share,
        "learning_rate": 5e-6 * (1 - share),
        "time/policy": 0.5,
        "time/reference": 0.1,
        "time/data": 0.02,
        "time/other": 0.05,
        "speed/pairs_per_second": 12.0,
        "speed/tokens_per_second": 3000.0,
        "memory/peak_bytes": 6.5e8,
    }


def write_run(
    folder: Path,
    numbers: Callable[[float], Mapping[str, float]] = squeezed,
    *,
    facts: Facts = FACTS,
    num_logs: int = 20,
    num_evaluations: int = 4,
    outcome: str | None = "finished",
    syncs: tuple[int, ...] = (),
    num_samples: int = 0,
) -> Path:
    """The record of a run that logs `numbers(share)` in equal distances up to its last step, evaluates the same numbers
    so often (without times), and draws samples at the last evaluation. `outcome` None: it goes on. Returns the
    folder."""
    writer = RecordWriter(folder)
    writer.begin(facts)
    for number in range(1, num_logs + 1):
        share = number / num_logs
        step = round(share * facts.max_steps)
        writer.log(step, share, dict(numbers(share)))
        for sync in [each for each in syncs if step - facts.max_steps / num_logs < each <= step]:
            writer.event(sync, "sync", f"sync {syncs.index(sync) + 1} of the reference")
        if num_evaluations and number % (num_logs // num_evaluations) == 0:
            of_evaluation = {f"eval_{name}": value for name, value in numbers(share).items() if _is_evaluated(name)}
            writer.log(step, share, of_evaluation | {"eval_runtime": 1.0})
    for row in range(num_samples):
        writer.sample(
            Sample(
                step=facts.max_steps, dataset="eval", row=row, prompt=f"Question {row}?\n<script>alert(1)</script>",
                policy="Yes \x1b[31m& <b>so</b>\nsecond line", reference="No.", chosen="Yes.", rejected="",
            )
        )  # fmt: skip
    if outcome is not None:
        writer.end(outcome)
    return folder


def write_state(folder: Path, numbers: Callable[[float], Mapping[str, float]] = squeezed, num_logs: int = 20) -> Path:
    """`trainer_state.json` alone, as a run without a record leaves it."""
    history: list[dict[str, Any]] = [
        {"step": 10 * number, "epoch": number / num_logs, **numbers(number / num_logs)}
        for number in range(1, num_logs + 1)
    ]
    history.append({"step": 10 * num_logs, "epoch": 1.0, "train_runtime": 3.0, "train_loss": 0.5, "total_flos": 1e9})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    return folder


def write_checkpoint(folder: Path, step: int, **manifest: Any) -> Path:
    """A folder that is a complete checkpoint, as far as its manifest says."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "reference").mkdir(parents=True)
    content = {
        "format": 2, "kind": "adapter", "place": {"num_passes": 0, "num_batches": step}, "version": 0, "drift": 0.0,
        "state": None, "weights": "ab" * 16, "description": "the policy as it was handed in", **manifest,
    }  # fmt: skip
    (checkpoint / "reference" / "manifest.json").write_text(to_text(content), encoding="utf-8")
    return checkpoint


def moving(facts: Facts = FACTS, steps: int = 50) -> Facts:
    """The facts of a run whose reference is synced every so many steps."""
    assert facts.reference is not None
    reference = replace(facts.reference, moves=True, mixup_alpha=0.6, sync_steps=steps)
    return replace(facts, reference=reference)


def _is_evaluated(name: str) -> bool:
    return not name.startswith(("time/", "speed/", "memory/", "grad_norm", "learning_rate"))
