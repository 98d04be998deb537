"""Completions of which some tokens are only seen: losses, gradients and metrics are those of the scored tokens.

Every number is compared with the naive oracle's, which reads each sequence whole and unpadded, takes full logits and
picks the scored tokens in a loop. A run's weights after its last step show that its gradients are the oracle's.
"""

import copy
import functools
import itertools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import nn

from covering import covering
from families import tiny_model
from holdfast import DataCollatorForPreference, DPOTrainer
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.reference.sources.user_logps import UserLogps
from masked_rows import SIDES, masked_data, masked_rows, oracle_losses, scored_logps
from policies import POLICIES, config, logged, trainer

BATCH, NUM_STEPS = 3, 4
LAYOUTS = ("padded", "packed", "prefix_shared")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("full", {"reference": "model"}),
    "adapter": ("lora_sft", {"reference": "adapter"}),
    "snapshot": ("full", {"reference": "snapshot"}),
    "precomputed": ("full", {"reference": "precomputed"}),
    "windowed": ("full", {"reference": "snapshot", "reference_window": 3}),
    "two_batches_a_step": ("full", {"reference": "model", "tokens_per_batch": 30}),
}
"""Kind of policy and options."""
LOSSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ("sigmoid", {}, {}),
    "ipo": ("ipo", {}, {}),
    "sigmoid_norm": ("sigmoid_norm", {"beta": 2.0}, {}),
    "simpo": ("simpo", {"beta": 2.0}, {}),
    "orpo": ("orpo", {}, {}),
    "sft": ("sft", {}, {}),
    "ld": ("sigmoid", {"ld_alpha": 0.4}, {}),
    "wpo": ("sigmoid", {}, {"use_weighting": True}),
}
"""The oracle's loss, options of both, options of the run alone."""
NO_REFERENCE = {"simpo", "orpo", "sft"}
CELLS = [cell for cell in itertools.product(LAYOUTS, WAYS, LOSSES) if cell[2] not in NO_REFERENCE or cell[1] == "model"]
COVERING = set(covering(CELLS, strength=2))


class Trajectory(NamedTuple):
    losses: list[float]
    weights: dict[str, torch.Tensor]


def batches() -> list[list[dict[str, Any]]]:
    table = masked_rows()
    epoch = [table[first : first + BATCH] for first in range(0, len(table), BATCH)]
    return (epoch * NUM_STEPS)[:NUM_STEPS]


@functools.cache
def expected(kind: str, name: str) -> Trajectory:
    """The naive loop's."""
    loss, options, own = LOSSES[name]
    policy = POLICIES[kind]().eval()
    reference = copy.deepcopy(policy)
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    losses = []
    for batch in batches():
        of_pairs = oracle_losses(
            loss, policy, reference, batch, {"beta": 0.2} | options, is_weighted="use_weighting" in own
        )
        losses.append(of_pairs.mean().item())
        gradients = torch.autograd.grad(of_pairs.mean(), list(trainable.values()), allow_unused=True)
        for parameter, gradient in zip(trainable.values(), gradients, strict=True):
            if gradient is not None:
                parameter.data -= 0.1 * gradient
    return Trajectory(losses, {name: p.detach() for name, p in trainable.items()})


def run_of(kind: str, folder: Path, data: Any = None, **options: Any) -> DPOTrainer:
    parts = {part: options.pop(part) for part in ("data_collator", "eval_dataset") if part in options}
    args = config(
        folder,
        **{
            "per_device_train_batch_size": BATCH, "max_steps": NUM_STEPS, "learning_rate": 0.1,
            "train_sampling_strategy": "sequential", "beta": 0.2,
        } | options,
    )  # fmt: skip
    return trainer(POLICIES[kind](), args, train_dataset=masked_data() if data is None else data, **parts)


def assert_follows(ours: DPOTrainer, theirs: Trajectory) -> None:
    ours.train()
    assert logged(ours) == pytest.approx(theirs.losses, rel=1e-5, abs=1e-5)
    found = dict(ours.model.named_parameters())
    for name, weight in theirs.weights.items():
        torch.testing.assert_close(
            found[name].detach(), weight, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("layout", "way", "name"),
    [pytest.param(*cell, marks=[] if cell in COVERING else pytest.mark.nightly) for cell in CELLS],
)
def test_a_run_follows_the_oracle(layout: str, way: str, name: str, tmp_path: Path) -> None:
    kind, options = WAYS[way]
    loss, of_both, own = LOSSES[name]
    ours = run_of(kind, tmp_path, layout=layout, loss_type=loss, **options, **of_both, **own)
    assert ours.data_collator.name == layout
    assert_follows(ours, expected(kind, name))


def test_the_masks_matter() -> None:
    """The oracle's losses without them are others, so what follows it above heeds them."""
    table, policy, reference = masked_rows(), tiny_model(), tiny_model(seed=3)
    plain = [{name: value for name, value in row.items() if name not in SIDES.values()} for row in table]
    with torch.no_grad():
        for loss in ("sigmoid", "simpo", "orpo"):
            losses = [oracle_losses(loss, policy, reference, rows, {"beta": 0.2}) for rows in (table, plain)]
            assert (losses[0] - losses[1]).abs()[:5].min() > 1e-3, loss


