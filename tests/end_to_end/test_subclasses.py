"""Subclasses of the trainer as scripts have them: a loss of their own, read from `inputs` with the common keys.

Each is followed by a naive loop that forms the same loss from unpadded rows. The batches are known, since rows come in
their order.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from families import tiny_model
from holdfast import DataCollatorForPreference, DPOTrainer
from naive import BETA, LEARNING_RATE, Row, logp, naive_loss
from policies import POLICIES, config, logged, rows, tiny_tokenizer

COMMON_KEYS = {"input_ids", "attention_mask", "completion_mask"}
IN_ORDER = {"train_sampling_strategy": "sequential"}


def made(kind: type[DPOTrainer], folder: Path, policy: nn.Module | None = None, **options: Any) -> Any:
    """A trainer of the class, on rows in their order; options of the trainer itself are told apart by name."""
    own = {name: options.pop(name) for name in ("data_collator", "compute_metrics", "eval_dataset") if name in options}
    return kind(
        policy if policy is not None else tiny_model(),
        args=config(folder, **IN_ORDER | options),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        **own,
    )


# --- what a subclass adds to the loss, and the same from unpadded rows --------------------------------------------


class WithCrossEntropy(DPOTrainer):
    """The first half of the rows are the chosen ones: their mean negative log-likelihood, prompt and all."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, mask = (inputs[name][: len(inputs["input_ids"]) // 2] for name in ("input_ids", "attention_mask"))
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        term = 0.1 * nn.functional.cross_entropy(logits[mask[:, 1:] == 1], ids[:, 1:][mask[:, 1:] == 1])
        return (result[0] + term, result[1]) if return_outputs else result + term


