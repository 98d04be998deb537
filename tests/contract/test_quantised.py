"""Quantised weights, as reference and under a LoRA that trains (QLoRA), in 4 and 8 bit.

The oracle knows nothing of quantisation kernels: it is the same model in plain fp32 layers whose weights were
dequantised, run by the naive loop. Left out where bitsandbytes, an optional extra, is missing.
"""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from families import tiny_model
from holdfast.policy import load as models
from holdfast.policy.broadcast import broadcast_unlike_tensors
from holdfast.policy.prepare import make_policy
from holdfast.reference.audit import checksums
from holdfast.reference.identity.digests import digest
from holdfast.reference.scorers.adapter import AdapterReference
from holdfast.reference.scorers.model import ModelReference, weight_tensors
from naive import NUM_STEPS, Recording, logp, naive_run
from policies import config, logged, rows, trainer

bnb = pytest.importorskip("bitsandbytes")


BITS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4bit_double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_use_double_quant": True,
    },
    "8bit": {"load_in_8bit": True},
}
every_size = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line per layer and call, in 8 bit


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved fp32 model with layers that are wide enough for blocks of 64."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return str(folder)


def quantised(base: str, bits: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**BITS[bits]), dtype=dtype)


def dequantised(model: nn.Module) -> nn.Module:
    """A copy of `model` in plain fp32 layers, whose weights are what the codes stand for."""
    model = copy.deepcopy(model)
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
            elif isinstance(child, bnb.nn.Linear8bitLt):
                scale = child.weight.SCB if child.state.SCB is None else child.state.SCB
                weight = child.weight.data.float() * scale[:, None] / 127
            else:
                continue
            plain = nn.Linear(child.in_features, child.out_features, bias=False)
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            setattr(part, name, plain)
    return model


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0} | options)


def adapted(model: Any, *, is_trained: bool) -> PeftModel:
    """A LoRA over `model`, with the same factors whatever the model is kept in."""
    policy = get_peft_model(model, lora())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(8)
        for name, parameter in policy.named_parameters():
            if "lora_A" in name or (is_trained and "lora_B" in name):
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return policy


