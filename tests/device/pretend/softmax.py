"""The head's two kernels as single operations on the pretend device, as they are on a GPU.

They are launched by Triton, which has no driver here, so `scoring.softmax_choice` would find plain torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.scoring.softmax import NUM_COLUMNS, Softmax
from holdfast.scoring.transform import LogitTransform


@torch.library.custom_op("pretend::fold_logits", mutates_args=("columns",))
def _fold(logits: Tensor, target: Tensor, columns: Sequence[Tensor]) -> None:
    raise NotImplementedError


@torch.library.custom_op("pretend::write_errors", mutates_args=("out",))
def _errors(
    logits: Tensor | None, target: Tensor, factor: Tensor | None, columns: Sequence[Tensor], out: Tensor
) -> None:
    raise NotImplementedError


@_fold.register_fake
def _(logits: Tensor, target: Tensor, columns: Sequence[Tensor]) -> None:
    assert {logits.device} == {tensor.device for tensor in (target, *columns)}


@_errors.register_fake
def _(logits: Tensor | None, target: Tensor, factor: Tensor | None, columns: Sequence[Tensor], out: Tensor) -> None:
    devices = {tensor.device for tensor in (logits, target, factor, *columns, out) if tensor is not None}
    assert len(devices) == 1, devices


class PretendKernelSoftmax(Softmax):
    """Asks for what `scoring.softmax_kernels.KernelSoftmax` asks for: memory and launches are the same."""

    keeps_errors = False

    def __init__(
        self, target: Tensor, transform: LogitTransform, vocabulary: int, size: int, dtype: torch.dtype
    ) -> None:
        """See `Softmax`."""
        self._target = target.contiguous()
        self.logits_dtype = dtype

    def empty_columns(self, with_statistics: bool) -> list[Tensor]:
        """See `Softmax`."""
        return [torch.empty(len(self._target), device=self._target.device) for _ in range(NUM_COLUMNS + 2)]

    def write(self, logits: Tensor, here: slice, columns: Sequence[Tensor], *, with_errors: bool) -> None:
        """See `Softmax`."""
        _fold(logits, self._target, columns)
        if with_errors:
            _errors(None, self._target, None, columns[NUM_COLUMNS:], logits)

    def scaled_errors(
        self, chunk: Tensor, here: slice, factor: Tensor, columns: Sequence[Tensor], *, is_saved: bool
    ) -> tuple[Tensor, None]:
        """See `Softmax`."""
        if not is_saved:
            _errors(None, self._target, factor.contiguous(), columns, chunk)
            return chunk, None
        out = torch.empty_like(chunk)
        _errors(chunk, self._target, factor.contiguous(), columns, out)
        return out, None


def softmax_class(device: torch.device, dtype: torch.dtype, transform: LogitTransform) -> type[Softmax]:
    """In the place of `scoring.softmax_choice.softmax_class`, where the kernels work."""
    from holdfast.scoring import softmax_choice

    has_kernels = device.type == "cuda" and dtype != torch.float64
    return PretendKernelSoftmax if has_kernels else softmax_choice.softmax_class(device, dtype, transform)
