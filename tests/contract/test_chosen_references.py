"""References that the user chooses: several at once, on another device, in another dtype, as a path of any kind.

The mixture is compared with one formed by hand from the naive oracle's log-probs, and the run with a naive loop.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode

from families import VOCABULARY, tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.preference_collator import with_positions
from holdfast.losses import LOSSES, LossOptions
from holdfast.policy.load import load_model
from holdfast.policy.placement import move_to_device
from holdfast.reference.load import load_ref_models
from holdfast.reference.reference import Reference, Roles
from holdfast.reference.scorers.mixture import MixtureReference, is_normaliser_free
from holdfast.reference.scorers.model import ModelReference, freeze
from holdfast.scoring.frozen import frozen_logps
from naive import BETA, LEARNING_RATE, NUM_STEPS, Recording, logp
from oracle import LOSS_ORACLE
from policies import POLICIES, config, logged, rows, sums_of_pairs, trainer

WEIGHTS = [0.6, 0.3, 0.1]


def _is_free_of_the_normaliser(name: str) -> bool:
    """Whether the oracle's loss stays the same when both completions of a pair are `shift` more likely under the
    reference."""
    chosen = [torch.tensor(tokens) for tokens in ([-1.0, -4.0], [-9.0], [-3.0, -1.0, -2.0])]
    rejected = [torch.tensor(tokens) for tokens in ([-6.0], [-5.0], [-2.0, -2.5])]
    reference = [list(torch.tensor(sums)) for sums in ([[-5.5], [-8.0], [-7.0]], [[-6.5], [-6.0], [-4.0]])]
    shift = torch.tensor([0.5, -1.0, 2.0])
    shifted = [[logp + by for logp, by in zip(part, shift, strict=True)] for part in reference]
    before, after = (
        LOSS_ORACLE[name](chosen, rejected, *of_reference, {"label_smoothing": 0.1})
        for of_reference in (reference, shifted)
    )
    return torch.allclose(before, after, rtol=1e-5, atol=1e-6)


FIT = {name for name, loss in LOSSES.items() if loss.needs_reference and _is_free_of_the_normaliser(name)}


def others() -> list[nn.Module]:
    """Two models that are not the policy, one of another family."""
    return [tiny_model(seed=5), tiny_model("qwen2", seed=6)]


def mixed(models: Sequence[nn.Module], weights: Sequence[float], row: Any, side: str) -> Tensor:
    """sum_i w_i log pi_i(y|x), by hand."""
    with torch.no_grad():
        return torch.stack([w * logp(m, row, side) for w, m in zip(weights, models, strict=True)]).sum()


def batch_of(table: list[Any]) -> PairBatch:
    return PairBatch.from_tensors(with_positions(PaddedLayout(pad_token_id=0)(table)))


def expected_sums(score: Callable[[Any, str], Tensor], table: list[Any]) -> Tensor:
    """As a padded batch orders its sequences: the chosen ones, then the rejected ones."""
    return torch.stack([score(row, side) for side in ("chosen_ids", "rejected_ids") for row in table]).detach()


# --- the mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_mixture_is_the_weighted_sum_of_log_probs(weights: list[float] | None, tmp_path: Path) -> None:
    """Entries of every kind: a module, a path, and None for the policy."""
    first, second = others()
    second.save_pretrained(tmp_path / "second")
    policy = tiny_model()
    ref_models = [first, str(tmp_path / "second"), None]
    ours = trainer(policy, config(tmp_path / "out", ref_model_weights=weights), ref_model=ref_models)
    table = rows().to_list()[:4]
    models, counted = [first, second, policy], weights or [1 / 3] * 3
    expected = expected_sums(lambda row, side: mixed(models, counted, row, side), table)
    torch.testing.assert_close(sums_of_pairs(ours, table), expected, rtol=0, atol=1e-4)
    assert ours.ref_model is None
    assert (ours.reference.version, ours.reference.drift) == (0, 0.0)


def naive_mixture_run(
    policy: nn.Module, references: list[nn.Module | None], weights: list[float], batches: list[Any]
) -> list[float]:
    """Losses per step of DPO against a mixture whose None is the policy as it starts; plain gradient steps."""
    policy.eval()
    models = [copy.deepcopy(policy) if model is None else model for model in references]
    trainable = [p for p in policy.parameters() if p.requires_grad]
    losses = []
    for batch in batches:
        margins = [
            logp(policy, row, "chosen_ids") - logp(policy, row, "rejected_ids")
            - mixed(models, weights, row, "chosen_ids") + mixed(models, weights, row, "rejected_ids")
            for row in batch
        ]  # fmt: skip
        loss = -nn.functional.logsigmoid(BETA * torch.stack(margins)).mean()
        losses.append(loss.item())
        for p, gradient in zip(trainable, torch.autograd.grad(loss, trainable), strict=True):
            p.data -= LEARNING_RATE * gradient
    return losses


@pytest.mark.covering(1)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora_fresh", "lora_sft"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference": "model"},
        {"reference": "snapshot"},
        {"reference": "snapshot", "snapshot_device": "disk"},
        {"reference": "precomputed"},
        {"reference_window": 2},
    ],
    ids=["auto", "model", "snapshot", "disk", "precomputed", "windowed"],
)
def test_a_run_against_a_mixture_follows_the_naive_run(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    recording = Recording()
    args = config(tmp_path, ref_model_weights=WEIGHTS, **options)
    ours = trainer(POLICIES[kind](), args, ref_model=[*others(), None], data_collator=recording)
    recording.batches.clear()
    ours.train()
    theirs = POLICIES[kind]()
    batches = recording.batches[-NUM_STEPS:]
    expected = naive_mixture_run(theirs, [*others(), None], WEIGHTS, batches)
    assert logged(ours) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3
    for found, parameter in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, parameter, rtol=0, atol=1e-5)


def test_the_normaliser_cancels_in_the_loss_and_shifts_both_rewards(tmp_path: Path) -> None:
    """Completions of one token: all 97 can be summed over, so Z(x) = sum_y prod_i pi_i(y|x)^w_i is known. The loss is
    that of the normalised mixture; both rewards lie -beta log Z(x) > 0 too high, as the docs say."""
    table = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [11], "rejected_ids": [23]},
        {"prompt_ids": [9, 8], "chosen_ids": [40], "rejected_ids": [3]},
    ]
    policy, models = tiny_model(), others()
    margins, too_high = [], []
    with torch.no_grad():
        for row in table:
            ids = torch.tensor([row["prompt_ids"]])
            log_p = [model(ids).logits[0, -1].log_softmax(-1) for model in (policy, *models)]
            unnormalised = 0.7 * log_p[1] + 0.3 * log_p[2]
            normalised = unnormalised.log_softmax(-1)
            assert normalised.exp().sum().item() == pytest.approx(1, abs=1e-5)
            ratio = BETA * (log_p[0] - normalised)
            margins.append(ratio[row["chosen_ids"]] - ratio[row["rejected_ids"]])
            too_high.append(-BETA * unnormalised.logsumexp(-1))
            row["ratio"] = ratio[row["chosen_ids"]]
    args = config(tmp_path, ref_model_weights=[0.7, 0.3], max_steps=1, per_device_train_batch_size=2)
    dataset = rows().from_list([{name: row[name] for name in row if name != "ratio"} for row in table])
    ours = trainer(policy, args, ref_model=models, train_dataset=dataset)
    ours.train()
    expected = -nn.functional.logsigmoid(torch.stack(margins)).mean()
    assert logged(ours)[0] == pytest.approx(expected.item(), abs=1e-6)
    assert logged(ours, "rewards/margins")[0] == pytest.approx(torch.stack(margins).mean().item(), abs=1e-6)
    true_reward = torch.stack([row["ratio"] for row in table]).mean().item()
    offset = torch.stack(too_high).mean().item()
    assert offset > 0.01
    assert logged(ours, "rewards/chosen")[0] == pytest.approx(true_reward + offset, abs=1e-6)


def test_one_reference_in_a_list_is_that_reference(tmp_path: Path) -> None:
    """The same run bit for bit, weighted by 1 or not; and [None] is the policy, audited as such."""
    runs = []
    for ref_model, weights in ((tiny_model(seed=5), None), ([tiny_model(seed=5)], None), ([tiny_model(seed=5)], [1.0])):
        ours = trainer(tiny_model(), config(tmp_path, ref_model_weights=weights), ref_model=ref_model)
        assert isinstance(ours.reference.scorer, ModelReference)
        ours.train()
        runs.append(logged(ours))
    assert runs[0] == runs[1] == runs[2]
    alone = trainer(tiny_model(), config(tmp_path), ref_model=[None])
    with torch.no_grad():
        alone.ref_model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="found a gap of"):
        alone.train()


def test_limits_of_a_mixture() -> None:
    """A model mixed with itself is that model; all but no weight on the second is the first."""
    batch = batch_of(rows().to_list()[:3])
    first, second = (ModelReference(freeze(model), torch.no_grad, origin="a test") for model in others())
    alone = first.logps(batch).per_token
    torch.testing.assert_close(MixtureReference([first, first], [0.3, 0.7]).logps(batch).per_token, alone)
    nearly = MixtureReference([first, second], [1 - 1e-7, 1e-7]).logps(batch).per_token
    torch.testing.assert_close(nearly, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(MixtureReference([first, second], [0.5, 0.5]).logps(batch).per_token, alone, atol=1e-2)


def test_what_a_mixture_holds_and_is() -> None:
    """Tensors under the number of their reference; a digest of all weights, both kinds, and their order."""
    models = others()
    parts = [ModelReference(freeze(model), torch.no_grad, origin="a test") for model in models]
    mixture = MixtureReference(parts, [0.25, 0.75])
    tensors = dict(mixture.tensors())
    assert len(tensors) == sum(len(list(model.parameters())) for model in models)
    assert tensors["1.lm_head.weight"] is models[1].lm_head.weight
    assert mixture.describe("asked per batch") == (
        "the log-linear mixture 0.25 * (a test, a module of its own, asked per batch, fixed) + "
        "0.75 * (a test, a module of its own, asked per batch, fixed)"
    )
    digests = {
        mixture.identity().weights_digest,
        MixtureReference(parts, [0.75, 0.25]).identity().weights_digest,
        MixtureReference(parts[::-1], [0.25, 0.75]).identity().weights_digest,
    }
    assert len(digests) == 3
    assert MixtureReference(parts, [0.25, 0.75]).identity().weights_digest == mixture.identity().weights_digest
    with torch.no_grad():
        models[1].lm_head.weight.mul_(1.1)
    assert mixture.identity().weights_digest not in digests
    assert Reference(Roles(scorer=mixture)).state_dict() == {}


def test_precomputing_lets_go_of_all_of_a_mixture(tmp_path: Path) -> None:
    """Nothing refers to the given modules any more, and new data can still be evaluated."""
    models = others()
    seen = [weakref.ref(model) for model in models]
    args = config(tmp_path, precompute_ref_log_probs=True, ref_model_weights=[0.7, 0.3])
    ahead = trainer(tiny_model(), args, ref_model=models)
    del models
    gc.collect()
    assert [model() for model in seen] == [None, None]
    live = trainer(tiny_model(), config(tmp_path / "live", ref_model_weights=[0.7, 0.3]), ref_model=others())
    assert ahead.reference.identity().weights_digest == live.reference.identity().weights_digest
    ahead.train()
    live.train()
    found, expected = (ours.evaluate(rows(4, seed=9))["eval_loss"] for ours in (ahead, live))
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_run_against_a_mixture_is_resumed(tmp_path: Path) -> None:
    """Bit for bit; and with other weights it is another reference, so resuming is refused."""
    options = {"save_strategy": "steps", "save_steps": 2}

    def run(weights: list[float]) -> Any:
        args = config(tmp_path, ref_model_weights=weights, **options)
        return trainer(tiny_model(), args, ref_model=[*others(), None])

    whole, again = run(WEIGHTS), run(WEIGHTS)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again)[2:] == logged(whole)[2:]
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"differs in the weights of the reference"):
        run([0.5, 0.3, 0.2]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- what a mixture is refused for ------------------------------------------------------------------------------------


def test_which_losses_are_free_of_the_normaliser() -> None:
    """Those that read the difference of the two log ratios; none under another f-divergence, but `aot`, which reads no
    f-divergence."""
    needy = {name for name, loss in LOSSES.items() if loss.needs_reference}
    assert {"sigmoid", "hinge", "exo_pair", "robust", "aot", "discopop"} <= FIT
    level = {"ipo", "nca_pair", "bco_pair", "sppo_hard", "aot_unpaired", "apo_zero", "apo_down", "sigmoid_norm"}
    assert level & FIT == set()
    assert {name for name in needy if is_normaliser_free(name, LossOptions())} == FIT
    without_divergence = {name for name in FIT if "f_divergence_type" not in LOSSES[name].reads}
    assert "aot" in without_divergence
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        options = LossOptions(f_divergence_type=divergence)
        assert {name for name in needy if is_normaliser_free(name, options)} == without_divergence
    kl_again = LossOptions(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    assert is_normaliser_free("sigmoid", kl_again)


@pytest.mark.parametrize("name", sorted(name for name, loss in LOSSES.items() if loss.needs_reference))
def test_losses_that_read_the_level_are_refused(name: str, tmp_path: Path) -> None:
    """Every loss either sees a mixture and its normalised form as one, or is refused."""
    args = config(tmp_path, loss_type=name, label_smoothing=0.1 if name == "exo_pair" else 0.0)
    if name in FIT:
        assert isinstance(trainer(tiny_model(), args, ref_model=others()).reference.scorer, MixtureReference)
        return
    with pytest.raises(ValueError, match=rf"Several references.*loss_type '{name}'\. The log-prob.*Use a loss"):
        trainer(tiny_model(), args, ref_model=others())


def test_what_else_reads_the_level_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"f_divergence_type": "js_divergence"}, r"loss_type 'sigmoid' with f_divergence_type='js_divergence'"),
        ({"ld_alpha": 0.5}, r"together with ld_alpha=0.5.*Set ld_alpha=None"),
        ({"sync_ref_model": True}, r"sync_ref_model=True was asked for with 2 references.*Use a single"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tiny_model(), config(tmp_path, **options), ref_model=others())
    mixture = MixtureReference(
        [ModelReference(model, torch.no_grad, origin="a test") for model in others()], [0.5, 0.5]
    )
    with pytest.raises(
        ValueError, match=r"A sync \(alpha 0.3\) was asked of a reference that stays.*mixture 0.5.*no weights"
    ):
        Reference(Roles(scorer=mixture)).sync(0.3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6], r"\[0.5, 0.6\] was asked for, which sum to 1.1.*Use \[0.454545, 0.545455\]"),
        ([1.5, -0.5], r"the weights of a mixture are positive numbers.*out of `ref_model`"),
        ([1.0, 0.0], r"the weights of a mixture are positive numbers"),
        ([float("nan"), 1.0], r"the weights of a mixture are positive numbers"),
        ([], r"the weights of a mixture are positive numbers"),
    ],
)
def test_weights_out_of_range_are_refused(weights: list[float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, ref_model_weights=weights)


def test_lists_without_a_meaning_are_refused(tmp_path: Path) -> None:
    policy = tiny_model()
    for ref_model, options, message in (
        (others(), {"ref_model_weights": WEIGHTS}, r"3 weights, but `ref_model` names 2 references"),
        (tiny_model(seed=5), {"ref_model_weights": [1.0]}, r"but `ref_model` is one LlamaForCausalLM"),
        (None, {"ref_model_weights": [1.0]}, r"but `ref_model` is one NoneType"),
        (None, {"ref_model_weights": [1.0], "loss_type": "simpo"}, r"but `ref_model` is one NoneType"),
        ([], {}, r"`ref_model` is a list of 0 references"),
        ([None, None], {}, r"a list of 2 references, 2 of them None"),
        (others(), {"ref_model_init_kwargs": {"dtype": "bfloat16"}}, r"is LlamaForCausalLM, Qwen2.*not a path"),
        ([policy, tiny_model(seed=5)], {}, r"`ref_model` is the same object as `model`"),
        ([None, tiny_model(vocab_size=101)], {}, r"vocabulary of 101 tokens and `model` one of 97"),
        (others(), {"reference": "snapshot"}, r"reference='snapshot' was asked for together with a `ref_model`"),
        (
            [None, *others()],
            {"loss_type": "simpo", "reference": "none"},
            r"`ref_model` was given together with.*'none'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(policy, config(tmp_path, **options), ref_model=ref_model)
    with pytest.raises(TypeError, match=r"`ref_model` is or holds a dict; pass a model"):
        trainer(policy, config(tmp_path), ref_model=[{}, None])


def test_a_list_beside_a_loss_without_a_reference_is_measured(tmp_path: Path) -> None:
    """`reference/kl_*` are the policy's log-probs less those of the mixture, and the losses are those without a list.
    The first batch has all rows."""
    options: dict[str, Any] = {"loss_type": "simpo", "per_device_train_batch_size": len(rows()), "max_steps": 1}
    options |= {"ref_model_weights": WEIGHTS, "learning_rate": 0.0}
    ours = trainer(tiny_model(), config(tmp_path / "kept", **options), ref_model=[None, *others()])
    ours.train()
    plain = trainer(tiny_model(), config(tmp_path / "plain", **options | {"ref_model_weights": None}))
    plain.train()
    assert logged(ours) == logged(plain)
    policy = tiny_model()
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            gaps = [
                float(logp(policy, row, f"{side}_ids") - mixed([policy, *others()], WEIGHTS, row, f"{side}_ids"))
                for row in rows()
            ]
        assert logged(ours, f"reference/kl_{side}") == pytest.approx([sum(gaps) / len(gaps)], abs=2e-5)
        assert max(map(abs, gaps)) > 0.1
        assert logged(plain, f"reference/kl_{side}") == []


# --- another device, another dtype ------------------------------------------------------------------------------------


def pretended(tensor: Tensor, device: str, mode: FakeTensorMode) -> Tensor:
    """`tensor` without values, which says that it is on `device` and refuses to meet tensors of another."""
    fake = mode.from_tensor(tensor.detach())
    with mode:
        return fake.to(device)


def test_a_reference_on_the_cpu_beside_a_batch_on_an_accelerator() -> None:
    """With torch's fake tensors, which compute devices and shapes but no values: no accelerator is needed. Unless the
    ids travel to the reference, the two devices meet; the log-probs come out where the batch is."""
    mode = FakeTensorMode()
    batch, model = batch_of(rows().to_list()[:3]), tiny_model()
    frozen_logps(model, batch, torch.no_grad)  # reads the head's transform, from real values
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=False)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = mode.from_tensor(buffer)
    there = {
        field.name: pretended(value, "cuda:0", mode)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    inputs = {name: pretended(tensor, "cuda:0", mode) for name, tensor in batch.inputs.items()}
    distant = replace(batch, inputs=inputs, **there)
    reference = ModelReference(model, torch.no_grad, origin="a test")
    with mode:
        with pytest.raises(FakeTensorDeviceMismatchError, match="at least two devices, cpu and cuda:0"):
            frozen_logps(model, distant, torch.no_grad)
        found = reference.logps(distant)
        assert found.per_token.device == found.sequence.device == torch.device("cuda:0")
        assert found.per_token.shape == batch.target.shape


def test_a_device_map_is_respected(tmp_path: Path) -> None:
    """A reference that was put somewhere stays there. The `meta` device stands for the trainer's: what is moved to it
    has no values any more."""
    elsewhere = torch.device("meta")
    POLICIES["lora_sft"]().save_pretrained(tmp_path / "adapter")
    tiny_model(seed=5).save_pretrained(tmp_path / "whole")
    for device_map in ("cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        args = config(tmp_path, ref_model_init_kwargs={"device_map": device_map})
        (module,) = load_ref_models(str(tmp_path / "whole"), args)
        assert {p.device.type for p in move_to_device(module, elsewhere).parameters()} == {"cpu"}
    (module,) = load_ref_models(str(tmp_path / "whole"), config(tmp_path))
    assert {p.device.type for p in move_to_device(module, elsewhere).parameters()} == {"meta"}


def test_a_bf16_reference_beside_an_fp32_policy(tmp_path: Path) -> None:
    """Scored in its own dtype: the log-probs of the fp32 model whose weights were rounded, to bf16's own rounding."""
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    args = config(tmp_path / "out", ref_model_init_kwargs={"dtype": "bfloat16"})
    ours = trainer(tiny_model(), args, ref_model=str(tmp_path / "other"))
    assert {p.dtype for p in ours.ref_model.parameters()} == {torch.bfloat16}
    rounded = copy.deepcopy(ours.ref_model).float()
    table = rows().to_list()
    batch = ours._collated(table)
    found, which = ours.reference.logps(batch), torch.cat([batch.chosen, batch.rejected])
    expected = expected_sums(lambda row, side: logp(rounded, row, side), table)
    per_token = (found.sums()[which] - expected).abs() / found.lengths()[which]
    assert found.per_token.dtype == torch.float32
    assert 1e-6 < float(per_token.max()) < 0.05
    ours.train()
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_path_to_an_adapter(tmp_path: Path) -> None:
    """A PEFT folder is its base with the adapter, as it was saved."""
    base = tiny_model(seed=5)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    adapted = POLICIES["lora_sft"]()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    expected_model = PeftModel.from_pretrained(tiny_model(seed=5), tmp_path / "adapter").eval()
    ours = trainer(tiny_model(), config(tmp_path / "out"), ref_model=str(tmp_path / "adapter"))
    assert isinstance(ours.ref_model, PeftModel)
    table = rows().to_list()[:3]
    expected = expected_sums(lambda row, side: logp(expected_model, row, side), table)
    torch.testing.assert_close(sums_of_pairs(ours, table), expected, rtol=0, atol=1e-4)
    plain = expected_sums(lambda row, side: logp(base, row, side), table)
    assert float((plain - expected).abs().max()) > 0.1, "the adapter must matter"


