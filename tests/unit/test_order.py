"""The order by length: every row once, batches of like length, another order for another epoch and none for chance."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from holdfast.data.loader.order import WINDOW_BATCHES, OrderByLength, order_by_length
from policies import config

LENGTHS = np.random.default_rng(0).integers(1, 1000, 1003)


def batches(order: OrderByLength, size: int) -> list[list[int]]:
    indices = list(order)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@pytest.mark.parametrize("size", [1, 4, 7, 2000])
def test_every_row_comes_once(size: int) -> None:
    order = OrderByLength(LENGTHS, size, seed=3)
    assert sorted(order) == list(range(1003))
    assert len(order) == 1003


def test_batches_are_alike_in_length() -> None:
    """Four of 200 sorted rows lie within a fiftieth of the range, on average; four of chance within three fifths."""
    spread = [np.ptp(LENGTHS[batch]) for batch in batches(OrderByLength(LENGTHS, 4, seed=3), 4)[:-1]]
    assert np.mean(spread) < 1000 * 4 / (4 * WINDOW_BATCHES)


def test_batches_do_not_come_sorted() -> None:
    means = [float(np.mean(LENGTHS[batch])) for batch in batches(OrderByLength(LENGTHS, 4, seed=3), 4)[:WINDOW_BATCHES]]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.4


def test_the_seed_and_the_epoch_say_the_order() -> None:
    order, again = OrderByLength(LENGTHS, 4, seed=3), OrderByLength(LENGTHS, 4, seed=3)
    first = list(order)
    assert first == list(order) == list(again)
    order.set_epoch(1)
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first
    assert list(OrderByLength(LENGTHS, 4, seed=4)) != first


def test_a_length_is_the_tokens_of_both_sides(tmp_path: Path) -> None:
    counts = ((3, 1, 9), (1, 1, 1))
    table = [{"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r} for p, c, r in counts]
    data, args = Dataset.from_list(table * 1200), config(tmp_path, per_device_train_batch_size=2)
    order = order_by_length(data, args)
    assert order is not None
    assert order._lengths.tolist() == [13, 3] * 1200
    assert order_by_length(data.to_iterable_dataset(), args) is None
