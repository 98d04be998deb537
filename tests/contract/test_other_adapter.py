"""References that are named among the policy's adapters, against the naive run with that model as its second one."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from families import tiny_model
from holdfast.reference.identity.digests import digest
from naive import NUM_STEPS, Recording, logp, naive_run
from policies import POLICIES, config, logged, rows, trainer


def two_adapters(tuned: str = "tuned", other: str = "sft") -> PeftModel:
    """An SFT adapter under two names: one goes on training, the other stays."""
    model = POLICIES["lora_sft"]()
    config_ = model.peft_config["default"]
    for name in (tuned, other):
        model.add_adapter(name, config_)
        for key, parameter in list(model.named_parameters()):
            if ".default." in key:
                model.get_parameter(key.replace(".default.", f".{name}.")).data.copy_(parameter.data)
    model.set_adapter(tuned)
    model.delete_adapter("default")
    return model


def with_other_reference(scale: float = 1.5) -> PeftModel:
    """The same, but the reference's adapter is another one."""
    model = two_adapters()
    for key, parameter in model.named_parameters():
        if ".sft." in key:
            parameter.data.mul_(scale)
    return model


def naive(policy: nn.Module, reference: nn.Module, batches: list[Any]) -> list[float]:
    """`naive_run` whose second model is `reference`."""

    class Copied(type(policy)):  # type: ignore[misc]
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            return reference.eval()

    policy.__class__ = Copied
    return naive_run(policy, batches)[0]


