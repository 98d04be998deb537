"""Quantiles of margins, from batches and from what a checkpoint holds."""

import pytest
import torch

from holdfast.training.margins import QUANTILES, Margins


def added(*batches: list[float]) -> Margins:
    """Margins of these batches: chosen rewards of so much above rejected ones of 1."""
    margins = Margins()
    for batch in batches:
        rejected = torch.ones(len(batch))
        margins.add(torch.tensor(batch) + rejected, rejected)
    return margins


def test_by_hand() -> None:
    """Of 0, 1, ..., 10 a tenth is below 1, half below 5, nine tenths below 9; of 0, 1 they are 0.1, 0.5, 0.9."""
    margins = added([3, 1, 2, 0], [10], [4, 9, 8, 5, 7, 6])
    assert margins.reset() == dict(zip(QUANTILES, (1.0, 5.0, 9.0), strict=True))
    assert margins.reset() == {}
    assert [*added([0, 1]).reset().values()] == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_checkpoint_holds_them(num_processes: int) -> None:
    """Recorded, they are still there; restored on one process, those of all processes come together, bit for bit."""
    parts = [added([0.1, 0.7], [1e-9]), added([-3.3])][:num_processes]
    records = [part.record() for part in parts]
    resumed = added([99.0])
    resumed.restore(records)
    for part in (resumed, parts[0]):
        part.add(torch.tensor([5.0]), torch.tensor([4.0]))
    whole = added([0.1, 0.7], [1e-9], *([[-3.3]] if num_processes == 2 else []), [1.0])
    assert resumed.reset() == whole.reset()
    assert parts[0].reset() == added([0.1, 0.7], [1e-9], [1.0]).reset()


def test_a_checkpoint_without_any() -> None:
    margins = added([1.0])
    margins.restore([""])
    assert margins.reset() == {}
