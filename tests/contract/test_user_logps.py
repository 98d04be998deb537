"""Reference log-probs in the dataset's own columns: used where they are right, refused where they are not.

The sums come from the naive loop, one unpadded row at a time (`naive.logp`), so that what is compared with the
reference was obtained another way.
"""

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import BitsAndBytesConfig

from families import tiny_model
from holdfast import DataCollatorForPreference, DPOTrainer
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.sequences import truncated_sequences
from holdfast.losses import LOSSES
from holdfast.reference.identity.digests import digest
from holdfast.reference.sources import user_logps
from holdfast.reference.sources.stored import PrecomputedReference
from holdfast.reference.sources.user_logps import UserLogps
from naive import logp, naive_run
from policies import POLICIES, config, logged, rows, trainer

AHEAD = {"reference": "precomputed"}
CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"


def with_sums(data: Dataset, model: nn.Module, max_length: int | None = None) -> Dataset:
    """`data` with what `model` gives its completions, as cut to `max_length`."""
    model.eval()
    sums = []
    table = data.to_list()
    cut = truncated_sequences(table, max_length, "keep_start")
    with torch.no_grad():
        for row in cut:
            split = {"prompt_ids": row.ids[: row.num_prompt].tolist(), "side": row.ids[row.num_prompt :].tolist()}
            sums.append(float(logp(model, split, "side")))
    return data.add_column(CHOSEN, sums[: len(table)]).add_column(REJECTED, sums[len(table) :])


def changed(data: Dataset, change: Callable[[dict[str, Any], int], dict[str, Any]]) -> Dataset:
    return Dataset.from_list([row | change(row, number) for number, row in enumerate(data.to_list())])


def make_trainer(
    folder: Path, data: Dataset | IterableDataset, model: nn.Module | None = None, **options: Any
) -> DPOTrainer:
    parts = {name: options.pop(name) for name in ("eval_dataset", "data_collator", "ref_model") if name in options}
    return trainer(model or tiny_model(), config(folder, **AHEAD | options), train_dataset=data, **parts)


@pytest.mark.parametrize("kind", ["full", "lora_sft", "dora"])
def test_the_trajectory_is_that_of_a_second_model(kind: str, tmp_path: Path) -> None:
    data = with_sums(rows(), POLICIES[kind]())
    batches: list[list[Any]] = []
    layout = PaddedLayout(pad_token_id=0)

    def recording(features: list[Any]) -> Any:
        batches.append(features)
        return layout(features)

    ours = make_trainer(tmp_path, data, POLICIES[kind]())
    assert isinstance(ours.reference.user_logps, UserLogps)
    initial = copy.deepcopy(ours.model)
    ours.data_collator = recording
    ours.train()
    losses, _ = naive_run(initial, batches[-4:])
    assert losses[-1] != pytest.approx(math.log(2), abs=1e-3), "the policy has moved"
    assert logged(ours) == pytest.approx(losses, abs=1e-5)


def test_what_is_used_is_what_was_given(tmp_path: Path) -> None:
    """Sums that are off by what rounding may explain: the first loss is that of these sums, worked out by hand.

    Every chosen sum is 0.009 too high, so at the first step each margin is -0.009, and the loss with beta 0.2 is
    -log sigmoid(-0.2 * 0.009) = log(1 + exp(0.0018)) = 0.694048; the reference's own sums would give 0.693147.
    """
    data = with_sums(rows().select(range(2, 8)), tiny_model())
    data = changed(data, lambda row, _: {CHOSEN: row[CHOSEN] + 0.009})
    ours = make_trainer(tmp_path, data, max_steps=1)
    ours.train()
    assert logged(ours) == pytest.approx([math.log1p(math.exp(0.0018))], abs=2e-6)


OPTIONS: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}


COMPARING = [name for name in LOSSES if LOSSES[name].needs_reference]