def in_a_hub_cache(model: Any, cache: Path, revision: str, commit: str) -> None:
    """`model` as a hub cache holds revision `revision` of the repository somebody/tiny."""
    repository = cache / "models--somebody--tiny"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


def test_a_revision_of_a_hub_model(tmp_path: Path) -> None:
    """`revision` picks the weights; the policy's own is not taken over."""
    for number, revision in enumerate(("main", "v2")):
        in_a_hub_cache(tiny_model(seed=5 + number), tmp_path / "cache", revision, str(number) * 40)
    cache_dir = str(tmp_path / "cache")
    for number, options in enumerate(({}, {"revision": "v2"})):
        args = config(tmp_path, ref_model_init_kwargs={"cache_dir": cache_dir, **options})
        (module,) = load_ref_models("somebody/tiny", args)
        assert torch.equal(module.lm_head.weight, tiny_model(seed=5 + number).lm_head.weight)
    args = config(tmp_path, model_init_kwargs={"cache_dir": cache_dir, "revision": "v2"})
    (module,) = load_ref_models("somebody/tiny", args)
    assert torch.equal(module.lm_head.weight, tiny_model(seed=5).lm_head.weight)


def test_what_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    """Before any forward pass: what was asked for, what is there, and what to name instead."""
    tiny_model().save_pretrained(tmp_path / "checkpoint-500")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events.txt").write_text("")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("checkpoint-50", {}, r"ref_model='.*checkpoint-50' was to be loaded, but there is no such folder.*"
         r"Did you mean '.*checkpoint-500'\? Name"),
        ("logs", {}, r"ref_model='.*logs' was to be loaded, a folder that cannot be read as a model.*events.txt"),
        (".", {}, r"It holds \['checkpoint-500', .*\]\. A run has not finished there: name one of its checkpoints"),
        ("checkpoint-500", {"subfolder": "best"}, r"with \{'subfolder': 'best'\} was to be loaded, a folder that"),
    ]  # fmt: skip
    for name, options, message in cases:
        args = config(tmp_path / "out", ref_model_init_kwargs=options or None)
        with pytest.raises(ValueError, match=message):
            trainer(tiny_model(), args, ref_model=str(tmp_path / name))
    with pytest.raises(ValueError, match=r"ref_model='nobody/nothing' was to be loaded.*as a hub id it cannot be read"):
        trainer(tiny_model(), config(tmp_path / "out"), ref_model="nobody/nothing")
    with pytest.raises(ValueError, match=r"model='.*checkpoint-50' was to be loaded.*Did you mean '.*checkpoint-500'"):
        load_model(str(tmp_path / "checkpoint-50"), None, args=config(tmp_path / "out"), is_trainable=True)


def test_a_reference_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the folder is written: the policy would replace the reference. A folder inside it is another one."""
    tiny_model().save_pretrained(tmp_path / "guide")
    (tmp_path / "link").symlink_to("guide")
    monkeypatch.chdir(tmp_path)
    for written, options in ((tmp_path / "guide", {}), (Path("link"), {}), (Path("guide/"), REWARD_OF_A_LIST)):
        ref_model: Any = [str(written), None] if options else str(written)
        with pytest.raises(ValueError, match=r"which is also the output_dir.*Name another output_dir"):
            trainer(tiny_model(), config(tmp_path / "guide", **options), ref_model=ref_model)
    trainer(tiny_model(), config(tmp_path / "guide" / "policy"), ref_model="guide")


REWARD_OF_A_LIST: dict[str, Any] = {"ref_model_weights": [0.5, 0.5]}


def test_vocabulary_of_the_tests() -> None:
    """`test_the_normaliser_cancels...` sums over every token."""
    assert tiny_model().config.vocab_size == VOCABULARY == 97
