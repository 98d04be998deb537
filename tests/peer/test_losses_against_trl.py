"""The losses against TRL 1.16: the first batch's loss, its gradient, and the logged rewards. Opt in with `-m peer`.

Each case builds TRL's own trainer with a policy and another, differently initialised, reference (so no margin is 0),
lets it compute the loss of one batch, and computes the same from the oracle's log-probs on untouched copies of the
two models. Where holdfast differs on purpose, a test says so and shows the difference:

- `label_smoothing` under `sigmoid`: TRL ignores it; here it is conservative DPO.
- `orpo`: TRL's likelihood term counts the prompt's tokens too; here, as in the paper, it is the completion's alone.
- `use_weighting` with `sft` or `hinge`: TRL multiplies in place and fails, in the forward or the backward pass.
- `discopop` at a large negative margin: NaN there, the limit here.
- An option that no loss of the run reads: TRL accepts it, `check_losses` does not (see `tests/unit/test_losses.py`).
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import tiny
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.losses import LOSSES, LossOptions, PairLogps, implicit_rewards, pair_logps, preference_loss, wpo_weights

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]

NUM_PAIRS = 4
THEIRS: str = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]  # names each of their losses
WITH_REFERENCE = [name for name, loss in LOSSES.items() if loss.needs_reference and f"'{name}'" in THEIRS]
TAKES_DIVERGENCE = [name for name, loss in LOSSES.items() if "f_divergence_type" in loss.reads]
FAILS_WHEN_WEIGHTED = {"sft": "more than one element of the written-to tensor", "hinge": "modified by an inplace"}
TAKES_SMOOTHING = ["exo_pair", "robust", "aot", "aot_unpaired"]  # there; here `sigmoid` does as well

Completion = tuple[list[int], list[int]]  # prompt ids, completion ids


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer(vocab_size=300, chat_template=False)


@pytest.fixture(scope="module")
def models(tokenizer) -> list[Any]:
    """Two tiny models with weights large enough that their log-probs differ by nats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(LlamaForCausalLM(config))
    return made


@pytest.fixture(scope="module")
def rows():
    from datasets import Dataset

    sentences = [line for line in tiny.PROSE.splitlines() if line]
    cut = [(12, 40, 25), (20, 15, 33), (7, 22, 22), (16, 30, 8)]  # characters: prompt, chosen, rejected
    texts = [
        {"prompt": line[:p], "chosen": line[p : p + w], "rejected": other[:r]}
        for line, other, (p, w, r) in zip(sentences, sentences[5:], cut, strict=False)
    ]
    return Dataset.from_list(texts)


@pytest.fixture
def trl_loss(models, tokenizer, rows, tmp_path) -> Callable[..., tuple[Any, Any, Tensor]]:
    """Builds TRL's trainer with these options: the trainer, its first batch, and that batch's loss."""

    def compute(make=None, make_config=None, with_reference: bool = True, **options):
        config = (make_config or trl.DPOConfig)(
            output_dir=str(tmp_path),
            per_device_train_batch_size=NUM_PAIRS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            max_length=512,
            **options,
        )
        policy, reference = copy.deepcopy(models)
        trainer = (make or trl.DPOTrainer)(
            model=policy,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            **({"ref_model": reference} if with_reference else {}),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        return trainer, batch, trainer.compute_loss(trainer.model, batch)

    return compute


def completions_of(batch: dict[str, Tensor]) -> list[Completion]:
    """The 2 P completions of TRL's batch: chosen first, then rejected."""
    found = []
    for ids, attention, completion in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
    ):
        found.append((ids[attention & ~completion].tolist(), ids[completion].tolist()))
    return found


def scored(per_completion: list[Tensor]) -> tuple[SequenceLogps, PairBatch]:
    """Our two records, from per-token values of 2 P completions."""
    lengths = torch.tensor([len(values) for values in per_completion])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    batch = PairBatch(
        inputs={},
        source=torch.arange(len(sequence)),
        target=torch.zeros_like(sequence),
        sequence=sequence,
        chosen=torch.arange(NUM_PAIRS),
        rejected=torch.arange(NUM_PAIRS) + NUM_PAIRS,
        content=torch.zeros(len(lengths), 2, dtype=torch.long),
    )
    logps = SequenceLogps(per_token=torch.cat(per_completion), sequence=sequence, num_sequences=len(lengths))
    return logps, batch


def our_loss(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    completions: list[Completion],
    loss_types: list[str],
    loss_weights: list[float] | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    **options: Any,
) -> tuple[Tensor, PairLogps, PairLogps]:
    """The batch's mean loss from the oracle's log-probs, and the pairs of both models."""
    logps, batch = scored([oracle.sequence_logps(policy, *each) for each in completions])
    with torch.no_grad():
        reference_logps, _ = scored([oracle.sequence_logps(reference, *each) for each in completions])
        norms = torch.cat([oracle.sequence_log_sum_sq_probs(policy, *each) for each in completions])
    ours, theirs = pair_logps(logps, batch, ld_alpha), pair_logps(reference_logps, batch, ld_alpha)
    losses = preference_loss(
        ours,
        theirs,
        loss_types=loss_types,
        loss_weights=loss_weights or [1.0] * len(loss_types),
        options=LossOptions(**options),
        pair_weights=wpo_weights(logps, norms, batch) if use_weighting else None,
    )
    return losses.mean(), ours, theirs