def cross_entropy_added(policy: nn.Module, reference: nn.Module, batch: list[Row]) -> Tensor:
    values = []
    for row in batch:
        ids = torch.tensor(row["prompt_ids"] + row["chosen_ids"])
        values.append(-policy(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
    return naive_loss(policy, reference, batch) + 0.1 * torch.cat(values).mean()


def sums_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probs of the completions as scripts form them, from every key that is none of those known not to be the
    model's."""
    others = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
    logits = model(**{name: value for name, value in inputs.items() if name not in others}).logits[:, :-1]
    mask = inputs["completion_mask"][:, 1:]
    per_token = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return (per_token * mask).sum(1)


class OwnLoss(DPOTrainer):
    """The whole loss is the script's: from `completion_mask`, with `self.ref_model`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        chosen, rejected = sums_of(model, inputs).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = sums_of(self.ref_model, inputs).chunk(2)
        margins = (chosen - ref_chosen) - (rejected - ref_rejected)
        loss = -nn.functional.logsigmoid(self.beta * margins).mean()
        return (loss, {"rewards": margins}) if return_outputs else loss


class OwnLossAhead(DPOTrainer):
    """The same where the reference is scored ahead: its log-probs come with the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        chosen, rejected = sums_of(model, inputs).chunk(2)
        margins = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        return -nn.functional.logsigmoid(self.beta * margins).mean() + 0 * super().compute_loss(model, inputs)


class WithoutLastToken(DPOTrainer):
    """Edits the mask before the loss is computed: the last token of the longer completions is not scored."""

    def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
        mask = inputs["completion_mask"].clone()
        last = inputs["attention_mask"].sum(1) - 1
        several = mask.sum(1) > 1
        mask[torch.arange(len(mask))[several], last[several]] = 0
        return super().compute_loss(model, inputs | {"completion_mask": mask}, *args, **kwargs)


def without_last_token(policy: nn.Module, reference: nn.Module, batch: list[Row]) -> Tensor:
    sides = ("chosen_ids", "rejected_ids")
    cut = [row | {side: row[side][:-1] if len(row[side]) > 1 else row[side] for side in sides} for row in batch]
    return naive_loss(policy, reference, cut)


class Mixin:
    """Any class before `DPOTrainer` may override it."""

    keys: set[str]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.keys = set(args[1])
        return super().compute_loss(*args, **kwargs)  # type: ignore[misc]


def scaled(policy: nn.Module, reference: nn.Module, batch: list[Row]) -> Tensor:
    return 0.5 * naive_loss(policy, reference, batch)


class Halved(DPOTrainer):
    def compute_loss(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        result = super().compute_loss(*args, **kwargs)
        return (0.5 * result[0], result[1]) if isinstance(result, tuple) else 0.5 * result


NaiveLoss = Callable[[nn.Module, nn.Module, list[Row]], Tensor]
TABLE: dict[str, tuple[type[DPOTrainer], NaiveLoss, dict[str, Any]]] = {
    "super() and cross entropy of the chosen rows": (WithCrossEntropy, cross_entropy_added, {}),
    "padded rows by name": (WithCrossEntropy, cross_entropy_added, {"layout": "padded"}),
    "its own loss with self.ref_model": (OwnLoss, naive_loss, {}),
    "reference scored ahead": (OwnLossAhead, naive_loss, {"precompute_ref_log_probs": True}),
    "reference read ahead in windows": (WithCrossEntropy, cross_entropy_added, {"reference": "snapshot"}),
    "its own keys in a window": (Halved, scaled, {"reference": "model", "reference_window": 2}),
    "an edited mask": (WithoutLastToken, without_last_token, {}),
    "an edited mask in a window": (WithoutLastToken, without_last_token, {"reference_window": 2}),
    "arguments handed on": (Halved, scaled, {}),
}


def naive_losses(loss_of: NaiveLoss, num_steps: int = 4, size: int = 3) -> list[float]:
    policy = tiny_model().eval()
    reference, table = copy.deepcopy(policy), rows().to_list()
    losses = []
    for step in range(num_steps):
        loss = loss_of(policy, reference, table[size * step : size * (step + 1)])
        losses.append(loss.item())
        for p, gradient in zip(policy.parameters(), torch.autograd.grad(loss, list(policy.parameters())), strict=True):
            p.data -= LEARNING_RATE * gradient
    return losses


@pytest.mark.parametrize("name", TABLE)
def test_a_loss_of_its_own_follows_a_naive_loop(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, loss_of, options = TABLE[name]
    ours = made(kind, tmp_path, **options)
    ours.train()
    assert logged(ours) == pytest.approx(naive_losses(loss_of), rel=2e-5, abs=2e-6)
    said = [record.message for record in caplog.records if record.message.startswith("layout: padded")]
    assert len(said) == (0 if "layout" in options else 1)


@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_that_masks_leave_out_are_not_in_the_completion_mask(ahead: bool, tmp_path: Path) -> None:
    """The script's own loss from `completion_mask` is that of `DPOTrainer` on the same rows."""
    table = rows().to_list()
    for number, row in enumerate(table):
        for side in ("chosen", "rejected"):
            mask = [int((place + number) % 3 > 0) for place in range(len(row[f"{side}_ids"]))]
            row[f"{side}_mask"] = mask if any(mask) else [1] * len(mask)
    masked = Dataset.from_list(table)
    own, plain = (
        kind(
            tiny_model(), args=config(tmp_path, **IN_ORDER, precompute_ref_log_probs=ahead), train_dataset=masked,
            processing_class=tiny_tokenizer(),
        )
        for kind in (OwnLossAhead if ahead else OwnLoss, DPOTrainer)
    )  # fmt: skip
    own.train()
    plain.train()
    assert logged(own) == pytest.approx(logged(plain), rel=2e-5, abs=2e-6)
    with_all = made(OwnLoss, tmp_path)
    with_all.train()
    assert logged(own)[-1] != pytest.approx(logged(with_all)[-1], rel=1e-3)


def test_a_mixin_is_seen(tmp_path: Path) -> None:
    kind = type("Mixed", (Mixin, DPOTrainer), {})

    ours = made(kind, tmp_path, max_steps=1)
    ours.train()
    assert ours.keys == COMMON_KEYS


def test_a_method_that_is_assigned_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On the trainer after it was made: it gets the run's own rows; with layout='padded' these have the common keys."""
    seen: list[set[str]] = []
    for layout in ("auto", "padded"):
        ours = made(DPOTrainer, tmp_path, layout=layout, max_steps=1)
        plain = ours.compute_loss

        def recorded(model: Any, inputs: dict[str, Tensor], plain: Any = plain, **kwargs: Any) -> Any:
            seen.append(set(inputs))
            return plain(model, inputs, **kwargs)

        ours.compute_loss = recorded
        ours.train()
        ours.compute_loss = plain
        ours.train()
    assert not seen[0] >= COMMON_KEYS
    assert seen[1] >= COMMON_KEYS
    said = [record.message for record in caplog.records if "was assigned to the trainer" in record.message]
    assert [line.partition("layout ")[2].partition(",")[0] for line in said] == ["'prefix_shared'", "'padded'"]


def test_a_class_that_is_patched_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = DPOTrainer.compute_loss, []

    def patched(self: Any, model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
        seen.append(set(inputs))
        return plain(self, model, inputs, **kwargs)

    monkeypatch.setattr(DPOTrainer, "compute_loss", patched)
    made(DPOTrainer, tmp_path, max_steps=1).train()
    assert seen == [COMMON_KEYS]


def test_an_evaluation_reports_the_loss_that_a_subclass_returned(tmp_path: Path) -> None:
    """As a mean over pairs: 5 pairs in batches of 3 and 2."""
    held_out = rows(5, seed=1)
    policy, table = tiny_model().eval(), held_out.to_list()
    for metrics in (None, lambda given: {"rows": len(given.predictions)}):
        ours = made(
            WithCrossEntropy, tmp_path, eval_dataset=held_out, compute_metrics=metrics, per_device_eval_batch_size=3
        )
        found = ours.evaluate()
        parts = [cross_entropy_added(policy, policy, part).item() for part in (table[:3], table[3:])]
        assert found["eval_loss"] == pytest.approx((3 * parts[0] + 2 * parts[1]) / 5, rel=1e-5)
        assert found["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
        assert metrics is None or found["eval_rows"] == 10


def test_outputs_have_the_rows_of_the_batch(tmp_path: Path) -> None:
    """`return_outputs=True` gives logits of `inputs["input_ids"]`, row by row."""
    shapes = []

    class Looks(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            with torch.no_grad():
                again = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            shapes.append((tuple(outputs.logits.shape[:2]), tuple(inputs["input_ids"].shape)))
            assert torch.equal(outputs.logits, again)
            return (loss, outputs) if return_outputs else loss

    made(Looks, tmp_path).train()
    assert len(shapes) == 4
    assert all(of_logits == of_ids and of_ids[0] == 6 for of_logits, of_ids in shapes)


def test_the_loss_of_a_wrapper_is_that_of_padded_rows(tmp_path: Path) -> None:
    """A class that only wraps may keep the layout that shares prompts."""

    class Wraps(DPOTrainer):
        reads_any_layout = True

        def compute_loss(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super().compute_loss(*args, **kwargs)

    for layout in ("auto", "packed"):
        ours = made(Wraps, tmp_path, layout=layout)
        ours.train()
        assert ours.data_collator.name == ("prefix_shared" if layout == "auto" else "packed")
        assert logged(ours) == pytest.approx(naive_losses(naive_loss), rel=2e-5)


@pytest.mark.parametrize("kind", ["lora_sft", pytest.param("lora_fresh", marks=pytest.mark.nightly)])
def test_a_subclass_of_an_adapter_run(kind: str, tmp_path: Path) -> None:
    """Half the loss, for a reference that is an adapter of the policy."""
    halved, plain = (made(each, tmp_path, POLICIES[kind](), learning_rate=0.0) for each in (Halved, DPOTrainer))
    halved.train()
    plain.train()
    assert [2 * loss for loss in logged(halved)] == pytest.approx(logged(plain), rel=1e-5)


# --- other hooks that get batches ---------------------------------------------------------------------------------


def test_steps_of_a_subclass_get_the_common_keys(tmp_path: Path) -> None:
    seen: list[tuple[str, set[str]]] = []

    class Steps(DPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            seen.append(("train", set(inputs)))
            return super().training_step(model, inputs, num_items_in_batch)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # type: ignore[no-untyped-def]
            seen.append(("eval", set(inputs)))
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    ours = made(Steps, tmp_path, max_steps=1, eval_dataset=rows(3, seed=1))
    ours.train()
    ours.evaluate()
    assert seen == [("train", COMMON_KEYS), ("eval", COMMON_KEYS)]


def test_a_data_loader_of_its_own(tmp_path: Path) -> None:
    """Rows that are padded on the left, and not in the run's layout: with positions of their own all the same."""

    class Loads(DPOTrainer):
        def get_train_dataloader(self):  # type: ignore[no-untyped-def]
            collate = DataCollatorForPreference(pad_token_id=0)

            def left(features):  # type: ignore[no-untyped-def]
                batch = collate(features)
                longest = batch["input_ids"].shape[1]
                for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                    for value in batch.values():
                        value[row] = value[row].roll(longest - length)
                return batch

            columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
            dataset: Any = self.train_dataset.select_columns(columns)
            return self.accelerator.prepare(DataLoader(dataset, batch_size=3, collate_fn=left))

    ours = made(Loads, tmp_path)
    ours.train()
    assert logged(ours) == pytest.approx(naive_losses(naive_loss), rel=2e-5)


def test_an_evaluation_loop_of_its_own(tmp_path: Path) -> None:
    class Loops(DPOTrainer):
        def evaluation_loop(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_length"] = float(output.num_samples)
            return output

    ours, plain = (made(kind, tmp_path, eval_dataset=rows(5, seed=1)) for kind in (Loops, DPOTrainer))
    expected = plain.evaluate()["eval_loss"]
    assert ours.evaluate()["eval_loss"] == expected


def test_functions_about_metrics_get_padded_rows(tmp_path: Path) -> None:
    """`preprocess_logits_for_metrics` gets the logits and ids of a row for each completion, whatever the layout."""
    shapes: list[tuple[int, ...]] = []

    def top1(logits: Tensor, labels: Tensor) -> Tensor:
        shapes.extend([tuple(logits.shape[:2]), tuple(labels.shape)])
        return logits.argmax(-1)

    held_out = rows(5, seed=1)
    ours = DPOTrainer(
        tiny_model(),
        args=config(tmp_path, per_device_eval_batch_size=5),
        train_dataset=rows(),
        eval_dataset=held_out,
        processing_class=tiny_tokenizer(),
        compute_metrics=lambda given: {"right": float((given.predictions[:, :-1] == given.label_ids[:, 1:]).sum())},
        preprocess_logits_for_metrics=top1,
    )
    found, model = ours.evaluate(), ours.model
    right = 0
    for row in held_out.to_list():
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor(row["prompt_ids"] + row[side])
            right += int((model(ids[None]).logits[0, :-1].argmax(-1) == ids[1:]).sum())
    assert len(set(shapes)) == 1
    assert found["eval_right"] >= right  # padding may be predicted as well


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "packed"}, "layout='packed' was asked for, but Halved overrides compute_loss, .*reads_any_layout"),
        ({"layout": "prefix_shared"}, "layout='prefix_shared' was asked for, but Halved overrides compute_loss"),
        ({"padding_free": True}, "padding_free=True was asked for, but Halved overrides compute_loss"),
        ({"tokens_per_batch": 99}, "tokens_per_batch=99 .* overrides compute_loss, which may compute a whole batch"),
    ],
)
def test_rows_that_a_subclass_could_not_read(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        made(Halved, tmp_path, **options)


def test_log_probs_of_the_reference_are_not_replaced(tmp_path: Path) -> None:
    class Replaces(DPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
            inputs["ref_chosen_logps"] = inputs["ref_chosen_logps"] - 1
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(ValueError, match="was handed another 'ref_chosen_logps' than the batch had"):
        made(Replaces, tmp_path, precompute_ref_log_probs=True).train()


def test_a_function_for_the_loss_is_not_ignored(tmp_path: Path) -> None:
    ours = made(DPOTrainer, tmp_path)
    ours.compute_loss_func = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(ValueError, match=r"`compute_loss_func` was set, .* override `compute_loss`"):
        ours.train()


def test_methods_with_the_parameters_of_older_versions_are_named_at_once() -> None:
    message = (
        r"(?s)OldLoss overrides methods.*compute_loss: it is called with \(model, inputs, num_items_in_batch, "
        r"return_outputs\).*training_step: it is called with .*evaluation_loop: .*metric_key_prefix.*log: it is called"
    )
    with pytest.raises(TypeError, match=message):

        class OldLoss(DPOTrainer):
            def compute_loss(self, model, inputs, return_outputs=False):  # type: ignore[no-untyped-def]
                return super().compute_loss(model, inputs, return_outputs)

            def training_step(self, model, inputs):  # type: ignore[no-untyped-def]
                return super().training_step(model, inputs)

            def evaluation_loop(self, dataloader, description):  # type: ignore[no-untyped-def]
                return super().evaluation_loop(dataloader, description)

            def log(self, logs):  # type: ignore[no-untyped-def]
                super().log(logs)


def test_a_callback_that_reads_batches(tmp_path: Path) -> None:
    """With layout='padded' the batches of a data loader have the common keys, among others."""
    keys: list[set[str]] = []

    class Reads(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
            keys.append(set(next(iter(train_dataloader))))

    ours = made(DPOTrainer, tmp_path, layout="padded", max_steps=1)
    ours.add_callback(Reads())
    ours.train()
    assert keys[0] >= COMMON_KEYS


def test_logp_is_that_of_the_common_keys() -> None:
    """The sums that the table's own losses form are the oracle's."""
    table, model = rows(2).to_list(), tiny_model()
    sums = sums_of(model, DataCollatorForPreference(pad_token_id=0)(table))
    expected = [logp(model, row, side).item() for side in ("chosen_ids", "rejected_ids") for row in table]
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)
    assert BETA == 0.2