def adapter_alone(model: PeftModel, name: str) -> nn.Module:
    """A copy of the model that computes as its adapter `name` on the base, by peft's own means."""
    duplicate = copy.deepcopy(model)
    duplicate.set_adapter(name)
    return duplicate.merge_and_unload()


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "same_adapter_twice": (two_adapters, {"ref_adapter_name": "sft"}, lambda m: adapter_alone(m, "sft")),
    "another_adapter": (with_other_reference, {"ref_adapter_name": "sft"}, lambda m: adapter_alone(m, "sft")),
    "base": (two_adapters, {"ref_adapter_name": "__base__"}, lambda m: tiny_model()),
    "base_under_sft": (POLICIES["lora_sft"], {"ref_adapter_name": "__base__"}, lambda m: tiny_model()),
    "base_under_dora": (POLICIES["dora"], {"ref_adapter_name": "__base__"}, lambda m: tiny_model()),
    "base_under_saved_module": (
        POLICIES["lora_modules_to_save"], {"ref_adapter_name": "__base__"}, lambda m: tiny_model()
    ),
    "sft_under_fresh": (
        POLICIES["lora_fresh_over_sft"],
        {"ref_adapter_name": "default", "model_adapter_name": "dpo"},
        lambda m: adapter_alone(m, "default"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ahead", [False, True])
def test_the_named_reference_is_that_model(case: str, ahead: bool, tmp_path: Path) -> None:
    make, options, second = CASES[case]
    recording = Recording()
    args = config(tmp_path, precompute_ref_log_probs=ahead, **options)
    ours = trainer(make(), args, data_collator=recording)
    recording.batches.clear()
    ours.train()
    losses = naive(make(), second(make()), recording.batches[-NUM_STEPS:])
    assert logged(ours) == pytest.approx(losses, abs=2e-5)
    is_the_policy = case in ("same_adapter_twice", "base_under_dora", "base_under_saved_module")
    assert (losses[0] == pytest.approx(math.log(2), abs=1e-6)) == is_the_policy


def test_flags_and_gradients_stay_as_they_were(tmp_path: Path) -> None:
    policy = with_other_reference()
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    values = digest((name, p) for name, p in policy.named_parameters() if ".sft." in name)
    ours = trainer(policy, config(tmp_path, ref_adapter_name="sft"))
    ours.train()
    assert policy.active_adapters == ["tuned"]
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
    assert digest((name, p) for name, p in policy.named_parameters() if ".sft." in name) == values
    ids = torch.tensor([[5, 6, 7]])
    with ours.null_ref_context():
        inside = ours.model.eval()(ids).logits
    torch.testing.assert_close(
        inside, adapter_alone(with_other_reference(), "sft").eval()(ids).logits, rtol=0, atol=1e-5
    )


def test_a_fresh_adapter_takes_the_name(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    ours = trainer(tiny_model(), config(tmp_path, model_adapter_name="kelp"), peft_config=lora)
    ours.train()
    assert list(ours.model.peft_config) == ["kelp"]
    assert logged(ours)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_the_manifest_names_the_adapter(tmp_path: Path) -> None:
    args = config(tmp_path, ref_adapter_name="sft", save_strategy="steps", save_steps=4)
    trainer(two_adapters(), args).train()
    manifest = json.loads((tmp_path / "checkpoint-4" / "reference" / "manifest.json").read_text())
    assert manifest["adapters"] == ["sft", "tuned", "sft"]
    assert "the adapter 'sft' on the base" in manifest["description"]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (two_adapters, {"ref_adapter_name": "sfd"}, r"adapters are \['sft', 'tuned'\]. Did you mean 'sft'\?"),
        (two_adapters, {"model_adapter_name": "tund"}, r"adapters are \['sft', 'tuned'\]. Did you mean 'tuned'\?"),
        (two_adapters, {"ref_adapter_name": "tuned"}, "is the adapter that trains, so the reference would train along"),
        (tiny_model, {"ref_adapter_name": "sft"}, "the policy is a LlamaForCausalLM without adapters"),
        (tiny_model, {"model_adapter_name": "sft"}, "the policy is a LlamaForCausalLM without adapters"),
        (POLICIES["prompt_tuning"], {"ref_adapter_name": "__base__"}, "learns a prompt, which is no layer"),
        (POLICIES["lora_unfrozen_norm"], {"ref_adapter_name": "__base__"}, r"weights under the adapters.*norm.*Freeze"),
        (POLICIES["lora_bias_all"], {"ref_adapter_name": "__base__"}, r"weights under the adapters.*bias.*Freeze"),
    ],
)
def test_names_that_cannot_be_right(make: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(make(), config(tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ref_model": True}, "together with sync_ref_model=True"),
        ({"reference": "model"}, "together with reference='model'"),
        ({"reference": "snapshot"}, "together with reference='snapshot'"),
    ],
)
def test_options_that_contradict_a_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, ref_adapter_name="sft", **options)


def test_a_name_beside_a_loss_without_a_reference_is_measured(tmp_path: Path) -> None:
    """`reference/kl_*` of the first batch, which has all rows, are the log-probs of the adapter that trains less those
    of the named one, and the losses are those without a name."""
    options: dict[str, Any] = {"loss_type": "simpo", "per_device_train_batch_size": len(rows()), "max_steps": 2}
    ours = trainer(with_other_reference(), config(tmp_path / "kept", ref_adapter_name="sft", **options))
    ours.train()
    plain = trainer(with_other_reference(), config(tmp_path / "plain", **options))
    plain.train()
    assert logged(ours) == logged(plain)
    policy, reference = (adapter_alone(with_other_reference(), name).eval() for name in ("tuned", "sft"))
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            gaps = [float(logp(policy, row, f"{side}_ids") - logp(reference, row, f"{side}_ids")) for row in rows()]
        assert logged(ours, f"reference/kl_{side}")[0] == pytest.approx(sum(gaps) / len(gaps), abs=2e-5)
        assert max(map(abs, gaps)) > 0.01


def test_a_name_beside_a_ref_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ref_adapter_name='sft' was asked for together with a `ref_model`"):
        trainer(two_adapters(), config(tmp_path, ref_adapter_name="sft"), ref_model=tiny_model())


def test_precomputed_snapshots_know_every_dataset(tmp_path: Path) -> None:
    """Log-probs ahead, with the captured reference on disk: another dataset can be evaluated after training."""
    live = trainer(tiny_model(), config(tmp_path, reference="model"))
    ahead = trainer(
        tiny_model(),
        config(tmp_path, reference="snapshot", snapshot_device="disk", precompute_ref_log_probs=True),
    )
    live.train()
    ahead.train()
    assert logged(ahead) == pytest.approx(logged(live), abs=1e-6)
    other = rows(4, seed=9)
    assert ahead.evaluate(other)["eval_loss"] == pytest.approx(live.evaluate(other)["eval_loss"], abs=1e-5)