def gradient(loss: Tensor, model: torch.nn.Module) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def assert_same(theirs: Tensor, their_gradient: Tensor, ours: Tensor, our_gradient: Tensor) -> None:
    """The losses agree, the norms of the gradients agree, and so do their directions."""
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-5, abs=1e-6)
    assert our_gradient.norm().item() == pytest.approx(their_gradient.norm().item(), rel=1e-4)
    assert (our_gradient - their_gradient).norm() <= 1e-4 * their_gradient.norm()
    assert their_gradient.norm() > 0


def cases():
    """Every loss that TRL's DPO trainer has, alone; then every divergence, modifier and combination."""
    smoothed = {name: {"label_smoothing": 0.1} for name in TAKES_SMOOTHING}
    for name in [*WITH_REFERENCE, "sft"]:
        plain = {"loss_type": [name], "beta": 0.3} | smoothed.get(name, {})
        yield pytest.param(plain, id=name)
        yield pytest.param(plain | {"beta": 0.05}, id=f"{name}-beta")
        if name != "sft":
            yield pytest.param(plain | {"ld_alpha": 0.4}, id=f"{name}-ld_alpha")
        if not LOSSES[name].sorts_batch and name not in FAILS_WHEN_WEIGHTED:
            yield pytest.param(plain | {"use_weighting": True}, id=f"{name}-use_weighting")
        if name in TAKES_DIVERGENCE:
            for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
                # A beta small enough that TRL's exponential loss stays finite; see the test below.
                near = {"beta": 0.002} if name == "discopop" else {}
                yield pytest.param(plain | near | {"f_divergence_type": divergence}, id=f"{name}-{divergence}")
    alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8}
    yield pytest.param({"loss_type": ["sigmoid"], **alpha}, id="sigmoid-alpha0.8")
    yield pytest.param({"loss_type": ["sigmoid"], **alpha, "f_alpha_divergence_coef": 1.0}, id="sigmoid-alpha1")
    yield pytest.param({"loss_type": ["discopop"], "discopop_tau": 0.5}, id="discopop-tau")
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield pytest.param(mixed, id="mixed")
    weighed = {
        "loss_type": ["sigmoid", "apo_down"],
        "loss_weights": [0.8, -0.2],
        "ld_alpha": 0.0,
        "use_weighting": True,
    }
    yield pytest.param(weighed, id="mixed-ld_alpha-use_weighting")
    yield pytest.param({"loss_type": ["hinge", "sft"], **alpha, "ld_alpha": 0.7}, id="hinge-sft-alpha0.8-ld_alpha")


@pytest.mark.parametrize("options", list(cases()))
def test_first_loss_gradient_and_rewards(options, models, trl_loss):
    trainer, batch, theirs = trl_loss(**options)
    their_gradient = gradient(theirs, trainer.model)
    policy, reference = models
    ours_are = {key: value for key, value in options.items() if key != "loss_type"}
    ours, of_policy, of_reference = our_loss(policy, reference, completions_of(batch), options["loss_type"], **ours_are)
    assert_same(theirs, their_gradient, ours, gradient(ours, policy))
    # With `sft` alone no reference is asked here, so the rewards are not TRL's; see `implicit_rewards`.
    if options["loss_type"] != ["sft"]:
        beta = LossOptions(beta=options.get("beta", 0.1))
        chosen, rejected = implicit_rewards(of_policy, of_reference, options["loss_type"], beta)
        logged = {
            name: numbers[-1] for name, numbers in trainer._metrics["train"].items() if name.startswith("rewards")
        }
        assert logged == {
            "rewards/chosen": pytest.approx(chosen.mean().item(), rel=1e-4, abs=1e-5),
            "rewards/rejected": pytest.approx(rejected.mean().item(), rel=1e-4, abs=1e-5),
            "rewards/margins": pytest.approx((chosen - rejected).mean().item(), rel=1e-4, abs=1e-5),
            "rewards/accuracies": (chosen > rejected).float().mean().item(),
        }


def test_every_loss_of_the_peer_is_compared():
    """TRL says its losses in the help of `loss_type`; each is in the table above."""
    compared = {case.values[0]["loss_type"][0] for case in cases()}
    assert [name for name in compared if f"'{name}'" not in THEIRS] == []
    assert THEIRS.count("`'") == len(compared)


def test_sigmoid_ignores_label_smoothing_there_and_not_here(models, trl_loss):
    """On purpose: theirs is ours without smoothing; ours is (1 - eps) L(m) + eps L(-m), that is L(m) + eps m."""
    policy, reference = models
    _, batch, theirs = trl_loss(loss_type=["sigmoid"], label_smoothing=0.2)
    pairs = completions_of(batch)
    plain, *_ = our_loss(policy, reference, pairs, ["sigmoid"])
    smoothed, of_policy, of_reference = our_loss(policy, reference, pairs, ["sigmoid"], label_smoothing=0.2)
    chosen, rejected = implicit_rewards(of_policy, of_reference, ["sigmoid"], LossOptions())
    assert theirs.item() == pytest.approx(plain.item(), rel=2e-5)
    assert smoothed.item() - theirs.item() == pytest.approx(0.2 * (chosen - rejected).mean().item(), rel=1e-3)


