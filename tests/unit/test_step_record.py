"""The first step that broke, and whether gradients move anything, out of long runs of numbers."""

import math

import pytest
import torch

from holdfast.checkpoint.finite import Break
from holdfast.training.step_record import Reading, StepRecord, still_line

CPU = torch.device("cpu")


def read(record: StepRecord, *, ends_period: bool = False) -> Reading:
    return record.read(lambda rows: rows, CPU, ends_period=ends_period)


def recorded(num_steps: int, *, loss: dict[int, float] | None = None, norm: dict[int, float] | None = None) -> Reading:
    """A reading of so many steps of two micro-batches, of which some have other numbers."""
    record = StepRecord()
    for step in range(1, num_steps + 1):
        record.add_loss(torch.tensor(0.5), step)
        record.add_loss(torch.tensor((loss or {}).get(step, 0.5)), step)
        record.add_gradient_norm(torch.tensor((norm or {}).get(step, 1.0)), step)
    return read(record)


@pytest.mark.parametrize("step", [1, 2, 127, 128, 129, 255, 256, 257, 700])
@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_the_first_step_is_found(step: int, value: float, word: str) -> None:
    """However many come before and after, and whatever breaks later."""
    later = {step: value, step + 1: math.nan, 690: math.inf}
    first = min(later)
    expected = "infinite" if first == 690 else word
    assert recorded(700, loss=later).first == Break(quantity="loss", value=expected, step=first)
    assert recorded(700, norm=later).first == Break(quantity="gradient norm", value=expected, step=first)


def test_a_loss_goes_before_the_gradient_norm_of_its_step() -> None:
    found = recorded(9, loss={5: math.inf}, norm={5: math.nan}).first
    assert found == Break(quantity="loss", value="infinite", step=5)
    found = recorded(9, loss={5: math.inf}, norm={4: math.nan}).first
    assert found == Break(quantity="gradient norm", value="NaN", step=4)
    assert recorded(9).first is None
    assert read(StepRecord()) == Reading(first=None, num_still=0)


def test_a_break_stays_and_what_is_finite_is_forgotten() -> None:
    record = StepRecord()
    for step in range(1, 5):
        record.add_loss(torch.tensor(math.nan if step == 3 else 0.1), step)
        found = read(record)
        assert (found.first.step if found.first else None) == (3 if step >= 3 else None)


def test_the_first_of_any_process_counts() -> None:
    record = StepRecord()
    for step in range(1, 5):
        record.add_loss(torch.tensor(0.5), step)
    other = torch.tensor([[2, torch.iinfo(torch.int64).max, 4, *[torch.iinfo(torch.int64).max] * 2, 0]])
    found = record.read(lambda rows: torch.cat([rows, other]), CPU)
    assert found.first == Break(quantity="loss", value="NaN", step=3)  # its third position


def test_a_period_is_still_where_nothing_in_it_moved() -> None:
    """Checkpoints read in between; 12 of 12 steps, then none, since one of the next period moved."""
    record = StepRecord()
    found: list[int] = []
    for step in range(1, 31):
        record.add_gradient_norm(torch.tensor(1.0 if step in (13, 21) else 1e-21), step)
        found.append(read(record, ends_period=step % 6 == 0).num_still)
    assert found == [*range(1, 13), *[0] * 6, *range(1, 3), *[0] * 4, *range(1, 7)]


def test_an_engine_may_give_floats_or_nothing() -> None:
    record = StepRecord()
    for step, norm in enumerate([None, 1.0, math.inf], 1):
        record.add_gradient_norm(norm, step)
    assert read(record).first == Break(quantity="gradient norm", value="infinite", step=3)


def test_what_fp16_skips_is_no_break() -> None:
    """But so many in a row are a sign."""
    record = StepRecord(skips_steps=True)
    for step in range(1, 41):
        record.add_gradient_norm(torch.tensor(math.inf), step)
        found = read(record, ends_period=True)
        assert found.first is None
        assert (still_line(found, "adamw_torch", skips_steps=True) is not None) == (step > 32)
    record.add_loss(torch.tensor(math.inf), 41)
    assert read(record).first == Break(quantity="loss", value="infinite", step=41)


@pytest.mark.parametrize(
    ("optim", "is_said"), [("adamw_torch", True), ("lomo", False), ("galore_adamw_layerwise", False)]
)
def test_an_update_in_the_backward_pass_has_no_gradients_to_measure(optim: str, is_said: bool) -> None:
    line = still_line(Reading(first=None, num_still=3), optim, skips_steps=False)
    assert (line is not None) == is_said
    assert line is None or "last 3 optimizer steps had a gradient norm of 0 (at most 1e-20)" in line
