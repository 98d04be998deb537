"""Metrics by source: in an evaluation set with a column `source`, each source's metrics are those of its rows alone."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EarlyStoppingCallback

from families import tiny_model
from holdfast import DataCollatorForPreference, DPOConfig, DPOTrainer
from holdfast.data.mixing.mixture import mix
from holdfast.data.mixing.source_column import MAX_SOURCES, NO_SOURCE, pairs_by_source
from holdfast.options.metric_names import EVAL_METRICS, METRICS_BY_SOURCE, metric_of_source
from policies import config, rows, trainer

NAMES = ["maths", "org/web pages", "Übung 1", "maths"]
"""With a slash, spaces and letters beyond ASCII; every other row is of maths."""


def with_sources(sources: list[Any], seed: int = 1) -> Dataset:
    return rows(len(sources), seed).add_column("source", sources)


def sourced(num_pairs: int = 11) -> Dataset:
    return with_sources([NAMES[row % len(NAMES)] for row in range(num_pairs)])


def moved(args: DPOConfig, model: str = "llama", **options: Any) -> DPOTrainer:
    """A trainer whose policy is no longer its reference, so that no metric is the same for all pairs."""
    made = trainer(tiny_model(model), args, **options)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        for parameter in made.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return made


def by_source(metrics: Mapping[str, float], prefix: str = "eval_") -> dict[str, dict[str, float]]:
    """By source, the metrics after their own names."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        of_source = metric_of_source(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if of_source is not None and not of_source.part:
            found.setdefault(of_source.source, {})[of_source.metric] = value
    return found


def of_rows(made: DPOTrainer, dataset: Dataset) -> dict[str, float]:
    """The metrics of these rows alone, without their sources."""
    metrics = made.evaluate(dataset.remove_columns("source"))
    return {name: metrics[f"eval_{name}"] for name in METRICS_BY_SOURCE if f"eval_{name}" in metrics}


def assert_those_of_the_rows_alone(made: DPOTrainer, dataset: Dataset, found: Mapping[str, Mapping[str, float]]):
    names = [name or NO_SOURCE for name in dataset["source"]]
    assert set(found) == set(names)
    for name in found:
        alone = of_rows(made, dataset.select([row for row, other in enumerate(names) if other == name]))
        assert found[name] == pytest.approx(alone, rel=2e-5, abs=2e-5), name


