"""Every way to hold a reference, for every kind of policy, against a naive loop that keeps a second fp32 model.

The naive loop scores one unpadded row at a time with the oracle, forms the DPO loss by its equation and takes plain
gradient steps; a trainer run on the same batches must follow it to 1e-5. Cells without a meaning are refused, and the
refusal is the test.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import oracle
from families import tiny_model
from holdfast.reference.identity.digests import digest
from holdfast.reference.moving.model import MovingModel
from holdfast.reference.scorers.adapter import AdapterReference, adds_nothing
from holdfast.store.maintenance import stores
from holdfast.store.store import default_root
from naive import NUM_STEPS, Recording, logp, naive_run
from policies import POLICIES, config, logged, rows, sums_of_pairs, tiny_tokenizer, trainer

WAYS: dict[str, dict[str, Any]] = {
    "model": {"reference": "model"},
    "adapter": {"reference": "adapter"},
    "precomputed": {"reference": "precomputed"},
    "precompute_flag": {"precompute_ref_log_probs": True},
    "precomputed_model": {"reference": "model", "precompute_ref_log_probs": True},
    "snapshot": {"reference": "snapshot"},
    "snapshot_cpu": {"reference": "snapshot", "snapshot_device": "cpu"},
    "snapshot_disk": {"reference": "snapshot", "snapshot_device": "disk"},
    "auto": {},
}


def assert_same_run(kind: str, folder: Path, **options: Any) -> None:
    recording = Recording()
    ours = trainer(POLICIES[kind](), config(folder, **options), data_collator=recording)
    recording.batches.clear()  # those that were scored ahead
    ours.train()
    batches = recording.batches[-NUM_STEPS:]  # the audit's batch goes before
    theirs = POLICIES[kind]()
    losses, _ = naive_run(theirs, batches)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(ours) == pytest.approx(losses, abs=1e-5)
    assert max(losses) - min(losses) > 1e-3, "the run must move for the comparison to mean anything"
    for (name, found), expected in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_follows_the_naive_run(kind: str, way: str, tmp_path: Path) -> None:
    if way == "adapter" and kind in ("full", "partly_frozen"):
        with pytest.raises(ValueError, match=r"reference='adapter'.*without a PEFT adapter.*use reference='model'"):
            trainer(POLICIES[kind](), config(tmp_path, **WAYS[way]))
        return
    assert_same_run(kind, tmp_path, **WAYS[way])


def test_inert_adapters_are_told_from_the_others() -> None:
    """Only plain factors of which one is zero, with nothing else trainable, are the base with adapters off."""
    inert = {kind for kind, make in POLICIES.items() if isinstance(make(), PeftModel) and adds_nothing(make())}
    assert inert == {
        "lora_fresh", "lora_head", "lora_embeddings", "lora_fresh_over_sft", "lora_frozen_factor", "rslora"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "lora_fresh", "lora_sft", "pissa", "prompt_tuning"])
@pytest.mark.parametrize("way", ["model", "auto", "precomputed"])
def test_making_the_reference_changes_nothing_of_the_policy(kind: str, way: str, tmp_path: Path) -> None:
    """Same logits, same `requires_grad`, same names before and after."""
    policy, untouched = POLICIES[kind](), POLICIES[kind]()
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    ours = trainer(policy, config(tmp_path, **WAYS[way]))
    ours.model.eval()
    assert torch.equal(ours.model(**ids).logits, untouched.eval()(**ids).logits)
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == {
        n: p.requires_grad for n, p in untouched.named_parameters()
    }


def test_hand_frozen_factors_stay_frozen(tmp_path: Path) -> None:
    ours = trainer(POLICIES["lora_frozen_factor"](), config(tmp_path))
    ours.train()
    assert not any(p.requires_grad for name, p in ours.model.named_parameters() if "lora_A" in name)


@pytest.mark.parametrize("kind", ["full", "lora_sft"])
def test_a_fixed_reference_never_changes(kind: str, tmp_path: Path) -> None:
    """L2: the digest of all it holds, before and after; and it has no gradients and no dropout."""
    ours = trainer(POLICIES[kind](), config(tmp_path))
    before = digest(ours.reference.tensors())
    ours.train()
    assert digest(ours.reference.tensors()) == before
    assert all(not tensor.requires_grad and tensor.grad is None for _, tensor in ours.reference.tensors())


def test_the_reference_has_no_dropout_while_the_policy_keeps_its_own(tmp_path: Path) -> None:
    """Functional attention dropout as well: two evaluations of one batch are equal, whatever mode it was left in."""
    policy = tiny_model("llama", attention_dropout=0.5)
    ours = trainer(policy, config(tmp_path, disable_dropout=False, reference="model"))
    ours.ref_model.train()
    batch = ours._collated(rows().to_list()[:3])
    first, second = ours.reference.logps(batch), ours.reference.logps(batch)
    assert torch.equal(first.per_token, second.per_token)
    assert policy.model.layers[0].self_attn.attention_dropout == 0.5


def test_disable_dropout_reaches_functional_dropout(tmp_path: Path) -> None:
    policy = tiny_model("llama", attention_dropout=0.5)
    trainer(policy, config(tmp_path))
    assert policy.model.layers[0].self_attn.attention_dropout == 0.0


@pytest.mark.parametrize("kind", ["full", "partly_frozen"])
@pytest.mark.parametrize("way", ["model", "snapshot", "snapshot_cpu"])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_moving_reference_follows_the_naive_run(kind: str, way: str, alpha: float, tmp_path: Path) -> None:
    """TR-DPO: ref <- alpha * policy + (1 - alpha) * ref after every second step."""
    recording = Recording()
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": alpha, "ref_model_sync_steps": 2} | WAYS[way]
    ours = trainer(POLICIES[kind](), config(tmp_path, **options), data_collator=recording)
    ours.train()
    losses, reference = naive_run(POLICIES[kind](), recording.batches[-NUM_STEPS:], alpha=alpha, every=2)
    assert logged(ours) == pytest.approx(losses, abs=1e-5)
    assert ours.reference.version == 2
    for name, found in ours.reference.tensors():
        expected = reference.get_parameter(name)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["lora_fresh", "lora_sft", "dora", "pissa", "lora_modules_to_save"])
def test_a_moving_reference_of_an_adapter_moves_in_effective_weights(kind: str, tmp_path: Path) -> None:
    """W_ref <- alpha (W + scale B A) + (1 - alpha) W_ref, with the products formed apart from the trainer."""
    policy = POLICIES[kind]()
    options = {"reference": "model", "sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 4}
    ours = trainer(policy, config(tmp_path, **options))
    name = "model.layers.0.self_attn.q_proj.weight"

    def effective() -> Tensor:
        layer = policy.get_base_model().model.layers[0].self_attn.q_proj
        return layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()

    def with_magnitude(weight: Tensor) -> Tensor:
        layer = policy.get_base_model().model.layers[0].self_attn.q_proj
        magnitude = layer.lora_magnitude_vector["default"].weight.detach()
        return weight * (magnitude / weight.norm(dim=1))[:, None]

    whole = with_magnitude if kind == "dora" else (lambda weight: weight)
    before = whole(effective())
    torch.testing.assert_close(ours.ref_model.get_parameter(name), before, rtol=0, atol=1e-5)
    ours.train()
    expected = 0.3 * whole(effective()) + 0.7 * before
    torch.testing.assert_close(ours.ref_model.get_parameter(name), expected, rtol=0, atol=1e-5)
    assert logged(ours)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_bf16_references_accumulate_in_fp32() -> None:
    """L4: 500 syncs of alpha = 0.001 towards a policy one away: 1 - 0.999^500 = 0.3936 of the way, which bf16 alone
    never leaves for (0.001 is below half its spacing)."""
    policy = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(policy.weight, 2.0)
    module = copy.deepcopy(policy)
    nn.init.constant_(module.weight, 1.0)
    reference = MovingModel(module, torch.no_grad, origin="a test", policy=policy)
    for _ in range(500):
        reference.sync(0.001)
    state = dict(reference.tensors())["weight.fp32"]
    exact = 1 + (1 - 0.999**500)
    assert float((state - exact).abs().max()) <= 1e-3 * (exact - 1)
    torch.testing.assert_close(module.weight, torch.full_like(module.weight, exact))


def test_memory_held() -> None:
    """An inert adapter holds nothing; a trained one its own few tensors."""
    from holdfast.reference.base import num_bytes

    fresh = AdapterReference.capture(POLICIES["lora_fresh"](), torch.no_grad)
    assert num_bytes(fresh) == 0
    sft = POLICIES["lora_sft"]()
    expected = sum(4 * p.numel() for p in sft.parameters() if p.requires_grad)
    assert num_bytes(AdapterReference.capture(sft, torch.no_grad)) == expected > 0


def test_null_ref_context_is_the_policy_before_training(tmp_path: Path) -> None:
    for kind, way in (("lora_fresh", "auto"), ("lora_sft", "auto"), ("full", "snapshot"), ("full", "snapshot_disk")):
        ours = trainer(POLICIES[kind](), config(tmp_path, **WAYS[way]))
        ids = torch.tensor([[5, 6, 7, 8]])
        before = ours.model.eval()(ids).logits.detach()
        ours.train()
        ours.model.eval()
        after = ours.model(ids).logits
        with ours.null_ref_context():
            inside = ours.model(ids).logits
        assert torch.equal(inside, before)
        assert not torch.allclose(after, before, atol=1e-4)
        assert torch.equal(ours.model(ids).logits, after)


def test_null_ref_context_is_undone_by_an_exception(tmp_path: Path) -> None:
    ours = trainer(POLICIES["lora_sft"](), config(tmp_path))
    ours.train()
    values = digest(ours.model.named_parameters())

    def interrupted() -> None:
        with ours.null_ref_context():
            assert digest(ours.model.named_parameters()) != values
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert digest(ours.model.named_parameters()) == values


def test_explicit_references(tmp_path: Path) -> None:
    """Another module, a PeftModel and a path are scored as themselves."""
    other = tiny_model(seed=5)
    other.save_pretrained(tmp_path / "other")
    adapted = POLICIES["lora_sft"]()
    for ref_model, module in ((other, other), (str(tmp_path / "other"), other), (adapted, adapted)):
        ours = trainer(tiny_model(), config(tmp_path / "out"), ref_model=ref_model)
        batch = rows().to_list()[:3]
        found = sums_of_pairs(ours, batch)
        expected = torch.stack(
            [logp(module.eval(), row, side) for side in ("chosen_ids", "rejected_ids") for row in batch]
        )
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)
        assert ours.ref_model is not None
        assert not any(p.requires_grad for p in ours.ref_model.parameters())


def test_precomputing_lets_go_of_the_reference(tmp_path: Path) -> None:
    """Nothing refers to a given reference module any more, and a completion of two pairs was scored once."""
    import gc
    import weakref

    other = tiny_model(seed=5)
    seen = weakref.ref(other)
    ours = trainer(tiny_model(), config(tmp_path, precompute_ref_log_probs=True), ref_model=other)
    del other
    gc.collect()
    assert seen() is None
    assert ours.ref_model is None
    (facts,) = stores(default_root())
    assert facts.num_completions == 2 * len(rows()) - 1
    ours.train()


def test_evaluating_after_precomputing(tmp_path: Path) -> None:
    """What was handed over is known; another dataset is scored by the reference that waits on disk."""
    held_out = rows(5, seed=3)
    live = trainer(tiny_model(), config(tmp_path, reference="model"), eval_dataset=held_out)
    ahead = trainer(tiny_model(), config(tmp_path, precompute_ref_log_probs=True), eval_dataset=held_out)
    other = rows(4, seed=4)
    assert ahead.evaluate(other)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    live.train()
    ahead.train()
    assert ahead.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], abs=1e-5)
    assert ahead.evaluate(other)["eval_loss"] == pytest.approx(live.evaluate(other)["eval_loss"], abs=1e-5)
    new = live.evaluate(rows(4, seed=9))["eval_loss"]
    assert abs(new - math.log(2)) > 1e-3
    assert ahead.evaluate(rows(4, seed=9))["eval_loss"] == pytest.approx(new, abs=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora_sft"])
def test_evaluating_new_data_against_a_given_model_after_precomputing(kind: str, tmp_path: Path) -> None:
    """Its weights wait on disk, and nothing of it in memory; the module that was handed in stays as it is."""
    live = trainer(tiny_model(), config(tmp_path, reference="model"), ref_model=_other(kind))
    other = _other(kind)
    ahead = trainer(tiny_model(), config(tmp_path, precompute_ref_log_probs=True), ref_model=other)
    live.train()
    ahead.train()
    expected = live.evaluate(rows(4, seed=9))["eval_loss"]
    assert ahead.evaluate(rows(4, seed=9))["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert digest(other.named_parameters()) == digest(_other(kind).named_parameters())


def _other(kind: str) -> nn.Module:
    return tiny_model(seed=5) if kind == "full" else POLICIES[kind]()


def test_lora_evaluates_new_data_at_any_time_after_precomputing(tmp_path: Path) -> None:
    live = trainer(POLICIES["lora_sft"](), config(tmp_path, reference="model"))
    ahead = trainer(POLICIES["lora_sft"](), config(tmp_path, reference="precomputed"))
    live.train()
    ahead.train()
    found, expected = ahead.evaluate(rows(4, seed=9)), live.evaluate(rows(4, seed=9))
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert abs(expected["eval_loss"] - math.log(2)) > 1e-3


def test_a_snapshot_is_of_the_policy_when_training_begins(tmp_path: Path) -> None:
    """A change after the trainer was made and before it trains is part of the reference: it starts at ln 2 all the
    same. What is held is the trained part only, and nothing of it in memory when it is on disk."""
    from holdfast.reference.base import num_bytes

    for way, kind in (("snapshot", "partly_frozen"), ("snapshot_cpu", "full"), ("snapshot_disk", "full")):
        policy = POLICIES[kind]()
        ours = trainer(policy, config(tmp_path, **WAYS[way]))
        with torch.no_grad():
            policy.lm_head.weight.mul_(1.5)
        ours.train()
        assert logged(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
        trained = sum(4 * p.numel() for p in policy.parameters() if p.requires_grad)
        assert num_bytes(ours.reference) == (0 if way == "snapshot_disk" else trained)
    (file,) = (tmp_path / "_reference").glob("*/*")
    assert trained <= file.stat().st_size < trained + 10_000


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_the_policy_itself_is_no_ref_model(tmp_path: Path) -> None:
    policy = tiny_model()
    with pytest.raises(ValueError, match=r"`ref_model` is the same object as `model`.*Leave"):
        trainer(policy, config(tmp_path), ref_model=policy)


def test_a_ref_model_that_shares_trainable_weights_is_refused(tmp_path: Path) -> None:
    policy = POLICIES["lora_fresh"]()
    with pytest.raises(ValueError, match=r"shares \d+ trainable tensors with `model`, '.*lora_A"):
        trainer(policy, config(tmp_path), ref_model=policy.get_base_model())


def test_a_ref_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 101 tokens and `model` one of 97"):
        trainer(tiny_model(), config(tmp_path), ref_model=tiny_model(vocab_size=101))


def test_an_adapter_reference_beside_a_ref_model_is_refused(tmp_path: Path) -> None:
    for way in ("adapter", "snapshot"):
        with pytest.raises(ValueError, match=rf"reference='{way}' was asked for together with a `ref_model`"):
            trainer(POLICIES["lora_fresh"](), config(tmp_path, reference=way), ref_model=tiny_model())


def test_adapters_that_cannot_be_mixed_inside_the_policy(tmp_path: Path) -> None:
    """LoHa: refused where the reference is inside the policy, else held merged; a hard sync copies."""
    soft = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}
    for way in ("adapter", "snapshot", "precomputed"):
        with pytest.raises(ValueError, match=rf"reference='{way}'.*no exact mix.*loha.*reference='model'.*alpha=1"):
            trainer(_loha(), config(tmp_path, **soft, reference=way))
    runs = {}
    for way in ("auto", "model"):
        ours = trainer(_loha(), config(tmp_path, **soft, reference=way))
        ours.train()
        runs[way] = logged(ours)
        assert ours.ref_model is not None
    assert runs["auto"] == runs["model"]
    for way in ("snapshot", "model"):
        ours = trainer(_loha(), config(tmp_path, **soft | {"ref_model_mixup_alpha": 1.0}, reference=way))
        ours.train()
        runs[f"hard {way}"] = logged(ours)
    assert runs["hard snapshot"] == pytest.approx(runs["hard model"], abs=1e-5)
    assert runs["hard model"] != pytest.approx(runs["model"], abs=1e-3)


def _loha() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(tiny_model(), LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]))


def test_a_snapshot_file_that_cannot_be_written(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path, **WAYS["snapshot_disk"]))
    (tmp_path / "_reference").write_text("in the way")
    with pytest.raises(ValueError, match=r"to be kept in .*_reference.*which cannot be written.*snapshot_device='cpu'"):
        ours.train()


def test_a_ref_model_for_losses_without_a_reference_is_measured(tmp_path: Path) -> None:
    """It trains nothing: losses and weights are those without it. `reference/kl_*` of the first batch, which has all
    rows, are the policy's log-probs less the reference's. It is refused beside reference='none'."""
    runs = []
    for ref_model in (None, tiny_model(seed=1)):
        args = config(tmp_path, loss_type="simpo", per_device_train_batch_size=len(rows()), max_steps=2)
        runs.append(trainer(tiny_model(), args, ref_model=ref_model))
        runs[-1].train()
    plain, ours = runs
    assert logged(ours) == logged(plain)
    assert digest(ours.model.named_parameters()) == digest(plain.model.named_parameters())
    assert plain.reference is None
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            gaps = [
                float(logp(tiny_model(), row, f"{side}_ids") - logp(tiny_model(seed=1), row, f"{side}_ids"))
                for row in rows()
            ]
        assert logged(ours, f"reference/kl_{side}")[0] == pytest.approx(sum(gaps) / len(gaps), abs=2e-5)
        assert max(map(abs, gaps)) > 0.1
    with pytest.raises(ValueError, match=r"`ref_model` was given together with reference='none'.*would be ignored"):
        trainer(tiny_model(), config(tmp_path, loss_type="simpo", reference="none"), ref_model=tiny_model(seed=1))


def test_syncing_towards_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"different models: `.*bias` is in one only"):
        trainer(tiny_model(), config(tmp_path, sync_ref_model=True), ref_model=tiny_model("qwen2"))


def test_syncs_are_logged(tmp_path: Path) -> None:
    """Every second of 4 steps: the version counts them, the age is the steps since, and the drift is the L2 norm of the
    move as it was, from the reference's weights before and after."""
    moves: list[float] = []
    ours = trainer(
        tiny_model(), config(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3)
    )
    plain = ours.reference.sync

    def sync(alpha: float) -> None:
        before = [p.detach().clone().double() for p in ours.ref_model.parameters()]
        plain(alpha)
        after = [p.detach().double() for p in ours.ref_model.parameters()]
        moves.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))))

    ours.reference.sync = sync
    ours.train()
    assert logged(ours, "reference/version") == [0, 1, 1, 2]
    assert logged(ours, "reference/age") == [1, 0, 1, 0]
    assert logged(ours, "reference/drift") == pytest.approx([0, moves[0], moves[0], moves[1]], rel=1e-4)
    assert min(moves) > 0


