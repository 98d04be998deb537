"""Losses that read the reference's margin: in every layout, with every reference, a run follows a naive loop.

The loop scores one unpadded row at a time with a second model, and forms the loss by `oracle`, moments of earlier
batches included. Losses, weights after plain gradient steps, and the loss of held-out pairs agree to 1e-5. An epoch is
two batches of four pairs and one of a single pair, whose margins deviate by 0.
"""

import copy
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

import oracle
from covering import covering
from families import tiny_model
from holdfast import DPOTrainer
from holdfast.losses import LOSSES
from holdfast.training.global_batch import GlobalBatch
from naive import Row
from policies import POLICIES, config, logged, rows, trainer

BATCH_SIZE, MAX_STEPS, NUM_PAIRS = 4, 5, 9
LEARNING_RATE = 0.2
HELD_OUT = rows(3, seed=3)

OPTIONS: dict[str, dict[str, Any]] = {
    "hypo": {"loss_type": ["hypo"], "label_smoothing": 0.1},
    "hypo_norm": {"loss_type": ["hypo_norm"], "beta": 2.0},
    "dpop": {"loss_type": ["dpop"], "dpop_lambda": 3.0},
    "rainbow": {"loss_type": ["rainbow"], "rainbow_alpha": 0.4, "rainbow_gamma": 0.3, "beta": 2.0},
    "alpha_dpo": {"loss_type": ["alpha_dpo"], "alpha_dpo_alpha": 0.5, "alpha_dpo_gamma": 0.2, "beta": 2.0},
    "beta_dpo": {"loss_type": ["beta_dpo"], "beta_dpo_alpha": 0.4, "beta_dpo_share": 0.5},
    "all": {
        "loss_type": ["beta_dpo", "hypo", "alpha_dpo", "dpop", "rainbow", "hypo_norm"],
        "loss_weights": [0.5, 1.0, 0.7, 0.2, 0.3, 2.0],
        "dpop_lambda": 3.0,
        "alpha_dpo_alpha": 0.5,
        "ld_alpha": 0.6,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"layout": "padded"},
    "packed": {"layout": "packed"},
    "prefix_shared": {"layout": "prefix_shared"},
    "padding_free": {"padding_free": True},
    "parts": {"tokens_per_batch": 40},
}
SOFT = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
REFERENCES: dict[str, dict[str, Any]] = {
    "chosen": {"ref_model": "other"},
    "precomputed": {"ref_model": "other", "reference": "precomputed"},
    "user columns": {"ref_model": "other", "columns": True, "reference": "precomputed"},
    "stream": {"ref_model": "other", "is_stream": True, "reference_window": 2},
    "snapshot": {"reference": "snapshot"},
    "disk": {"reference": "snapshot", "snapshot_device": "disk", "reference_window": 2},
    "adapter": {"policy": "lora_sft", "reference": "adapter"},
    "soft": SOFT | {"reference": "snapshot"},
    "soft precomputed": SOFT | {"reference": "precomputed"},
}


def tokens(model: nn.Module, batch: list[Row], side: str) -> list[Tensor]:
    """The log-probs of each token of one completion of each pair."""
    return [oracle.sequence_logps(model, row["prompt_ids"], row[side]) for row in batch]


def naive_loss(
    policy: nn.Module, reference: nn.Module, batch: list[Row], options: dict[str, Any], earlier: dict[str, Any]
) -> Tensor:
    """The mean over pairs of the weighted sum of the losses; a batch of training joins the `earlier` ones."""
    sides = ("chosen_ids", "rejected_ids")
    chosen, rejected = (tokens(policy, batch, side) for side in sides)
    with torch.no_grad():
        ref_chosen, ref_rejected = (tokens(reference, batch, side) for side in sides)
    numbers = {name: value for name, value in options.items() if name not in ("loss_type", "loss_weights")}
    total = torch.zeros(len(batch))
    weights = options.get("loss_weights", [1.0])
    for name, weight in zip(options["loss_type"], weights, strict=True):
        known = {"beta": 0.2} | numbers | {"earlier": earlier.setdefault(name, [])}
        total = total + weight * oracle.LOSS_ORACLE[name](chosen, rejected, ref_chosen, ref_rejected, known)
        if chosen[0].requires_grad:
            earlier[name].append(oracle.gaps(name, chosen, rejected, ref_chosen, ref_rejected, known))
    return total.mean()


@functools.cache
def expected(loss: str, kind: str, ref_model: str | None, is_soft: bool) -> tuple[list[float], list[Tensor], float]:
    """The naive loop's losses, trained weights, and loss on `HELD_OUT` afterwards."""
    options, policy = OPTIONS[loss], POLICIES[kind]().eval()
    reference = tiny_model(seed=5) if ref_model else copy.deepcopy(policy)
    table: list[Row] = rows(NUM_PAIRS).to_list()
    epoch = [table[first : first + BATCH_SIZE] for first in range(0, NUM_PAIRS, BATCH_SIZE)]
    trainable, earlier, losses = [p for p in policy.parameters() if p.requires_grad], {}, []
    for step, batch in enumerate((epoch * 2)[:MAX_STEPS], start=1):
        value = naive_loss(policy, reference, batch, options, earlier)
        losses.append(value.item())
        for p, gradient in zip(trainable, torch.autograd.grad(value, trainable), strict=True):
            p.data -= LEARNING_RATE * gradient
        if is_soft and step % SOFT["ref_model_sync_steps"] == 0:
            for p, towards in zip(reference.parameters(), policy.parameters(), strict=True):
                p.data = SOFT["ref_model_mixup_alpha"] * towards.data + (1 - SOFT["ref_model_mixup_alpha"]) * p.data
    assert max(losses) - min(losses) > 1e-3
    with torch.no_grad():
        held_out = naive_loss(policy, reference, HELD_OUT.to_list(), options, earlier).item()
    return losses, [p.detach() for p in trainable], held_out