@pytest.mark.parametrize(("name", "message"), FAILS_WHEN_WEIGHTED.items())
def test_weighting_that_fails_there(name, message, models, trl_loss):
    """On purpose: here every loss that belongs to a pair can be weighted, these two as well."""

    def step() -> None:
        _, _, loss = trl_loss(loss_type=[name], use_weighting=True)
        loss.backward()

    with pytest.raises(RuntimeError, match=message):
        step()
    _, batch, plain = trl_loss(loss_type=[name])
    weighted, *_ = our_loss(*models, completions_of(batch), [name], use_weighting=True)
    assert gradient(weighted, models[0]).isfinite().all()
    assert weighted.item() != pytest.approx(plain.item(), rel=1e-3)


def discopop_in_doubles(margin: float, tau: float = 0.05) -> float:
    """-(1 - s) log sigma(m) + s exp(-m), or -m where s is 0 in double precision."""
    if margin < -50.0:
        return -margin
    mix = 1 / (1 + math.exp(-margin / tau))
    return (1 - mix) * math.log1p(math.exp(-margin)) + mix * math.exp(-margin)


def test_discopop_far_below_zero(models, trl_loss):
    """On purpose: 0 * infinity there. Here the limit: far below zero the loss is -m, as the logistic one's."""
    beta = 0.3
    _, batch, theirs = trl_loss(loss_type=["discopop"], f_divergence_type="forward_kl", beta=beta)
    options = {"f_divergence_type": "forward_kl", "beta": beta}
    ours, of_policy, of_reference = our_loss(*models, completions_of(batch), ["discopop"], **options)
    scores_w = 1 - torch.exp(of_reference.chosen - of_policy.chosen)
    scores_l = 1 - torch.exp(of_reference.rejected - of_policy.rejected)
    margins = (beta * (scores_w - scores_l)).tolist()
    assert min(margins) < -90.0  # e^90 is infinite in fp32
    assert theirs.isnan()
    assert ours.item() == pytest.approx(sum(map(discopop_in_doubles, margins)) / NUM_PAIRS, rel=1e-5)


def completions_of_cpo(batch: dict[str, Any]) -> list[Completion]:
    """The 2 P completions of a batch of TRL's CPO and ORPO trainers: chosen first, then rejected."""
    found = []
    for part in ("chosen", "rejected"):
        rows = zip(batch[f"{part}_input_ids"], batch[f"{part}_attention_mask"], batch[f"{part}_labels"], strict=True)
        for ids, attention, labels in rows:
            is_scored = labels != -100
            found.append((ids[attention.bool() & ~is_scored].tolist(), ids[is_scored].tolist()))
    return found


@pytest.mark.parametrize(
    ("name", "theirs_are", "ours_are"),
    [
        ("cpo", {"loss_type": "sigmoid"}, {}),
        ("cpo", {"loss_type": "sigmoid", "beta": 0.4, "cpo_alpha": 0.3}, {"beta": 0.4, "cpo_alpha": 0.3}),
        ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0}, {}),
        (
            "simpo",
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
            {"beta": 2.0, "simpo_gamma": 1.0},
        ),
    ],
)
def test_cpo_and_simpo(name, theirs_are, ours_are, models, trl_loss):
    """TRL has both in its CPO trainer, SimPO as CPO of averages without a likelihood term."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer, batch, theirs = trl_loss(CPOTrainer, CPOConfig, with_reference=False, **theirs_are)
    their_gradient = gradient(theirs, trainer.model)
    policy, reference = models
    ours, *_ = our_loss(policy, reference, completions_of_cpo(batch), [name], **ours_are)
    assert_same(theirs, their_gradient, ours, gradient(ours, policy))


def test_orpo_differs_by_the_prompt_s_likelihood(models, trl_loss):
    """On purpose: ours is theirs, once their likelihood of prompt and completion is replaced by the completion's."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer, batch, theirs = trl_loss(ORPOTrainer, ORPOConfig, with_reference=False, beta=0.3)
    policy, reference = models
    completions = completions_of_cpo(batch)
    ours, of_policy, _ = our_loss(policy, reference, completions, ["orpo"], beta=0.3)
    # Everything but the first token, which nothing predicts.
    whole = [oracle.sequence_logps(policy, ids[:1], ids[1:] + more) for ids, more in completions[:NUM_PAIRS]]
    their_nll = -torch.cat(whole).mean()
    our_nll = -of_policy.chosen_likelihood.sum() / of_policy.chosen_lengths.sum()
    assert abs(their_nll.item() - our_nll.item()) > 0.01
    exchanged = ours - our_nll + their_nll
    assert_same(theirs, gradient(theirs, trainer.model), exchanged, gradient(exchanged, policy))
    assert not math.isclose(ours.item(), theirs.item(), rel_tol=1e-3)