def test_a_patched_forward_that_a_copy_would_share_is_refused(tmp_path: Path) -> None:
    policy = tiny_model()
    original = policy.lm_head.forward
    policy.lm_head.forward = lambda hidden: original(hidden)
    with pytest.raises(ValueError, match=r"`lm_head.forward` was replaced by a function.*original's weights"):
        trainer(policy, config(tmp_path, reference="model"))


@pytest.mark.parametrize("way", ["model", "precomputed"])
def test_the_audit_names_the_tensor_that_changed(way: str, tmp_path: Path) -> None:
    policy = tiny_model()
    ours = trainer(policy, config(tmp_path, reference=way))
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(
        ValueError, match=r"found a gap of .* nats.*`model.layers.1.mlp.up_proj.weight` is not what it was"
    ):
        ours.train()


def test_the_audit_names_a_changed_reference(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path, reference="model"))
    with torch.no_grad():
        ours.ref_model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"The reference's `lm_head.weight` differs from the policy's by up to"):
        ours.train()


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        (lambda m: m.model.rotary_emb.inv_freq.mul_(1.5), r"model.rotary_emb"),
        (lambda m: setattr(m.model.layers[1].self_attn, "scaling", 2.0), r"model.layers.1.self_attn.scaling"),
        (lambda m: setattr(m.model.norm, "variance_epsilon", 0.5), r"model.norm.variance_epsilon"),
        (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()), r"model.layers.0.mlp.act_fn"),
    ],
)
def test_the_audit_names_a_changed_setting(change: Any, setting: str, tmp_path: Path) -> None:
    """Of the reference, whose weights all agree with the policy's."""
    ours = trainer(tiny_model(), config(tmp_path, reference="model"))
    with torch.no_grad():
        change(ours.ref_model)
    with pytest.raises(ValueError, match=rf"(They differ in|The reference's) `{setting}[^`]*`"):
        ours.train()