OPTIONS: list[dict[str, Any]] = [
    {},
    {"layout": "padded"},
    {"layout": "packed"},
    {"layout": "prefix_shared", "tokens_per_batch": 24},
    {"train_sampling_strategy": "group_by_length"},
    {"loss_type": ["sigmoid", "hinge"], "ld_alpha": 0.5, "loss_weights": [1.0, 0.5]},
    {"use_weighting": True},
    {"loss_type": "simpo"},
    {"precompute_ref_log_probs": True},
    {"reference_window": 2},
    {"dataloader_num_workers": 1, "layout": "padded"},
    {"remove_unused_columns": False},
    {"prediction_loss_only": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(map(str, options)) or "defaults")
def test_each_source_has_the_metrics_of_its_rows_alone(options: dict[str, Any], tmp_path: Path) -> None:
    dataset = sourced()
    made = moved(config(tmp_path, per_device_eval_batch_size=3, **options), eval_dataset=dataset)
    assert_those_of_the_rows_alone(made, dataset, by_source(made.evaluate(dataset)))


@pytest.mark.parametrize("layout", ["prefix_shared", "padded"])
def test_tokens_that_are_only_seen_do_not_count(layout: str, tmp_path: Path) -> None:
    def masked(row: dict[str, Any], index: int) -> dict[str, Any]:
        length = len(row["chosen_ids"])
        return {"chosen_mask": [0] * (length // 2) + [1] * (length - length // 2) if index % 3 else None}

    dataset = sourced().map(masked, with_indices=True, features=Features({
        **sourced().features, "chosen_mask": List(Value("int8"))
    }))  # fmt: skip
    made = moved(config(tmp_path, per_device_eval_batch_size=3, layout=layout))
    found = by_source(made.evaluate(dataset))
    assert_those_of_the_rows_alone(made, dataset, found)
    assert found != by_source(made.evaluate(sourced()))


def test_the_whole_is_the_mean_of_its_sources_by_their_pairs_and_tokens(tmp_path: Path) -> None:
    dataset = sourced()
    made = moved(config(tmp_path, per_device_eval_batch_size=4), model="qwen3_moe")
    metrics = made.evaluate(dataset)
    found, whole = by_source(metrics), {name: metrics[f"eval_{name}"] for name in METRICS_BY_SOURCE}
    weights: dict[str, Counter[str]] = {"pairs": Counter(), "chosen": Counter(), "rejected": Counter()}
    for row in made._preparation.of(dataset, "eval"):
        weights["pairs"][row["source"]] += 1
        weights["chosen"][row["source"]] += len(row["chosen_ids"])
        weights["rejected"][row["source"]] += len(row["rejected_ids"])
    weights["both"] = weights["chosen"] + weights["rejected"]
    over = {
        "entropy": "both",
        "logits/chosen": "chosen",
        "logits/rejected": "rejected",
        "mean_token_accuracy": "chosen",
    }
    for name in METRICS_BY_SOURCE:
        each = weights[over.get(name, "pairs")]
        mean = sum(each[source] * found[source][name] for source in found) / each.total()
        assert math.isclose(mean, whole[name], rel_tol=1e-5, abs_tol=1e-5), name


def test_the_whole_does_not_change(tmp_path: Path) -> None:
    dataset = sourced()
    made = moved(config(tmp_path, per_device_eval_batch_size=4))
    with_them, without = made.evaluate(dataset), made.evaluate(dataset.remove_columns("source"))
    assert not by_source(without)
    times = {f"eval_{name}" for name in EVAL_METRICS[-3:]}
    assert {name: with_them[name] for name in without if name not in times} == {
        name: value for name, value in without.items() if name not in times
    }


def test_of_several_sets_and_of_predictions(tmp_path: Path) -> None:
    sets = {"easy": sourced(6), "hard": with_sources(["maths", "code"] * 3), "plain": rows(5)}
    made = moved(config(tmp_path), eval_dataset=sets)
    metrics = made.evaluate()
    for name in ("easy", "hard"):
        part = {
            f"eval_{key.removeprefix(f'eval_{name}_')}": value for key, value in metrics.items() if f"_{name}_" in key
        }
        assert_those_of_the_rows_alone(made, sets[name], by_source(part))
    assert not any(metric_of_source(name) for name in metrics if "_plain_" in name)
    assert "eval_hard_rewards/margins/code" in metrics
    predicted = made.predict(sets["hard"]).metrics
    assert math.isclose(predicted["test_loss/code"], metrics["eval_hard_loss/code"], rel_tol=1e-6)


def test_of_a_stream_and_of_a_mixture(tmp_path: Path) -> None:
    parts = {"one": rows(5, 1), "two words": rows(4, 2)}
    mixture = mix(parts)
    streams = {name: part.to_iterable_dataset() for name, part in parts.items()}
    made = moved(config(tmp_path, per_device_eval_batch_size=2))
    found = by_source(made.evaluate(mixture))
    assert found.keys() == parts.keys()
    for name, part in parts.items():
        assert found[name] == pytest.approx(of_rows(made, part.add_column("source", ["x"] * len(part))), abs=2e-5)
    in_turns = by_source(made.evaluate(mix(streams)))
    assert {name: pytest.approx(values, abs=2e-5) for name, values in found.items()} == in_turns


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["a", None, "", "a", None, None, None], {"a": 2, NO_SOURCE: 5}),
        (["a"] * 4, {"a": 4}),
        ([None] * 4, None),
        (["", ""], None),
        ([" a", "a", "a ", "A"], {" a": 1, "a": 1, "a ": 1, "A": 1}),
        (["loss", "eval_loss/x", "rewards/margins"], {"loss": 1, "eval_loss/x": 1, "rewards/margins": 1}),
        ([f"site {row}" for row in range(MAX_SOURCES)], {f"site {row}": 1 for row in range(MAX_SOURCES)}),
    ],
)  # fmt: skip
def test_which_sources_there_are(sources: list[Any], expected: dict[str, int] | None, tmp_path: Path) -> None:
    dataset = with_sources(sources)
    assert pairs_by_source(dataset) == expected
    made = moved(config(tmp_path, per_device_eval_batch_size=2))
    found = by_source(made.evaluate(dataset))
    assert set(found) == set(expected or ())
    if expected and len(expected) < 5:
        assert_those_of_the_rows_alone(made, dataset, found)
    of_stream = by_source(made.evaluate(dataset.to_iterable_dataset()))
    assert {name: pytest.approx(values, abs=2e-5) for name, values in found.items()} == of_stream