def test_metrics(tmp_path: Path) -> None:
    """Of an evaluation, each worked out token by token: sums and means over scored tokens alone."""
    policy, other, table = tiny_model(), tiny_model(seed=3), masked_rows()
    ours = trainer(policy, config(tmp_path, per_device_eval_batch_size=4, beta=0.3), ref_model=other)
    found = ours.evaluate(masked_data())
    values: dict[str, list[float]] = {}
    with torch.no_grad():
        for row, (side, mask) in itertools.product(table, SIDES.items()):
            name = side.removesuffix("_ids")
            sums = [float(scored_logps(model, row, side).sum()) for model in (policy, other)]
            values.setdefault(f"logps/{name}", []).append(sums[0])
            values.setdefault(f"reference/kl_{name}", []).append(sums[0] - sums[1])
            logits = policy(torch.tensor([row["prompt_ids"] + row[side]])).logits[0].double()
            for place, token in enumerate(row[side]):
                if row[mask] and not row[mask][place]:
                    continue
                at = logits[len(row["prompt_ids"]) + place - 1]
                entropy = float(torch.distributions.Categorical(logits=at).entropy())
                values.setdefault("entropy", []).append(entropy)
                values.setdefault(f"logits/{name}", []).append(float(at.mean()))
                if name == "chosen":
                    values.setdefault("mean_token_accuracy", []).append(float(at.argmax() == token))
    assert len(values) == 8
    for name, of_each in values.items():
        assert found[f"eval_{name}"] == pytest.approx(sum(of_each) / len(of_each), abs=2e-5), name