@pytest.mark.parametrize("way", ["model", "precomputed"])
def test_the_audit_names_a_changed_buffer_of_the_policy(way: str, tmp_path: Path) -> None:
    policy = tiny_model()
    ours = trainer(policy, config(tmp_path, reference=way))
    with torch.no_grad():
        policy.model.rotary_emb.inv_freq.mul_(1.5)
    with pytest.raises(ValueError, match=r"found a gap of .* nats.*`model.rotary_emb.inv_freq` is not what it was"):
        ours.train()


@pytest.mark.parametrize("change", ["scaling", "off", "other"])
def test_the_audit_names_a_changed_adapter(change: str, tmp_path: Path) -> None:
    policy = POLICIES["lora_sft"]()
    ours = trainer(policy, config(tmp_path, reference="precomputed"))
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    match change:
        case "scaling":
            layer.scaling["default"] *= 2
        case "off":
            layer._disable_adapters = True
        case "other":
            layer._active_adapter = []
    with pytest.raises(ValueError, match=r"They differ in `model.layers.0.self_attn.q_proj[^`]*`"):
        ours.train()


def test_the_audit_can_be_switched_off(tmp_path: Path) -> None:
    policy = tiny_model()
    ours = trainer(policy, config(tmp_path, reference="model", reference_audit=False))
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    ours.train()
    assert abs(logged(ours)[0] - math.log(2)) > 1e-2