@pytest.mark.parametrize(
    "loss", [pytest.param(loss, marks=pytest.mark.nightly if index % 3 else []) for index, loss in enumerate(COMPARING)]
)
def test_every_loss_of_sums(loss: str, tmp_path: Path) -> None:
    data = with_sums(rows(), tiny_model())
    options = {"loss_type": loss, "learning_rate": 0.01} | OPTIONS.get(loss, {})
    ours = make_trainer(tmp_path, data, **options)
    live = trainer(tiny_model(), config(tmp_path, reference="model", **options))
    ours.train()
    live.train()
    assert isinstance(ours.reference.user_logps, UserLogps)
    assert logged(ours) == pytest.approx(logged(live), rel=1e-5, abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected"):
        assert logged(ours, name) == pytest.approx(logged(live, name), abs=1e-5)


def test_the_gap_to_a_chosen_reference_is_that_of_the_sums(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once the sums are there, nobody is asked for them."""
    other, plain = _other(tiny_model()), rows().select(range(1, 12))  # no two with one completion
    data, theirs = with_sums(plain, other), with_sums(plain, tiny_model())
    ours = make_trainer(tmp_path, data, ref_model=copy.deepcopy(other), per_device_train_batch_size=11, max_steps=1)
    assert isinstance(ours.reference.user_logps, UserLogps)
    assert isinstance(ours.reference.stored, PrecomputedReference)
    ours.reference.scorer = None
    ours.train()
    gaps = [abs(a - b) for name in (CHOSEN, REJECTED) for a, b in zip(data[name], theirs[name], strict=True)]
    (line,) = [record.message for record in caplog.records if "differs from the policy by" in record.message]
    assert f"by {sum(gaps) / len(gaps):.3g} nats per completion on the first batch, {max(gaps):.3g} at most" in line


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_reference_that_is_gone(bits: int, tmp_path: Path) -> None:
    """Its weights are not kept once its sums are known, and the run needs them no more."""
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128}
    tiny_model(**shape).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)

    def run(data: Dataset, **options: Any) -> DPOTrainer:
        args = config(tmp_path, ref_model_init_kwargs={"quantization_config": quantised}, **options)
        return trainer(tiny_model(**shape), args, ref_model=str(tmp_path / "base"), train_dataset=data)

    live = run(rows(), reference="model")
    table = rows().to_list()
    sums = [live.reference.logps(live._collated([row])).sums().tolist() for row in table]
    live.train()
    data = Dataset.from_list([row | {CHOSEN: a, REJECTED: b} for row, (a, b) in zip(table, sums, strict=True)])
    ours = run(data, **AHEAD)
    assert isinstance(ours.reference.user_logps, UserLogps)
    ours.train()
    assert logged(ours) == pytest.approx(logged(live), abs=1e-5 if bits == 4 else 1e-3)


def test_only_a_sample_is_scored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 40 completions 16, whatever the run; the gap is told once. The second run scores none."""
    data = with_sums(rows(20), tiny_model())
    scored = []
    for _ in range(2):
        model = tiny_model()
        model.register_forward_pre_hook(
            lambda _, args, kwargs: scored.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        with caplog.at_level(logging.WARNING):
            make_trainer(tmp_path, data, model, reference_audit=False)
    assert sum(scored) == user_logps.NUM_LONGEST + user_logps.NUM_RANDOM
    told = [record.message for record in caplog.records if "dataset's columns" in record.message]
    assert len(told) == 2
    assert "(train): 39 completions" in told[0]  # rows 0 and 1 share one
    assert "on 16 of them: the gap is " in told[0]


def test_a_dataset_without_the_columns_is_scored(tmp_path: Path) -> None:
    """Evaluation data without columns beside training data with them, and the other way round."""
    data, plain = with_sums(rows(), tiny_model()), rows(6, seed=5)
    live = trainer(tiny_model(), config(tmp_path, reference="model"), eval_dataset=plain)
    live.train()
    expected = live.evaluate()["eval_loss"]
    for train, evaluation in ((data, plain), (rows(), with_sums(plain, tiny_model())), (data, data)):
        ours = make_trainer(tmp_path, train, eval_dataset=evaluation)
        ours.train()
        assert logged(ours) == pytest.approx(logged(live), abs=1e-5)
        if evaluation is not data:
            assert ours.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_columns_of_data_that_come_later(tmp_path: Path) -> None:
    later = rows(6, seed=5)
    ours = trainer(tiny_model(), config(tmp_path, **AHEAD))
    expected = ours.evaluate(later)["eval_loss"]
    assert ours.evaluate(with_sums(later, tiny_model()))["eval_loss"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"the eval dataset's columns .*the gap is .*Drop them"):
        ours.evaluate(changed(with_sums(rows(6, seed=6), tiny_model()), lambda row, _: {CHOSEN: row[CHOSEN] - 1}))


@pytest.mark.parametrize("kind", ["full", "lora_sft"])
def test_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    """Stopped after two of four steps: the sums are those of the policy as it began, not as it is in the checkpoint."""
    data = with_sums(rows(), POLICIES[kind]())
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
    whole = make_trainer(tmp_path / "whole", data, POLICIES[kind](), **saving)
    whole.train()
    make_trainer(tmp_path / "parts", data, POLICIES[kind](), **saving, max_steps=2).train()
    resumed = make_trainer(tmp_path / "parts", data, POLICIES[kind](), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert isinstance(resumed.reference.user_logps, UserLogps)
    for name in ("loss", "rewards/chosen", "rewards/rejected", "num_tokens"):
        assert logged(resumed, name) == logged(whole, name)
    assert digest(resumed.model.named_parameters()) == digest(whole.model.named_parameters())
    live = trainer(POLICIES[kind](), config(tmp_path / "live", reference="model", **saving))
    live.train()
    assert logged(resumed) == pytest.approx(logged(live), abs=1e-5)


def _other(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def _unlike() -> Dataset:
    """Pairs of which no two share a completion."""
    return with_sums(rows().select(range(1, 12)), tiny_model())


def _shifted() -> Dataset:
    sums = _unlike()[CHOSEN][:]
    return changed(_unlike(), lambda _, number: {CHOSEN: sums[number - 1]})


WRONG: dict[str, Callable[[], Dataset]] = {
    "other weights": lambda: with_sums(rows(), _other(tiny_model())),
    "the other side's": lambda: _unlike().rename_columns({CHOSEN: REJECTED, REJECTED: CHOSEN}),
    "means per token": lambda: changed(_unlike(), lambda row, _: {CHOSEN: row[CHOSEN] / len(row["chosen_ids"])}),
    "those of the next row": _shifted,
    "just beyond rounding": lambda: changed(
        _unlike(), lambda row, _: {CHOSEN: row[CHOSEN] + 0.011, REJECTED: row[REJECTED] + 0.011}
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_are_refused_with_the_gap(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"must be those of this run's reference .*the gap is [0-9.e+-]+ nats per completion on average, "
        r"[0-9.e+-]+ at most: row \d+ of 'ref_\w+_logps' has -[0-9.]+, the reference gives -[0-9.]+ for \d+ tokens.*"
        r"Drop them: precompute_ref_log_probs=True",
    ):
        make_trainer(tmp_path, WRONG[wrong]())


def test_the_measured_gap_is_the_right_one(tmp_path: Path) -> None:
    """All sums 0.5 nats too low: a gap of 0.5 on average and at most."""
    data = changed(
        with_sums(rows(), tiny_model()), lambda row, _: {CHOSEN: row[CHOSEN] - 0.5, REJECTED: row[REJECTED] - 0.5}
    )
    with pytest.raises(ValueError, match=r"on 16 completions .* the gap is 0\.5 nats .* on average, 0\.5 at most"):
        make_trainer(tmp_path, data)


@pytest.mark.parametrize(("of", "to"), [(None, 16), (16, None)])
def test_values_of_another_truncation_are_refused(of: int | None, to: int | None, tmp_path: Path) -> None:
    """Though most of a hundred pairs are short, and only one in fifty is touched: the longest are in the sample."""
    table = rows(100).map(lambda row: {name: row[name][:6] for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
    long = rows(2, seed=3).map(lambda row: {name: (row[name] * 9)[:12] for name in ("prompt_ids", "chosen_ids")})
    table = Dataset.from_list(table.to_list() + long.to_list())
    data = with_sums(table, tiny_model(), of)
    make_trainer(tmp_path, data, max_length=of)
    with pytest.raises(ValueError, match=r"the gap is .*another tokenizer, template or truncation"):
        make_trainer(tmp_path, data, max_length=to)


def test_a_contradiction_is_refused(tmp_path: Path) -> None:
    """Rows 0 and 1 have the same chosen completion."""
    data = with_sums(rows(), tiny_model())
    data = changed(data, lambda row, number: {CHOSEN: row[CHOSEN] + (number == 1)})
    with pytest.raises(
        ValueError,
        match=r"must be alike wherever a completion is; found -[0-9.]+ in row 0 of 'ref_chosen_logps' and -[0-9.]+ in "
        r"row 1 of 'ref_chosen_logps' for the same token ids. Drop the columns",
    ):
        make_trainer(tmp_path, data)


@pytest.mark.parametrize("value", [math.nan, -math.inf, None])
def test_what_is_no_number_is_refused(value: float | None, tmp_path: Path) -> None:
    data = with_sums(rows(), tiny_model())
    data = changed(data, lambda row, number: {REJECTED: value if number == 7 else row[REJECTED]})
    with pytest.raises(
        ValueError, match=rf"one finite number per completion; found {value} in row 7 of 'ref_rejected_logps'. Drop"
    ):
        make_trainer(tmp_path, data)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ld_alpha": 0.5}, r"ld_alpha=0.5 needs the log-prob of every token, and these are sums. Drop the columns"),
    ({"sync_ref_model": True}, r"sync_ref_model=True moves the reference.*Drop the columns"),
    ({"reference": "model"}, r"no log-probs computed ahead \(.*ignored. Drop the columns, or set precompute_ref_log_"),
    ({"reference": "precomputed", "reference_window": 2}, r"no log-probs computed ahead .*Drop the columns, or set"),
    ({"reference": "none", "loss_type": "simpo"}, r"\(no loss compares with a reference\), so .* ignored. Drop the"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_where_sums_cannot_be_used(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the train dataset brings reference log-probs along, .*" + message):
        make_trainer(tmp_path, with_sums(rows(), tiny_model()), **options)


def test_with_the_flag_of_the_common_trainer(tmp_path: Path) -> None:
    options = {"reference": "auto", "precompute_ref_log_probs": True}
    ours = make_trainer(tmp_path, with_sums(rows(), tiny_model()), **options)
    assert isinstance(ours.reference.user_logps, UserLogps)


def test_a_stream_is_refused(tmp_path: Path) -> None:
    data = with_sums(rows(), tiny_model()).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"the train dataset is a stream and brings .*Drop these columns, or load it"):
        make_trainer(tmp_path, data, reference="auto")


def test_a_collator_that_cuts_rows_itself_is_refused(tmp_path: Path) -> None:
    layout = PaddedLayout(pad_token_id=0)
    with pytest.raises(
        ValueError, match=r"how its rows are cut is up to a data collator of your own. Drop the columns"
    ):
        make_trainer(tmp_path, with_sums(rows(), tiny_model()), data_collator=lambda features: layout(features))


def test_a_collator_that_passes_the_columns_on(tmp_path: Path) -> None:
    """With all columns kept, the common collator's batches hold the sums, which are known already."""
    model = tiny_model()
    data = with_sums(rows(), model)
    runs = []
    for keeps in (True, False):
        args = config(tmp_path, precompute_ref_log_probs=True, remove_unused_columns=not keeps)
        ours = trainer(copy.deepcopy(model), args, train_dataset=data, data_collator=DataCollatorForPreference(0))
        assert isinstance(ours.reference.user_logps, UserLogps)
        ours.train()
        runs.append(logged(ours))
    assert runs[0] == runs[1]


def test_half_precision_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    """Sums of the fp32 model for a bf16 one: apart by more than fp32's rounding explains, and accepted."""
    data = with_sums(rows(), tiny_model())
    ours = make_trainer(tmp_path, data, tiny_model().bfloat16())
    theirs = with_sums(rows(), tiny_model().bfloat16())
    gap = max(abs(a - b) for a, b in zip(data[CHOSEN], theirs[CHOSEN], strict=True))
    assert user_logps.LEAST_NATS < gap < user_logps.NATS_PER_ROOT_TOKEN_HALF
    assert isinstance(ours.reference.user_logps, UserLogps)
    with pytest.raises(ValueError, match="the gap is"):
        make_trainer(tmp_path, changed(data, lambda row, _: {CHOSEN: row[CHOSEN] - 1}), tiny_model().bfloat16())


def test_other_values_are_other_data_on_resume(tmp_path: Path) -> None:
    """A value that another scoring would have given as well: the losses would be others, if only a little."""
    data = with_sums(rows(), tiny_model())
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, data, **options, max_steps=1).train()
    other = changed(data, lambda row, number: {CHOSEN: row[CHOSEN] + 1e-4} if number == 5 else {})
    with pytest.raises(ValueError, match="was written by a run that differs in the training data"):
        make_trainer(tmp_path, other, **options, max_steps=2).train(resume_from_checkpoint=True)