def assert_follows(ours: Any, theirs: nn.Module, recording: Recording, **motion: Any) -> list[float]:
    """`ours` trains like the naive run of `theirs` on the same batches; returns its losses."""
    recording.batches.clear()
    ours.train()
    losses, _ = naive_run(theirs, recording.batches[-NUM_STEPS:], **motion)
    assert logged(ours) == pytest.approx(losses, abs=2e-5)
    assert max(losses) - min(losses) > 1e-3
    found = {name: p for name, p in ours.model.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(
            parameter, expected[name], rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    return losses


# --- as the reference -------------------------------------------------------------------------------------------------


@every_size
def test_a_quantised_reference(bits: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By path: its log-probs are those of its own forward pass, row by row; the logged gap is theirs to the policy's;
    training leaves it as it is."""
    args = config(tmp_path, ref_model_init_kwargs={"quantization_config": BitsAndBytesConfig(**BITS[bits])})
    policy = tiny_model(hidden_size=64, intermediate_size=128)
    ours = trainer(policy, args, ref_model=base)
    assert type(ours.ref_model.model.layers[0].mlp.up_proj).__name__ == (
        "Linear8bitLt" if "8" in bits else "Linear4bit"
    )
    table = rows().to_list()[:3]
    batch = ours._collated(table)
    found, which = ours.reference.logps(batch), torch.cat([batch.chosen, batch.rejected])
    expected = torch.stack([
        logp(ours.ref_model, row, side) for side in ("chosen_ids", "rejected_ids") for row in table
    ]).detach()  # fmt: skip
    torch.testing.assert_close(found.sums()[which], expected, rtol=0, atol=1e-3)
    plain = torch.stack([logp(policy, row, side) for side in ("chosen_ids", "rejected_ids") for row in table]).detach()
    assert float((plain - expected).abs().max()) > 0.05, "quantisation must show"
    before = ours.reference.fingerprint()
    ours.train()
    assert ours.reference.fingerprint() == before
    (line,) = [r.getMessage() for r in caplog.records if "differs from the policy by" in r.getMessage()]
    mean = float(line.split("differs from the policy by ")[1].split()[0])
    lower = float((plain - expected).abs().sum() / found.lengths()[which].sum())
    assert 0 < lower <= mean * 1.01
    assert mean < 1


@every_size
def test_the_scales_are_part_of_the_fingerprint(bits: str, base: str, tmp_path: Path) -> None:
    """W and 2 W are the same codes. A digest of the codes alone would take one model for the other."""
    doubled = tiny_model(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for name, parameter in doubled.named_parameters():
            if "proj" in name:
                parameter.mul_(2)
    doubled.save_pretrained(tmp_path)
    first, again, other = quantised(base, bits), quantised(base, bits), quantised(str(tmp_path), bits)
    assert digest(first.named_parameters()) == digest(other.named_parameters())
    prints = [
        ModelReference(m, torch.no_grad, origin="a test").identity().weights_digest for m in (first, again, other)
    ]
    assert prints[0] == prints[1] != prints[2]
    plain = tiny_model()
    assert dict(weight_tensors(plain)).keys() == dict(plain.named_parameters()).keys()
    for is_trained in (False, True):
        policies = [adapted(quantised(folder, bits), is_trained=is_trained) for folder in (base, str(tmp_path))]
        digests = [AdapterReference.capture(policy, torch.no_grad).identity().weights_digest for policy in policies]
        assert digests[0] != digests[1]
    assert checksums(again).keys() == {n for n, p in again.named_parameters() if p.is_floating_point()}


@every_size
def test_syncing_onto_a_quantised_reference_is_refused(bits: str, base: str, tmp_path: Path) -> None:
    options = {"ref_model_init_kwargs": {"quantization_config": BitsAndBytesConfig(**BITS[bits])}}
    message = r"quantised weights have no exact mix.*Use an unquantised" if "8" in bits else r"has another shape"
    policy = tiny_model(hidden_size=64, intermediate_size=128)
    with pytest.raises(ValueError, match=message):
        trainer(policy, config(tmp_path, sync_ref_model=True, **options), ref_model=base)


# --- under a LoRA that trains -----------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "model": {"reference": "model"},
    "snapshot": {"reference": "snapshot"},
    "disk": {"reference": "snapshot", "snapshot_device": "disk"},
    "precomputed": {"reference": "precomputed"},
    "recomputed_activations": {"activation_checkpointing": True},
}


@every_size
@pytest.mark.parametrize("is_trained", [False, True], ids=["fresh", "sft"])
@pytest.mark.parametrize("way", WAYS)
def test_qlora_follows_the_naive_run(bits: str, is_trained: bool, way: str, base: str, tmp_path: Path) -> None:
    """Over a fresh adapter (the base with adapters off) and a trained one (its frozen values put in place): ln 2 at
    first, then the dequantised model's own trajectory."""
    recording = Recording()
    ours = trainer(
        adapted(quantised(base, bits), is_trained=is_trained),
        config(tmp_path, **WAYS[way]),
        data_collator=recording,
    )
    theirs = adapted(dequantised(quantised(base, bits)), is_trained=is_trained)
    if way == "auto":
        assert isinstance(ours.reference.scorer, AdapterReference)
        assert (len(dict(ours.reference.tensors())) > 0) == is_trained
    losses = assert_follows(ours, theirs, recording)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(ours)[0] == pytest.approx(math.log(2), abs=1e-7)


@every_size
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("is_trained", [False, True], ids=["fresh", "sft"])
def test_a_moving_reference_under_qlora(bits: str, alpha: float, is_trained: bool, base: str, tmp_path: Path) -> None:
    """Moved inside the policy, where only the products of the factors move: no quantised weight is mixed. The naive
    run merges the adapters into the dequantised weights."""
    recording = Recording()
    motion = {"sync_ref_model": True, "ref_model_mixup_alpha": alpha, "ref_model_sync_steps": 2}
    policy = adapted(quantised(base, bits), is_trained=is_trained)
    ours = trainer(policy, config(tmp_path, **motion), data_collator=recording)
    theirs = adapted(dequantised(quantised(base, bits)), is_trained=is_trained)
    assert_follows(ours, theirs, recording, alpha=alpha, every=2)
    assert ours.reference.version == 2
    assert ours.reference.drift > 0


@every_size
@pytest.mark.parametrize("start", ["path", "module"])
def test_a_fresh_adapter_over_a_quantised_base(bits: str, start: str, base: str, tmp_path: Path) -> None:
    """From a path with `quantization_config`, or loaded already: with `peft_config`, the same run as with an adapter
    that was made outside and given the same factors."""
    recording = Recording()
    model, options = base, {"quantization_config": BitsAndBytesConfig(**BITS[bits])}
    if start == "module":
        model, options = quantised(base, bits), {}
    args = config(tmp_path)
    ours = trainer(model, args, peft_config=lora(), data_collator=recording, **options)
    theirs = get_peft_model(dequantised(quantised(base, bits)), lora())
    theirs.load_state_dict({n: p for n, p in ours.model.state_dict().items() if "lora_" in n}, strict=False)
    losses = assert_follows(ours, theirs, recording)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)


@every_size
def test_what_of_a_quantised_policy_is_in_16_bits_becomes_fp32(bits: str, base: str, tmp_path: Path) -> None:
    """Norms, embeddings and head, with the values they had; adapters train in fp32; the codes stay, and only the
    adapters train. With recomputed activations the inputs carry gradients."""
    before = quantised(base, bits, dtype=torch.bfloat16)
    values = {name: parameter.detach().clone() for name, parameter in before.named_parameters()}
    assert values["model.norm.weight"].dtype == values["lm_head.weight"].dtype == torch.bfloat16
    policy = make_policy(before, config(tmp_path, activation_checkpointing=True), None, lora())
    for name, parameter in policy.named_parameters():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if own not in values:
            assert parameter.requires_grad == ("lora_" in name)
            assert parameter.dtype == torch.float32
        elif values[own].is_floating_point():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, values[own].float())
        else:
            assert torch.equal(parameter, values[own])
    embedded = policy.get_input_embeddings()(torch.tensor([[5]]))
    assert embedded.requires_grad


@every_size
def test_an_evaluation_does_not_end_the_training(bits: str, base: str, tmp_path: Path) -> None:
    """In eval mode bitsandbytes may choose kernels without gradients, for good: here it never does, and a run that
    evaluates between its steps is the run that does not, bit for bit."""
    runs = []
    for folder, options in (("quiet", {}), ("evaluating", {"eval_strategy": "steps", "eval_steps": 1})):
        ours = trainer(
            adapted(quantised(base, bits), is_trained=False),
            config(tmp_path / folder, **options),
            eval_dataset=rows(4, seed=3),
        )
        ours.train()
        runs.append((logged(ours), digest(ours.model.named_parameters())))
    assert runs[0] == runs[1]
    assert runs[0][0][0] != runs[0][0][-1]


@every_size
def test_a_resumed_qlora_run(bits: str, base: str, tmp_path: Path) -> None:
    """Bit for bit; and with another base under the adapter it is refused, though the codes are the same."""
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}

    def run(folder: str) -> Any:
        return trainer(adapted(quantised(folder, bits), is_trained=True), config(tmp_path / "run", **saving))

    whole = run(base)
    whole.train()
    resumed = run(base)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed)[2:] == logged(whole)[2:]
    assert digest(weight_tensors(resumed.model)) == digest(weight_tensors(whole.model))
    assert digest(resumed.reference.tensors()) == digest(whole.reference.tensors())
    doubled = tiny_model(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for layer in doubled.model.layers:
            layer.mlp.up_proj.weight.mul_(2)
    doubled.save_pretrained(tmp_path / "doubled")
    with pytest.raises(ValueError, match=r"differs in the weights of the reference"):
        run(str(tmp_path / "doubled")).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


# --- refusals ---------------------------------------------------------------------------------------------------------


@every_size
def test_what_has_no_meaning_with_quantised_weights_is_refused(bits: str, base: str, tmp_path: Path) -> None:
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "reference": "model"}
    with pytest.raises(ValueError, match=r"the policy is quantised: adapters cannot be merged.*Leave `reference`"):
        trainer(adapted(quantised(base, bits), is_trained=True), config(tmp_path, **moving))
    with pytest.raises(ValueError, match=r"quantised LlamaForCausalLM without adapters.*Pass a `peft_config`"):
        trainer(quantised(base, bits), config(tmp_path))


