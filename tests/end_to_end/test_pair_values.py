"""A weight and a margin for each pair, in columns that a run names, against losses written out and against other runs.

The rows are those of `policies`; a pair of weight 0 must count for nothing, and two pairs of weight 1/2 as one that is
seen twice as seldom.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from families import tiny_model
from holdfast import DataCollatorForPreference
from holdfast.inspect.data import inspect_data
from holdfast.losses import LOSSES
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, rows, tiny_tokenizer, trainer

PLAIN_SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
IN_ORDER = {"train_sampling_strategy": "sequential"}
WEIGHTS, MARGINS = [2.0, 0.0, 0.5, 1.0], [0.5, -1.0, 0.0, 2.0]


def with_columns(num_rows: int = 4, **columns: list[Any]) -> Dataset:
    dataset = rows(num_rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, [values[i % len(values)] for i in range(num_rows)])
    return dataset


def ran(folder: Path, dataset: Any, policy: Any = None, **options: Any) -> Any:
    defaults = {**PLAIN_SGD, **IN_ORDER, "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1}
    made = trainer(policy or tiny_model(), config(folder, **defaults | options), train_dataset=dataset)
    made.train()
    return made


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_first_losses_by_hand(tmp_path: Path) -> None:
    """At the first step m = 0. Weights 2, 0, 1/2 and 1: the mean of w ln 2 is 0.875 ln 2. Margins 1/2, -1, 0 and 2: the
    mean of -log sigma(-margin) = log(1 + e^margin). Both: the mean of their products."""
    dataset = with_columns(weight=WEIGHTS, margin=MARGINS)
    weighted = ran(tmp_path / "w", dataset, max_steps=1, weight_column="weight")
    assert logged(weighted)[0] == pytest.approx(0.875 * math.log(2), abs=1e-6)
    apart = ran(tmp_path / "m", dataset, max_steps=1, margin_column="margin")
    assert logged(apart)[0] == pytest.approx(sum(map(softplus, MARGINS)) / 4, abs=1e-6)
    both = ran(tmp_path / "b", dataset, max_steps=1, weight_column="weight", margin_column="margin")
    products = [w * softplus(m) for w, m in zip(WEIGHTS, MARGINS, strict=True)]
    assert logged(both)[0] == pytest.approx(sum(products) / 4, abs=1e-6)
    assert logged(both, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)


def test_columns_that_no_option_names_change_nothing(tmp_path: Path) -> None:
    plain = ran(tmp_path / "plain", rows(4))
    named = ran(tmp_path / "named", with_columns(weight=WEIGHTS, margin=MARGINS))
    assert digest(plain.model.named_parameters()) == digest(named.model.named_parameters())
    assert logged(plain) == logged(named)


def test_weights_of_one_and_margins_of_zero_change_nothing(tmp_path: Path) -> None:
    plain = ran(tmp_path / "plain", rows(4))
    options = {"weight_column": "w", "margin_column": "m"}
    named = ran(tmp_path / "named", with_columns(w=[1], m=[0]), **options)  # whole numbers are numbers
    assert digest(plain.model.named_parameters()) == digest(named.model.named_parameters())


def test_a_pair_of_weight_zero_counts_for_nothing(tmp_path: Path) -> None:
    """Of four pairs two have weight 0: the steps are those of the other two alone at half the learning rate, since the
    mean runs over all four."""
    half = ran(tmp_path / "half", with_columns(w=[1.0, 1.0, 0.0, 0.0]), weight_column="w")
    alone = ran(tmp_path / "alone", rows(4).select([0, 1]), per_device_train_batch_size=2, learning_rate=0.05)
    for ours, theirs in zip(half.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {"layout": "packed"},
    "prefix_shared": {"layout": "prefix_shared"},
    "stored": {"precompute_ref_log_probs": True},
    "window": {"reference_window": 2},
    "parts": {"tokens_per_batch": 64},
    "wide rows": {"remove_unused_columns": False},
    "collator": {"data_collator": DataCollatorForPreference(pad_token_id=0)},
    "stream": {"is_stream": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_trains_alike(variant: str, tmp_path: Path) -> None:
    """Eight rows in batches of four, against padded rows with a live reference."""
    options = {"weight_column": "w", "margin_column": "m", "max_steps": 4}
    dataset = with_columns(8, w=[2.0, 0.0, 0.5, 1.0, 3.0], m=[0.5, -1.0, 0.0])
    plain = ran(tmp_path / "plain", dataset, layout="padded", **options)
    changed = dict(VARIANTS[variant])
    is_stream, collator = changed.pop("is_stream", False), changed.pop("data_collator", None)
    defaults = {**PLAIN_SGD, **IN_ORDER, "per_device_train_batch_size": 4, "logging_steps": 1}
    data: Any = dataset.to_iterable_dataset() if is_stream else dataset
    args = config(tmp_path / "other", **defaults | options | changed)
    other = trainer(tiny_model(), args, train_dataset=data, data_collator=collator)
    other.train()
    assert logged(other) == pytest.approx(logged(plain), abs=1e-5)
    for ours, theirs in zip(other.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_evaluation_counts_as_training_does(tmp_path: Path) -> None:
    """Where the evaluation set has the columns they count; where it has none, each pair counts once, to reach 0."""
    options = {"weight_column": "weight", "margin_column": "margin"}
    dataset = with_columns(weight=WEIGHTS, margin=MARGINS)
    args = config(tmp_path, per_device_eval_batch_size=4, **options)
    made = trainer(tiny_model(), args, train_dataset=dataset, eval_dataset={"with": dataset, "without": rows(4)})
    metrics = made.evaluate()
    products = [w * softplus(m) for w, m in zip(WEIGHTS, MARGINS, strict=True)]
    assert metrics["eval_with_loss"] == pytest.approx(sum(products) / 4, abs=1e-6)
    assert metrics["eval_without_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_resuming_with_other_weights_is_refused(tmp_path: Path) -> None:
    options = {"weight_column": "w", "save_strategy": "steps", "save_steps": 1}
    ran(tmp_path, with_columns(w=WEIGHTS), max_steps=2, **options)
    args = config(tmp_path, **PLAIN_SGD, per_device_train_batch_size=4, max_steps=4, **options)
    other = trainer(tiny_model(), args, train_dataset=with_columns(w=[1.0]))
    with pytest.raises(ValueError, match="differs in the training data"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reads_margins])
def test_each_loss_that_reads_margins_asks_for_more(name: str, tmp_path: Path) -> None:
    """A larger margin costs more at the same policy, and costs nothing else."""

    def first(folder: str, **options: Any) -> float:
        return logged(ran(tmp_path / folder, with_columns(**options), max_steps=1, loss_type=name, **names(options)))[0]

    def names(columns: dict[str, Any]) -> dict[str, str]:
        return {"margin_column": "m"} if columns else {}

    less, plain, zero, more = first("less", m=[-0.5]), first("plain"), first("zero", m=[0.0]), first("more", m=[1.5])
    assert zero == pytest.approx(plain, abs=1e-6)
    assert less < plain < more


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "no such column": ({"weight_column": "wait"}, {"w": [1.0]}, r"weight_column='wait' was asked for; found no such"),
    "negative": ({"weight_column": "w"}, {"w": [1.0, -2.0]}, r"of at least 0, .*row 1 of the train dataset has -2\.0"),
    "not finite": ({"margin_column": "m"}, {"m": [0.0, math.inf]}, r"row 1 of the train dataset has inf\. Correct"),
    "missing": ({"margin_column": "m"}, {"m": [0.5, None, 0.5, 1.0]}, r"row 1 of the train dataset has None"),
    "text": ({"weight_column": "w"}, {"w": ["1", "2"]}, r"row 0 of the train dataset has '1'"),
    "truth": ({"weight_column": "w"}, {"w": [True, False]}, r"row 0 of the train dataset has True"),
    "nothing": ({"weight_column": "w"}, {"w": [0.0]}, r"all rows of the train dataset have 0, so nothing would"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_anything_is_scored(case: str, tmp_path: Path) -> None:
    options, columns, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), config(tmp_path, **options), train_dataset=with_columns(**columns))


def test_the_report_on_the_data_refuses_what_the_run_would(tmp_path: Path) -> None:
    args, tokenizer = config(tmp_path, weight_column="w"), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"row 1 of the train dataset has -2\.0"):
        inspect_data(tiny_model(), args, with_columns(w=[1.0, -2.0]), None, tokenizer)
    assert inspect_data(tiny_model(), args, with_columns(w=[1.0]), rows(3), tokenizer).datasets[0].numbers.num_rows == 4


def test_a_stream_is_refused_as_it_is_read(tmp_path: Path) -> None:
    stream = with_columns(w=[1.0, -1.0]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"weight_column='w' says how much each pair counts.*a row has -1\.0"):
        ran(tmp_path, stream, weight_column="w")
    assert isinstance(stream, IterableDataset)


def test_a_stream_of_arrays_is_one_of_numbers(tmp_path: Path) -> None:
    """A format of numpy makes scalars of the numbers, and arrays of the token ids."""
    stream = with_columns(w=WEIGHTS).to_iterable_dataset()
    plain, formatted = (
        ran(tmp_path / name, each, max_steps=1, weight_column="w")
        for name, each in (("plain", stream), ("arrays", stream.with_format("numpy")))
    )
    assert logged(formatted) == logged(plain) == [pytest.approx(0.875 * math.log(2), abs=1e-6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "aot", "weight_column": "w"}, "weight_column weighs pairs, but aot sorts them apart"),
        ({"loss_type": "ipo", "margin_column": "m"}, r"margin_column='m' is not read by ipo\. Leave it out, or choose"),
    ],
)
def test_losses_that_cannot_read_them(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize("kind", ["lora_fresh", pytest.param("partly_frozen", marks=pytest.mark.nightly)])
def test_other_policies_train_with_weights(kind: str, tmp_path: Path) -> None:
    """A pair of weight 0 is one that is not there, whatever trains."""
    half = ran(tmp_path / "half", with_columns(w=[1.0, 1.0, 0.0, 0.0]), POLICIES[kind](), weight_column="w")
    alone = ran(
        tmp_path / "alone", rows(4).select([0, 1]), POLICIES[kind](), per_device_train_batch_size=2, learning_rate=0.05
    )
    for ours, theirs in zip(half.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