def with_sums(dataset: Dataset, model: nn.Module) -> Dataset:
    """`dataset` with the sums of log-probs that `model` gives its completions."""
    table = dataset.to_list()
    for name, side in (("ref_chosen_logps", "chosen_ids"), ("ref_rejected_logps", "rejected_ids")):
        with torch.no_grad():
            dataset = dataset.add_column(name, [float(each.sum()) for each in tokens(model, table, side)])
    return dataset


def run_of(folder: Path, loss: str, layout: str, reference: str, **changed: Any) -> DPOTrainer:
    options = dict(REFERENCES[reference])
    kind, ref_model = options.pop("policy", "full"), options.pop("ref_model", None)
    has_columns, is_stream = options.pop("columns", False), options.pop("is_stream", False)
    data: Any = rows(NUM_PAIRS)
    if has_columns:
        data = with_sums(data, tiny_model(seed=5))
    if is_stream:
        data = data.to_iterable_dataset()
    defaults = {
        "per_device_train_batch_size": BATCH_SIZE, "max_steps": MAX_STEPS, "learning_rate": LEARNING_RATE,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    args = config(folder, **defaults | LAYOUTS[layout] | OPTIONS[loss] | options | changed)
    chosen = {"ref_model": tiny_model(seed=5)} if ref_model else {}
    return trainer(POLICIES[kind](), args, train_dataset=data, **chosen)


def rows_of_the_table() -> Iterator[Any]:
    table = list(itertools.product(OPTIONS, LAYOUTS, REFERENCES))
    table = [row for row in table if row[0] != "all" or row[2] != "user columns"]  # they are sums, `ld_alpha` has none
    diagonal = set(covering(table, 1))
    for row in table:
        yield pytest.param(*row, id="-".join(row), marks=[] if row in diagonal else [pytest.mark.nightly])


@pytest.mark.parametrize(("loss", "layout", "reference"), list(rows_of_the_table()))
def test_a_run_follows_the_naive_loop(loss: str, layout: str, reference: str, tmp_path: Path) -> None:
    options = REFERENCES[reference]
    kind, ref_model = options.get("policy", "full"), options.get("ref_model")
    losses, weights, held_out = expected(loss, kind, ref_model, "sync_ref_model" in options)
    ours = run_of(tmp_path, loss, layout, reference)
    ours.train()
    assert logged(ours) == pytest.approx(losses, rel=1e-5, abs=1e-5)
    found = [p.detach() for p in ours.model.parameters() if p.requires_grad]
    for ours_, theirs in zip(found, weights, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=1e-5)
    if reference != "user columns":  # nobody brings those of other pairs
        assert ours.evaluate(HELD_OUT)["eval_loss"] == pytest.approx(held_out, rel=1e-5, abs=1e-5)


def test_the_table_has_every_loss_that_reads_the_margin() -> None:
    module = LOSSES["hypo"].function.__module__
    assert {name for name, loss in LOSSES.items() if loss.function.__module__ == module} == OPTIONS.keys() - {"all"}


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        ("all", "chosen"),
        *(
            pytest.param(loss, reference, marks=pytest.mark.nightly)
            for loss in OPTIONS
            for reference in ("chosen", "precomputed", "soft")
            if (loss, reference) != ("all", "chosen")
        ),
    ],
)
def test_under_autocast_the_loss_is_that_of_its_log_probs(
    loss: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 log-probs are rounded, and the losses and moments are computed from them in fp32 all the same: from the
    numbers that each batch had, the naive formulas give each logged loss."""
    batches: list[Any] = []
    plain = GlobalBatch.compared

    def compared(self: GlobalBatch, policy: Any, of_reference: Any, **options: Any) -> Any:
        batches.append((policy, of_reference))
        return plain(self, policy, of_reference, **options)

    monkeypatch.setattr(GlobalBatch, "compared", compared)
    ours = run_of(tmp_path, loss, "padded", reference, bf16=True, ld_alpha=None)
    ours.train()
    options = {
        name: value for name, value in OPTIONS[loss].items() if not name.startswith("loss_") and name != "ld_alpha"
    }
    earlier: dict[str, list[list[float]]] = {name: [] for name in OPTIONS[loss]["loss_type"]}
    found = []
    for policy, of_reference in batches:
        assert policy.chosen.dtype == of_reference.rejected.dtype == torch.float32
        total = torch.zeros(len(policy.chosen))
        for name, weight in zip(earlier, OPTIONS[loss].get("loss_weights", [1.0]), strict=True):
            sums = [*as_tokens(policy, requires_grad=True), *as_tokens(of_reference)]
            known = {"beta": 0.2} | options | {"earlier": earlier[name]}
            total = total + weight * oracle.LOSS_ORACLE[name](sums[0], sums[1], sums[2], sums[3], known).detach()
            earlier[name].append(oracle.gaps(name, sums[0], sums[1], sums[2], sums[3], known))
        found.append(total.mean().item())
    assert logged(ours) == pytest.approx(found, rel=1e-5, abs=1e-5)


def as_tokens(logps: Any, requires_grad: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Completions of that many tokens whose log-probs sum to those of the pairs: chosen, rejected."""
    sides = ((logps.chosen, logps.chosen_lengths), (logps.rejected, logps.rejected_lengths))
    chosen, rejected = (
        [
            (value.detach() / length).repeat(int(length)).requires_grad_(requires_grad)
            for value, length in zip(*side, strict=True)
        ]
        for side in sides
    )
    return chosen, rejected