def test_weights_that_were_repacked_for_inference_are_refused(base: str, tmp_path: Path) -> None:
    """As bitsandbytes does on some CPUs at the first forward pass in eval mode; here the mark is set by hand."""
    model = quantised(base, "4bit")
    model.model.layers[0].self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError, match=r"`model.layers.0.self_attn.q_proj.weight` was repacked for inference.*Load the model again"
    ):
        trainer(model, config(tmp_path), peft_config=lora())


@every_size
def test_processes_that_loaded_other_codes_are_refused(bits: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, as seen from the main one: alike they pass; other codes cannot be broadcast without scales."""

    class TwoProcesses:
        num_processes = 2

    def with_second(name: str | None) -> Any:
        def gather(own: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [own[0], own[0] | ({name: (0.0, 0.0)} if name else {})]

        return gather

    model = quantised(base, bits)
    monkeypatch.setattr(models, "PartialState", TwoProcesses)
    monkeypatch.setattr(models, "gather_object", with_second(None))
    assert broadcast_unlike_tensors(model) == []
    monkeypatch.setattr(models, "gather_object", with_second("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(ValueError, match=r"is quantised, and its processes loaded different weights: `model.layers.0"):
        broadcast_unlike_tensors(model)


def assert_close_logps(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@every_size
def test_the_oracle_is_the_quantised_model(bits: str, base: str, tmp_path: Path) -> None:
    """What the runs above are compared with gives the log-probs of the quantised policy as it trains."""
    policy = make_policy(quantised(base, bits), config(tmp_path), None, lora())
    plain = dequantised(quantised(base, bits))
    for row in rows().to_list()[:3]:
        assert_close_logps(logp(policy.eval(), row, "chosen_ids"), logp(plain, row, "chosen_ids"))


@every_size
def test_a_quantised_reference_completes_prompts_before_it_is_let_go(bits: str, base: str, tmp_path: Path) -> None:
    """Scored ahead it is given up, since a file would lack its quantisation state; its samples are those of the module
    itself."""
    ref_model = quantised(base, bits)
    args = config(tmp_path, precompute_ref_log_probs=True, generate_samples=3, samples_max_new_tokens=3)
    policy = tiny_model(hidden_size=64, intermediate_size=128)
    ours = trainer(policy, args, ref_model=ref_model, eval_dataset=rows(3, seed=1))
    assert ours.reference.scorer is None
    ours.evaluate()
    expected = []
    for prompt in rows(3, seed=1)["prompt_ids"][1:]:  # the first two rows share their prompt
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 3:
            with torch.no_grad():
                tokens.append(int(ref_model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        text = " ".join(f"w{token}" for token in tokens[len(prompt) :])
        expected.append(text.partition("w2")[0].strip() if "w2" in text.split() else text)
    assert [sample.reference for sample in ours._last_samples] == expected