UNUSED: list[tuple[list[Any], str]] = [
    ([f"https://site.org/{row}" for row in range(MAX_SOURCES + 1)], "has more than 50 different texts"),
    ([3, 3, 4], "is int64 and not text"),
    ([["a"], ["b"], []], "is List and not text"),
    ([{"site": "a"}, {"site": "b"}, {"site": "c"}], "is dict and not text"),
]


@pytest.mark.parametrize(("sources", "reason"), UNUSED)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_column_that_is_not_used_is_said_once(
    sources: list[Any], reason: str, is_stream: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset: Any = with_sources(sources)
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    made = moved(config(tmp_path))
    for _ in range(2):
        assert not by_source(made.evaluate(dataset))
    said = [record.message for record in caplog.records if "metrics by source" in record.message]
    expected = "is not text" if is_stream and "text" in reason and "different" not in reason else reason
    assert said == [f"The column 'source' of the data of the evaluation {expected}: no metrics by source."]


def test_nothing_is_gathered_without_the_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = moved(config(tmp_path))
    monkeypatch.setattr("holdfast.metrics.gather_object", None)
    monkeypatch.setattr("holdfast.training.by_source.WithSources", None)
    made.evaluate(rows(5))


READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "repeat_interleave", "bincount"}


class Reads(TorchDispatchMode):
    """Counts the operations that a GPU would be waited for."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [i for i in (args[1] if func._schema.name == "aten::index" else []) if i is not None]
        self.num += func._schema.name.removeprefix("aten::") in READS or any(mask.dtype == torch.bool for mask in masks)
        return func(*args, **(kwargs or {}))


def test_a_batch_waits_for_nothing(tmp_path: Path) -> None:
    """What is read for the sources does not grow with the batches."""
    made = moved(config(tmp_path, per_device_eval_batch_size=2))
    extra = []
    for num_pairs in (4, 16):
        counts = []
        for dataset in (sourced(num_pairs), rows(num_pairs, 1)):
            with Reads() as reads:
                made.evaluate(dataset)
            counts.append(reads.num)
        extra.append(counts[0] - counts[1])
    assert extra[0] == extra[1]


class Collator(DataCollatorForPreference):
    """A user's own, which takes all columns of its rows, and may leave the last out."""

    num_left_out = 0

    def torch_call(self, features: Any) -> dict[str, Any]:
        assert {"prompt_ids", "chosen_ids", "rejected_ids"} == set(features[0])
        return super().torch_call(features[: len(features) - self.num_left_out])


def test_a_collator_of_ones_own(tmp_path: Path) -> None:
    dataset = sourced()
    made = moved(
        config(tmp_path, per_device_eval_batch_size=3), data_collator=DataCollatorForPreference(pad_token_id=0)
    )
    found = by_source(made.evaluate(dataset))
    assert_those_of_the_rows_alone(made, dataset, found)


def test_the_source_is_in_no_content_id_and_no_input(tmp_path: Path) -> None:
    dataset = sourced()
    seen: dict[bool, list[Any]] = {}
    for has_source in (True, False):
        made = moved(config(tmp_path))
        loader = made.get_eval_dataloader(made._preparation.of(dataset if has_source else rows(11, 1), "eval"))
        batches = [made._pair_batch(tensors) for tensors in loader]
        assert all((batch.host_sources is not None) == has_source for batch in batches)
        seen[has_source] = [(batch.content_ids(), sorted(batch.inputs)) for batch in batches]
    assert seen[True] == seen[False]


def test_with_compute_metrics(tmp_path: Path) -> None:
    dataset = sourced()

    def compute(prediction: Any) -> dict[str, float]:
        return {"rows": float(len(prediction.predictions))}

    made = moved(config(tmp_path, per_device_eval_batch_size=3), compute_metrics=compute)
    metrics = made.evaluate(dataset)
    assert metrics["eval_rows"] == 2 * len(dataset)
    found = by_source(metrics)
    assert_those_of_the_rows_alone(made, dataset, found)