def test_a_chosen_reference_is_measured_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tiny_model(), config(tmp_path), ref_model=tiny_model(seed=3)).train()
    (line,) = [r.getMessage() for r in caplog.records if "differs from the policy by" in r.getMessage()]
    assert "the given ref_model" in line
    assert "it is the policy as it starts to train" not in line


def test_a_chosen_reference_that_is_the_policy_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tiny_model(), config(tmp_path), ref_model=tiny_model()).train()
    (line,) = [r.getMessage() for r in caplog.records if "differs from the policy by" in r.getMessage()]
    assert "it is the policy as it starts to train" in line


def test_a_sync_that_never_comes_is_refused(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path, sync_ref_model=True, ref_model_sync_steps=5))
    with pytest.raises(ValueError, match=r"every 5 steps, but the run has 4: the reference would never move"):
        ours.train()


def test_one_line_says_which_reference_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = trainer(tiny_model(), config(tmp_path, reference="model", save_strategy="steps", save_steps=4))
    digest_ = ours.reference.fingerprint()
    num_bytes = sum(4 * p.numel() for p in ours.ref_model.parameters())
    ours.train()
    (said,) = [r.getMessage() for r in caplog.records if r.name == "holdfast.training.run_watch"]
    assert said.splitlines()[2] == (
        "reference  a copy of the policy, a module of its own, asked per batch, fixed, "
        f"weights {digest_[:12]}, {num_bytes} bytes held; it gives the policy's log-probs on the first batch (largest "
        "gap 0 nats in one token)."
    )


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_a_snapshot_is_audited_as_it_is_held(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The line counts its bytes, and a snapshot that was damaged on its way is found."""
    options = {"reference": "snapshot", "snapshot_device": place}
    ours = trainer(tiny_model(), config(tmp_path, **options))
    ours.train()
    num_bytes = sum(4 * p.numel() for p in ours.model.parameters())
    assert f", {num_bytes} bytes held; it gives the policy's log-probs" in caplog.text
    ours = trainer(tiny_model(), config(tmp_path, **options))
    plain = ours.reference.before_policy_changes

    def release() -> None:
        plain()
        dict(ours.reference.tensors())["lm_head.weight"].mul_(1.5)

    ours.reference.before_policy_changes = release
    with pytest.raises(ValueError, match=r"The reference's `lm_head.weight` differs from the policy's by up to"):
        ours.train()


@pytest.mark.parametrize("start", ["tuned", "merged", "from_config", "resized", "revision"])
def test_the_reference_is_captured_not_reloaded(start: str, tmp_path: Path) -> None:
    """Each starts at exactly ln 2, though the path in its config holds other weights or nothing at all."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model: Any = type(base).from_pretrained(tmp_path / "base")
    if start == "tuned":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    elif start == "merged":
        config_ = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model, config_).merge_and_unload()
    elif start == "from_config":
        model = tiny_model(seed=4)
    elif start == "resized":
        model.resize_token_embeddings(103, mean_resizing=False)
    else:
        tiny_model(seed=6).save_pretrained(tmp_path / "repo" / "branch")
        model = type(base).from_pretrained(tmp_path / "repo", subfolder="branch")
    for way in ("auto", "precomputed"):
        ours = trainer(model, config(tmp_path / "out", reference=way, max_steps=1))
        ours.train()
        assert logged(ours)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_tokenizer_is_needed_for_a_model_without_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No `processing_class` was given, and the model was not loaded from a path"):
        trainer(tiny_model(), config(tmp_path), processing_class=None)


def test_oracle_and_naive_run_agree() -> None:
    """The two ways in which tests score a completion are one."""
    model, row = tiny_model(), rows().to_list()[0]
    expected = oracle.sequence_logps(model, row["prompt_ids"], row["chosen_ids"]).sum()
    torch.testing.assert_close(logp(model, row, "chosen_ids"), expected)
    assert tiny_tokenizer().pad_token_id == 0
