"""A reference asked for beside losses that compare with none: it is kept for the metrics, and trains nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model
from naive import logp
from policies import POLICIES, config, rows, sft_lora, trainer

LOSSES: list[dict[str, Any]] = [
    {"loss_type": "sft"},
    {"loss_type": "simpo"},
    {"loss_type": "orpo"},
    {"loss_type": "cpo"},
    {"loss_type": ["cpo", "sft"], "loss_weights": [1.0, 0.1]},
]

WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "second module": ("full", {"reference": "model"}, {}),
    "snapshot": ("full", {"reference": "snapshot", "snapshot_device": "cpu"}, {}),
    "precomputed": ("full", {"reference": "precomputed"}, {}),
    "scored ahead": ("full", {"precompute_ref_log_probs": True}, {}),
    "adapters off": ("lora_fresh", {"reference": "adapter"}, {}),
    "another adapter": ("lora_fresh_over_sft", {"ref_adapter_name": "default", "model_adapter_name": "dpo"}, {}),
    "named": ("full", {}, {"ref_model": lambda: tiny_model(seed=5)}),
    "named, scored ahead": ("full", {"precompute_ref_log_probs": True}, {"ref_model": lambda: tiny_model(seed=5)}),
    "several": ("full", {"ref_model_weights": [0.25, 0.75]}, {
        "ref_model": lambda: [tiny_model(seed=5), tiny_model(seed=6)]
    }),
}  # fmt: skip


def logs(made: Any) -> list[dict[str, float]]:
    return [
        {name: value for name, value in log.items() if not any(word in name for word in ("runtime", "per_second"))}
        for log in made.state.log_history
    ]


OFTEN = [("sft", "second module"), ("simpo", "named, scored ahead"), ("orpo", "adapters off"), ("cpo", "several")]


@pytest.mark.parametrize(
    ("losses", "policy", "options", "arguments"),
    [
        pytest.param(
            losses,
            *WAYS[way],
            id=f"{losses['loss_type']}, {way}",
            marks=() if (losses["loss_type"], way) in OFTEN else pytest.mark.nightly,
        )
        for losses in LOSSES
        for way in WAYS
    ],
)
def test_it_trains_as_without_and_has_the_metrics(
    losses: dict[str, Any], policy: str, options: dict[str, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    """All other numbers and the weights are those of a run without a reference, bit for bit. At the first step, whose
    batch has all rows, the metrics are the policy's log-probs less the reference's, of single unpadded rows."""
    made = []
    for number, asked in enumerate([{"model_adapter_name": options.get("model_adapter_name")}, options]):
        torch.manual_seed(0)
        named = {name: make() for name, make in arguments.items()} if number else {}
        args = config(tmp_path / str(number), **losses, **asked, per_device_train_batch_size=12, max_steps=2)
        made.append(trainer(POLICIES[policy](), args, **named))
        made[-1].train()
    plain, kept = made
    assert plain.reference is None
    mine = [{name: value for name, value in log.items() if not name.startswith("reference/")} for log in logs(kept)]
    assert mine == logs(plain)
    assert all(map(torch.equal, plain.model.parameters(), kept.model.parameters()))
    found = logs(kept)[0]
    reference: Any = POLICIES[policy]()
    if "ref_adapter_name" in options:
        reference.set_adapter("default")
    others = [tiny_model(seed=5), tiny_model(seed=6)]
    shares = options.get("ref_model_weights", [1.0])
    models = list(zip(shares, others if arguments else [reference], strict=False))
    start = POLICIES[policy]().eval()
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            gaps = [
                logp(start, row, f"{side}_ids")
                - sum(share * logp(model.eval(), row, f"{side}_ids") for share, model in models)
                for row in rows()
            ]
        assert found[f"reference/kl_{side}"] == pytest.approx(float(torch.stack(gaps).mean()), abs=2e-5)


def test_one_that_moves(tmp_path: Path) -> None:
    """A sync to the policy after each step: before the next one the two are equal again."""
    options = {"reference": "model", "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    made = trainer(POLICIES["full"](), config(tmp_path, loss_type="simpo", **options))
    made.train()
    found = [log for log in made.state.log_history if "loss" in log]
    assert [log["reference/version"] for log in found] == [1, 2, 3, 4]
    assert all(abs(log["reference/kl_chosen"]) < 1e-5 for log in found)


def test_it_is_resumed_and_refused_as_any_other(tmp_path: Path) -> None:
    options = {"loss_type": "sft", "reference": "snapshot", "save_strategy": "steps", "save_steps": 2}
    whole = trainer(sft_lora(), config(tmp_path / "whole", **options))
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    again = trainer(sft_lora(), config(tmp_path / "again", **options))
    again.train(resume_from_checkpoint=checkpoint)
    assert logs(again)[:-1] == logs(whole)[:-1]
    other = trainer(sft_lora(), config(tmp_path / "other", **options), ref_model=None, train_dataset=rows(12, seed=3))
    with pytest.raises(ValueError, match="data"):
        other.train(resume_from_checkpoint=checkpoint)


def test_none_is_kept_unless_it_is_asked_for(tmp_path: Path) -> None:
    for number, losses in enumerate(LOSSES):
        assert trainer(tiny_model(), config(tmp_path / str(number), **losses)).reference is None
    args = config(tmp_path, loss_type="simpo", reference="none")
    with pytest.raises(ValueError, match=r"`ref_model` was given together with reference='none'.*leave `reference`"):
        trainer(tiny_model(), args, ref_model=tiny_model(seed=5))
