"""Which softmax a head takes: the trial of the kernels finds each of their faults, and plain torch is what remains."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.scoring import softmax_choice
from holdfast.scoring.softmax import Softmax, TorchSoftmax
from holdfast.scoring.softmax_choice import difference, softmax_class
from holdfast.scoring.transform import LogitTransform

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
TRANSFORMS = [LogitTransform(), LogitTransform(0.25), LogitTransform(cap=30.0)]
Spoil = Callable[[Tensor], Any]


def nothing(_: Tensor) -> None:
    """Leaves a tensor as it is."""


def stand_in(
    columns: Spoil = nothing, errors: Spoil = nothing, scaled: Spoil = nothing, *, reads_outside: bool = False
) -> type[Softmax]:
    """Kernels that are plain torch, but for a fault in their columns, errors or scaled errors."""

    class Kernels(Softmax):
        keeps_errors = True

        def __init__(
            self, target: Tensor, transform: LogitTransform, vocabulary: int, size: int, dtype: torch.dtype
        ) -> None:
            self.is_outside = (target < 0) | (target >= vocabulary)
            self.inner = TorchSoftmax(target.clamp(0, vocabulary - 1), transform, vocabulary, size, dtype)
            self.logits_dtype = self.inner.logits_dtype

        def empty_columns(self, with_statistics: bool) -> list[Tensor]:
            return self.inner.empty_columns(with_statistics)

        def write(self, logits: Tensor, here: slice, columns_: Sequence[Tensor], *, with_errors: bool) -> None:
            self.inner.write(logits, here, columns_, with_errors=with_errors)
            if not reads_outside:
                columns_[0][here][self.is_outside[here]] = float("nan")
            spoiled = torch.stack(list(columns_))
            columns(spoiled)
            for column, values in zip(columns_, spoiled, strict=True):
                column.copy_(values)
            errors(logits)

        def scaled_errors(
            self, chunk: Tensor, here: slice, factor: Tensor, columns: Sequence[Tensor], *, is_saved: bool
        ) -> tuple[Tensor, Tensor | None]:
            made, rest = self.inner.scaled_errors(chunk, here, factor, columns, is_saved=is_saved)
            made = made if rest is None else made * rest[:, None]
            scaled(made)
            return made, None

    return Kernels


def add(row: int, value: float) -> Spoil:
    return lambda columns: columns[row].add_(value)


FAULTS: dict[str, tuple[type[Softmax], str]] = {
    "log-probs": (stand_in(columns=add(0, 0.01)), "log-probs or statistics differ by"),
    "entropy": (stand_in(columns=add(1, -0.05)), "log-probs or statistics differ by"),
    "mean logit": (stand_in(columns=add(2, 0.05)), "log-probs or statistics differ by"),
    "top-1": (stand_in(columns=lambda columns: columns[3].neg_().add_(1)), "log-probs or statistics differ by"),
    "a tie": (stand_in(columns=lambda columns: columns[3, -1].neg_().add_(1)), "log-probs or statistics differ by"),
    "sum of squares": (stand_in(columns=add(4, 0.05)), "log-probs or statistics differ by"),
    "NaN": (stand_in(columns=lambda columns: columns[1, 4].fill_(float("nan"))), "log-probs or statistics differ by"),
    "a log-prob is NaN": (stand_in(columns=lambda columns: columns[0, 4].fill_(float("nan"))), "3 have no log-prob"),
    "errors": (stand_in(errors=lambda errors: errors.mul_(1.1)), "gradients differ by"),
    "no error of the target": (stand_in(errors=lambda errors: errors.clamp_(min=0)), "gradients differ by"),
    "an error in the tail": (stand_in(errors=lambda errors: errors[:, -1].add_(0.1)), "gradients differ by"),
    "NaN in an error": (stand_in(errors=lambda errors: errors[0, 0].fill_(float("nan"))), "gradients differ by"),
    "factors": (stand_in(scaled=lambda scaled: scaled.abs_()), "gradients differ by"),
    "targets outside": (stand_in(reads_outside=True), "of 9 targets, 0 have no log-prob"),
}


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_right_passes(transform: LogitTransform, dtype: torch.dtype) -> None:
    assert difference(stand_in(), CPU, dtype, transform) is None


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_faults_are_found(fault: str, dtype: torch.dtype) -> None:
    kernels, message = FAULTS[fault]
    assert message in (difference(kernels, CPU, dtype, LogitTransform(0.5)) or "")


def test_another_transform_is_found() -> None:
    """A soft cap that is left out, in the logits or in the slope."""

    class Uncapped(stand_in()):
        def __init__(self, target: Tensor, transform: LogitTransform, *sizes: Any) -> None:
            super().__init__(target, LogitTransform(transform.scale), *sizes)

    found = difference(Uncapped, CPU, torch.bfloat16, LogitTransform(cap=30.0))
    assert "log-probs or statistics differ by" in (found or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cpus_take_plain_torch(dtype: torch.dtype) -> None:
    assert softmax_class(CPU, dtype, LogitTransform()) is TorchSoftmax


@pytest.fixture
def _untried(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax_choice._tried_kernels.cache_clear()
    yield
    softmax_choice._tried_kernels.cache_clear()


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("way", ["missing", "failing", "wrong", "right"])
def test_kernels_are_tried_once(way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And one warning says why they are not used. fp64 has none."""
    kernels = stand_in() if way == "right" else FAULTS["entropy"][0]
    num_tried = 0

    def imported(name: str) -> Any:
        nonlocal num_tried
        num_tried += 1
        assert name == "holdfast.scoring.softmax_kernels"
        if way == "missing":
            raise ModuleNotFoundError("No module named 'triton'")
        return type("Module", (), {"KernelSoftmax": kernels})

    def tried(kernels: Any, device: torch.device, *rest: Any) -> str | None:
        if way == "failing":
            raise RuntimeError("0 active drivers ([]). There should only be one.\nmore")
        return difference(kernels, CPU, *rest)

    monkeypatch.setattr(softmax_choice.importlib, "import_module", imported)
    monkeypatch.setattr(softmax_choice, "difference", tried)
    with caplog.at_level(logging.WARNING):
        found = [softmax_class(GPU, torch.bfloat16, LogitTransform()) for _ in range(3)]
        assert softmax_class(GPU, torch.float64, LogitTransform()) is TorchSoftmax
    assert found == [kernels if way == "right" else TorchSoftmax] * 3
    assert num_tried == 1
    reasons = {
        "missing": "on cuda:0 in torch.bfloat16 come from plain torch, not from its kernels: ModuleNotFoundError",
        "failing": "RuntimeError: 0 active drivers ([]). There should only be one.",
        "wrong": "log-probs or statistics differ by",
    }
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (way != "right")
    assert all(reasons[way] in message and "more" not in message for message in messages)