@pytest.mark.parametrize(
    "loss_type", [["sigmoid", "sft"], "orpo", "cpo", "aot", "aot_unpaired", "alpha_dpo", "beta_dpo"]
)
def test_losses_of_a_batch_are_those_of_the_source_alone(loss_type: Any, tmp_path: Path) -> None:
    """They sort the batch or average over its tokens, so here all rows are one batch."""
    dataset = sourced()
    made = moved(config(tmp_path, per_device_eval_batch_size=len(dataset), loss_type=loss_type))
    assert_those_of_the_rows_alone(made, dataset, by_source(made.evaluate(dataset)))


# The best model -----------------------------------------------------------------------------------------------------


def best(folder: Path, metric: str, **options: Any) -> DPOConfig:
    defaults = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    return config(folder, metric_for_best_model=metric, load_best_model_at_end=True, **defaults | options)


@pytest.mark.parametrize(
    ("metric", "choose"),
    [
        ("eval_rewards/accuracies/maths", max),
        ("loss/maths", min),
        ("eval_rewards/margins/weight_loss", max),
        ("aux_loss/org/web pages", min),
    ],
)  # fmt: skip
def test_the_best_model_by_a_source(metric: str, choose: Callable[..., float], tmp_path: Path) -> None:
    """transformers goes by the end of a metric's name: a source called so must not turn the choice around."""
    dataset = with_sources(["maths", "weight_loss", "org/web pages"] * 3)
    args = best(tmp_path, metric, learning_rate=5e-2, save_total_limit=None)
    assert args.greater_is_better == (choose is max)
    model = tiny_model("qwen3_moe") if "aux" in metric else tiny_model()
    made = trainer(model, args, eval_dataset=dataset)
    made.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    values = [entry[name] for entry in made.state.log_history if name in entry]
    assert len(values) == 3
    assert made.state.best_metric == choose(values)


def test_the_direction_that_was_asked_for_stays(tmp_path: Path) -> None:
    assert best(tmp_path, "loss/maths", greater_is_better=True).greater_is_better is True
    assert best(tmp_path, "rewards/margins/x", greater_is_better=False).greater_is_better is False


def test_early_stopping_by_a_source(tmp_path: Path) -> None:
    args = best(tmp_path, "eval_loss/maths", learning_rate=0.0, max_steps=8)
    made = trainer(tiny_model(), args, eval_dataset=sourced(), callbacks=[EarlyStoppingCallback(2)])
    made.train()
    assert made.state.global_step == 3  # the first evaluation is the best, two more are no better


@pytest.mark.parametrize(
    ("metric", "eval_dataset", "message"),
    [
        ("loss/math", sourced(), r"'loss/math' was asked for.*Did you mean 'loss/maths'.*each source, after a"),
        ("loss/maths", rows(3), r"'loss/maths' was asked for, but an evaluation here gives no such metric"),
        ("num_tokens/maths", sourced(), r"gives no such metric"),
        ("loss/maths", {"easy": sourced()}, r"Did you mean 'easy_loss/maths'"),
        ("hard_loss/maths", {"easy": sourced(), "hard": rows(3)}, r"gives no such metric. Did you mean"),
    ],
)  # fmt: skip
def test_a_metric_of_a_source_that_there_is_not(metric: str, eval_dataset: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), best(tmp_path, metric), eval_dataset=eval_dataset)


@pytest.mark.parametrize(
    ("metric", "eval_dataset"),
    [
        ("eval_loss/org/web pages", sourced()),
        ("easy_logps/chosen/maths", {"easy": sourced()}),
        ("loss/anything", sourced().to_iterable_dataset()),
    ],
)  # fmt: skip
def test_a_metric_of_a_source_is_known(metric: str, eval_dataset: Any, tmp_path: Path) -> None:
    made = trainer(tiny_model(), best(tmp_path, metric), eval_dataset=eval_dataset)
    assert isinstance(made.eval_dataset, dict | Dataset | IterableDataset)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eval_loss/maths", ("", "loss", "maths")),
        ("loss/a/b", ("", "loss", "a/b")),
        ("easy_rewards/margins/x_loss/y", ("easy", "rewards/margins", "x_loss/y")),
        ("my_loss_loss/x", ("my_loss", "loss", "x")),
        ("eval_aux_loss/x", ("", "aux_loss", "x")),
        ("eval_logps/chosen/loss/z", ("", "logps/chosen", "loss/z")),
        ("eval_rewards/margins", None),
        ("eval_loss", None),
        ("accuracy/maths", None),
    ],
)  # fmt: skip
def test_names_are_read_back(name: str, expected: tuple[str, str, str] | None) -> None:
    assert metric_of_source(name) == expected
