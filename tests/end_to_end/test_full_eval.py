"""Evaluation in half precision (`bf16_full_eval`) leaves no trace: policy, reference, store and training are as without
it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families import tiny_model
from holdfast.policy import full_eval
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, rows, trainer

pytestmark = pytest.mark.slow

WAYS: dict[str, dict[str, Any]] = {
    "given": {"reference": "model"},
    "captured": {"reference": "model"},
    "implicit": {"reference": "auto"},
    "snapshot": {"reference": "snapshot"},
    "snapshot on disk": {"reference": "snapshot", "snapshot_device": "disk", "reference_window": 2},
    "precomputed": {"reference": "precomputed"},
    "precomputed, synced": {"reference": "precomputed", "sync_ref_model": True, "ref_model_sync_steps": 2},
}
DTYPES = {"bf16_full_eval": torch.bfloat16, "fp16_full_eval": torch.float16}


def state(policy: nn.Module) -> str:
    """A digest of all parameters and buffers, dtypes included."""
    return digest([*policy.named_parameters(), *policy.named_buffers()])


def make_trainer(folder: Path, kind: str, way: str, **options: Any) -> Any:
    other = {"ref_model": tiny_model(seed=5)} if way == "given" else {}
    store = {"reference_store": str(folder / "store")} if way.startswith("precomputed") else {}
    return trainer(POLICIES[kind](), config(folder, **WAYS[way], **store, **options), eval_dataset=rows(6, 4), **other)


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["full", "lora_sft"])
def test_an_evaluation_leaves_no_trace(kind: str, way: str, tmp_path: Path) -> None:
    """Evaluated before, while and after training, on known data and on new: the same losses, weights and reference, bit
    for bit, as a run that is never cast; and the numbers of an evaluation are of a policy that really was cast."""
    plain = make_trainer(tmp_path / "plain", kind, way, eval_strategy="steps", eval_steps=2)
    ours = make_trainer(tmp_path / "ours", kind, way, eval_strategy="steps", eval_steps=2, bf16_full_eval=True)
    seen: list[torch.dtype] = []
    ours.model.register_forward_pre_hook(lambda *_: seen.append(next(ours.model.parameters()).dtype))

    before = state(ours.model)
    objects = [id(p) for p in ours.model.parameters()]
    first = plain.evaluate(), ours.evaluate(), plain.predict(rows(4, 8)).metrics, ours.predict(rows(4, 8)).metrics
    assert state(ours.model) == before == state(plain.model)
    assert [id(p) for p in ours.model.parameters()] == objects
    plain.train()
    ours.train()
    assert logged(ours) == logged(plain)
    assert logged(ours, "eval_loss") == logged(plain, "eval_loss"), "while training nothing is cast"
    before = state(ours.model)
    last = plain.evaluate(), ours.evaluate(), plain.predict(rows(4, 9)).metrics, ours.predict(rows(4, 9)).metrics
    assert state(ours.model) == before == state(plain.model)

    assert torch.bfloat16 in seen
    for unrounded, rounded in (first[:2], first[2:], last[:2], last[2:]):
        prefix = next(iter(rounded)).split("_")[0]
        assert rounded[f"{prefix}_logps/chosen"] == pytest.approx(unrounded[f"{prefix}_logps/chosen"], abs=0.5)
        assert rounded[f"{prefix}_logps/chosen"] != unrounded[f"{prefix}_logps/chosen"]
        ours_ref, plain_ref = (
            m[f"{prefix}_logps/chosen"] - m[f"{prefix}_reference/kl_chosen"] for m in (rounded, unrounded)
        )
        assert ours_ref == pytest.approx(plain_ref, abs=1e-4), "the reference is asked as it is in training"


@pytest.mark.parametrize("option", DTYPES)
def test_an_evaluation_is_of_the_cast_policy(option: str, tmp_path: Path) -> None:
    """The loss is that of the same trainer whose policy was cast by hand, against the same reference."""
    cast = copy.deepcopy(tiny_model(seed=5)).to(DTYPES[option])
    by_hand = trainer(cast, config(tmp_path, reference_audit=False), ref_model=tiny_model())
    ours = trainer(tiny_model(seed=5), config(tmp_path, **{option: True}), ref_model=tiny_model())
    held_out = rows(6, 4)
    expected, found = by_hand.evaluate(held_out), ours.evaluate(held_out)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)


def test_gradients_and_buffers_come_back(tmp_path: Path) -> None:
    policy = tiny_model()
    ours = trainer(policy, config(tmp_path, bf16_full_eval=True))
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 1 / 3)
    buffers = dict(policy.named_buffers())
    assert buffers
    ours.evaluate(rows(4))
    assert all(torch.equal(p.grad, torch.full_like(p, 1 / 3)) for p in policy.parameters())
    assert all(buffer is buffers[name] for name, buffer in policy.named_buffers())


def test_an_evaluation_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    policy = tiny_model()

    def fails(prediction: Any) -> dict[str, float]:
        raise RuntimeError("of the user's")

    ours = trainer(policy, config(tmp_path, bf16_full_eval=True), compute_metrics=fails)
    before = state(policy)
    with pytest.raises(RuntimeError, match="of the user's"):
        ours.evaluate(rows(4))
    assert state(policy) == before


def test_what_is_stored_meanwhile_is_what_any_run_stores(tmp_path: Path) -> None:
    """New data, scored in the loop of a cast evaluation into the store that a plain run then reads."""
    shared = {"reference": "precomputed", "reference_window": 2, "reference_store": str(tmp_path / "store")}
    new = rows(6, 9)
    for options in ({"bf16_full_eval": True}, {}):
        ours = trainer(POLICIES["full"](), config(tmp_path, **shared, **options))
        metrics = ours.evaluate(new)
        ours.train()
    live = trainer(POLICIES["full"](), config(tmp_path)).evaluate(new)
    assert metrics["eval_loss"] == pytest.approx(live["eval_loss"], abs=1e-6)


def test_a_quantised_policy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_eval, "is_quantised", lambda module: True)
    with pytest.raises(ValueError, match=r"bf16_full_eval=True was asked for, but the policy is quantised.*bf16=True"):
        trainer(POLICIES["lora_fresh"](), config(tmp_path, bf16_full_eval=True))


def test_a_sharded_policy_is_refused(tmp_path: Path) -> None:
    args = config(tmp_path, fp16_full_eval=True)
    with pytest.raises(ValueError, match=r"fp16_full_eval=True was asked for, but the policy is sharded.*Leave it out"):
        full_eval.check_full_eval(args, tiny_model(), is_sharded=True)