def held_out_loss(policy: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        return oracle_losses("sigmoid", policy, reference, masked_rows(), {"beta": 0.2}).mean().item()


class OfOneLayout:
    """A data collator of a user, around one of the package's."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        return self.inner(features)


WAYS_IN: dict[str, dict[str, Any]] = {
    "map": {},
    "stream": {"train": "stream"},
    "all columns": {"remove_unused_columns": False},
    "stream, all columns": {"train": "stream", "remove_unused_columns": False},
    "a layout": {"data_collator": SharedLayout(0)},
    "the usual collator": {"data_collator": DataCollatorForPreference(0)},
    "the usual collator, ahead": {"data_collator": DataCollatorForPreference(0), "reference": "precomputed"},
    "a user's collator": {"data_collator": OfOneLayout(DataCollatorForPreference(0))},
    "a user's collator, ahead": {
        "data_collator": OfOneLayout(DataCollatorForPreference(0)), "reference": "precomputed",
    },
    "a user's layout": {"data_collator": OfOneLayout(PaddedLayout(0))},
    "a stream ahead": {"train": "stream", "reference": "precomputed", "reference_window": 2},
    "by length": {"train_sampling_strategy": "group_by_length"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS_IN)
def test_masks_reach_the_loss_on_every_way(way: str, tmp_path: Path) -> None:
    """Of training, of evaluations of a dataset, a dict and a stream, and of a prediction: all rows in one batch, so
    that their order is no matter."""
    options = {"per_device_train_batch_size": 9, "per_device_eval_batch_size": 9, "max_steps": 2} | WAYS_IN[way]
    data: Any = masked_data().add_column("source", ["web"] * 9)
    data = data.to_iterable_dataset() if options.pop("train", "map") == "stream" else data
    ours = run_of("full", tmp_path, data, eval_dataset={"held": masked_data()}, **options)
    reference = copy.deepcopy(ours.model).eval()
    ours.train()
    policy = tiny_model().eval()
    loss = oracle_losses("sigmoid", policy, reference, masked_rows(), {"beta": 0.2}).mean()
    for parameter, gradient in zip(policy.parameters(), torch.autograd.grad(loss, [*policy.parameters()]), strict=True):
        parameter.data -= 0.1 * gradient
    assert logged(ours) == pytest.approx([loss.item(), held_out_loss(policy, reference)], abs=1e-5)
    expected = held_out_loss(ours.model.eval(), reference)
    found = [
        ours.evaluate()["eval_held_loss"],
        ours.evaluate(masked_data())["eval_loss"],
        ours.evaluate({"a": masked_data()})["eval_a_loss"],
        ours.evaluate(masked_data().to_iterable_dataset())["eval_loss"],
        ours.predict(masked_data()).metrics["test_loss"],
    ]
    assert found == pytest.approx([expected] * 5, abs=1e-5)


@pytest.mark.parametrize("data", ["dataset", "stream"])
def test_a_collator_that_heeds_no_masks_is_refused(data: str, tmp_path: Path) -> None:
    def collate(features: list[dict[str, Any]]) -> Any:
        return PaddedLayout(0)([{name: row[name] for name in ("prompt_ids", *SIDES)} for row in features])

    made: Any = masked_data() if data == "dataset" else masked_data().to_iterable_dataset()
    message = (
        r"'chosen_mask' of the train dataset .* \(function\) does not heed it: in row 0 it scores 6 tokens .* 4 of 6"
    )
    with pytest.raises(ValueError, match=message):
        run_of("full", tmp_path, made, data_collator=collate)
    run_of("full", tmp_path, masked_data().remove_columns([*SIDES.values()]), data_collator=collate)


def test_labels_of_a_user_s_metrics_are_whole_rows(tmp_path: Path) -> None:
    """What was seen and not scored is among them, but for what follows the last scored token."""
    seen: dict[str, Any] = {}

    def spy(prediction: Any) -> dict[str, float]:
        seen.update(logits=prediction.predictions, ids=prediction.label_ids)
        return {}

    for layout in LAYOUTS:
        policy = tiny_model()
        args = config(tmp_path, layout=layout, per_device_eval_batch_size=9)
        trainer(policy, args, compute_metrics=spy).evaluate(masked_data())
        rows = [(row, side) for side in SIDES for row in masked_rows()]
        for (row, side), ids, logits in zip(rows, seen["ids"], seen["logits"], strict=True):
            mask = row[SIDES[side]] or [1] * len(row[side])
            whole = row["prompt_ids"] + row[side][: max(n for n, flag in enumerate(mask, 1) if flag)]
            assert ids[: len(whole)].tolist() == whole
            assert not ids[len(whole) :].clip(0).any()
            expected = policy(torch.tensor([whole])).logits[0].detach()
            torch.testing.assert_close(torch.tensor(logits[: len(whole)]), expected, rtol=0, atol=1e-5)


# --- identity ---------------------------------------------------------------------------------------------------------


def stored(folder: Path, data: Dataset, caplog: pytest.LogCaptureFixture) -> str:
    """What a run that computes log-probs ahead says of those it found."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_of("full", folder, data, reference="precomputed")
    (line,) = [record.getMessage() for record in caplog.records if "found in the store" in record.getMessage()]
    return line


def test_the_store_knows_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ones are found as what has no mask, a tail that is not scored as what has none; any other mask is scored."""
    plain = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 11], "rejected_ids": [12, 13]}

    def data(**change: Any) -> Dataset:
        return Dataset.from_list([plain | change])

    assert "0 of 2 completions found" in stored(tmp_path, data(), caplog)
    assert "2 of 2 completions found" in stored(tmp_path, data(chosen_mask=[1, 1, 1, 1]), caplog)
    assert "2 of 2 completions found" in stored(
        tmp_path, data(rejected_ids=[12, 13, 14], rejected_mask=[1, 1, 0]), caplog
    )
    assert "1 of 2 completions found" in stored(tmp_path, data(chosen_mask=[1, 0, 1, 1]), caplog)
    assert "2 of 2 completions found" in stored(tmp_path, data(chosen_mask=[1, 0, 1, 1], rejected_mask=None), caplog)
    assert "1 of 2 completions found" in stored(tmp_path, data(chosen_mask=[1, 1, 0, 1]), caplog)


def test_sums_of_a_user_are_over_scored_tokens(tmp_path: Path) -> None:
    table, model = masked_rows(), tiny_model()
    with torch.no_grad():
        sums = {side: [float(scored_logps(model, row, side).sum()) for row in table] for side in SIDES}
    data = masked_data()
    data = data.add_column("ref_chosen_logps", sums["chosen_ids"]).add_column(
        "ref_rejected_logps", sums["rejected_ids"]
    )
    ours = run_of("full", tmp_path, data, reference="precomputed")
    assert isinstance(ours.reference.user_logps, UserLogps)
    assert_follows(ours, expected("full", "sigmoid"))
    with pytest.raises(ValueError, match="must be those of this run's reference"):
        run_of("full", tmp_path, data.select(range(5)).remove_columns([*SIDES.values()]), reference="precomputed")


def test_a_run_is_resumed_with_its_masks(tmp_path: Path) -> None:
    """With others it is another run; with masks of ones in the place of none it is the same."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = run_of("full", tmp_path / "whole", **saving)
    whole.train()
    run_of("full", tmp_path / "parts", **saving | {"max_steps": 2}).train()
    again = run_of("full", tmp_path / "parts", **saving)
    table = masked_rows()
    table[2]["chosen_mask"] = [1, 1, 0, 1, 0, 0]
    other = run_of("full", tmp_path / "parts", Dataset.from_list(table), **saving)
    with pytest.raises(ValueError, match="the training data"):
        other.train(resume_from_checkpoint=True)
    again.train(resume_from_checkpoint=True)
    assert logged(again) == logged(whole)
    table = masked_rows()
    table[5]["chosen_mask"] = [1, 1, 1, 1]
    run_of("full", tmp_path / "parts", Dataset.from_list(table), **saving).train(
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2")
    )
