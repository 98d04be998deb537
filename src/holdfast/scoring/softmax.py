"""The softmax over a chunk's logits: log-probs and statistics of its tokens, and the errors p - 1[y].

`Softmax` is what `scoring.head` asks for. `TorchSoftmax` is plain torch: every device has it, and what else there is
must agree with it. `scoring.softmax_kernels` does the same in two kernels, and `scoring.softmax_choice` says where it
is used. A law holds for each: a token's log-prob is the same to the last bit, whatever else is computed with it. So
policy and reference, of which one has gradients and statistics, get equal log-probs from equal models.

Given up: choosing another softmax for a part of the tokens.
"""

import abc
from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.scoring.transform import LogitTransform

NUM_COLUMNS = 5
"""The log-prob, entropy, mean logit, whether the target is the most likely token, and log sum_v p(v)^2."""

_CPU_BLOCK_LOGITS = 2**18
"""Logits of a block on a CPU: as many as its caches hold."""
_BLOCK_LOGITS = 2**23
"""Logits of a block on other devices: 32 MiB, enough to keep one busy."""


class Softmax(abc.ABC):
    """What is computed from the logits of the N tokens of `target`, of which a chunk lies at `here`.

    Logits are the head's output, before the transform. Errors are minus the gradient of each token's log-prob with
    respect to them.
    """

    logits_dtype: torch.dtype
    """The dtype in which `write` and `scaled_errors` take logits."""

    keeps_errors: bool
    """Whether `scaled_errors` wants the errors of a chunk that was saved; else its logits."""

    @abc.abstractmethod
    def __init__(
        self, target: Int[Tensor, "N"], transform: LogitTransform, vocabulary: int, size: int, dtype: torch.dtype
    ) -> None:
        """`size` is the number of tokens of the largest chunk, `dtype` that of the matrix products."""

    @abc.abstractmethod
    def empty_columns(self, with_statistics: bool) -> list[Float[Tensor, "N"]]:
        """Room for what `write` writes: the log-probs; with statistics the `NUM_COLUMNS` columns; and after these what
        `scaled_errors` reads, if anything."""

    @abc.abstractmethod
    def write(
        self, logits: Float[Tensor, "n V"], here: slice, columns: Sequence[Float[Tensor, "N"]], *, with_errors: bool
    ) -> None:
        """Fills a chunk's part of `columns`. Overwrites its logits with its errors where these are asked for; else
        the logits may be changed too, but for a softmax that keeps logits."""

    @abc.abstractmethod
    def scaled_errors(
        self,
        chunk: Float[Tensor, "n V"],
        here: slice,
        factor: Float[Tensor, "N"],
        columns: Sequence[Tensor],
        *,
        is_saved: bool,
    ) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n"] | None]:
        """A chunk's errors in the dtype of the matrix products, and the factors by which they are still to be
        multiplied; None where they are multiplied by theirs already.

        `columns` are those that `write` filled after the first `NUM_COLUMNS`. `chunk` holds the chunk's logits; where
        it `is_saved`, it stays as it is, and holds errors if this softmax keeps these.
        """


@final
class TorchSoftmax(Softmax):
    """In plain torch. Logits are overwritten by errors, a block at a time while the caches hold it."""

    keeps_errors = True

    def __init__(
        self, target: Int[Tensor, "N"], transform: LogitTransform, vocabulary: int, size: int, dtype: torch.dtype
    ) -> None:
        """See `Softmax`."""
        self._target = target
        self._transform = transform
        self._vocabulary = vocabulary
        self._products_dtype = dtype
        self.logits_dtype = torch.promote_types(dtype, torch.float32)
        block_logits = _CPU_BLOCK_LOGITS if target.device.type == "cpu" else _BLOCK_LOGITS
        self._block = max(1, min(size, block_logits // vocabulary))

    def empty_columns(self, with_statistics: bool) -> list[Float[Tensor, "N"]]:
        """See `Softmax`."""
        like = {"dtype": self.logits_dtype, "device": self._target.device}
        return [torch.empty(len(self._target), **like) for _ in range(NUM_COLUMNS if with_statistics else 1)]

    def write(
        self, logits: Float[Tensor, "n V"], here: slice, columns: Sequence[Float[Tensor, "N"]], *, with_errors: bool
    ) -> None:
        """See `Softmax`. Without `columns`, only the errors are computed."""
        parts = [column[here] for column in columns]
        for rows in (slice(i, i + self._block) for i in range(0, len(logits), self._block)):
            target = self._target[here][rows, None]
            block = logits[rows]
            self._transform.apply_(block)
            log_probs = torch.log_softmax(block, -1, out=self._scratch[: len(block)])
            if parts:
                parts[0][rows] = log_probs.gather(-1, target).squeeze(-1)
            if with_errors or len(parts) > 1:
                self._finish(block, log_probs, target, [part[rows] for part in parts[1:]])

    def scaled_errors(
        self,
        chunk: Float[Tensor, "n V"],
        here: slice,
        factor: Float[Tensor, "N"],
        columns: Sequence[Tensor],
        *,
        is_saved: bool,
    ) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n"] | None]:
        """See `Softmax`."""
        if not is_saved:
            self.write(chunk, here, [], with_errors=True)
        if chunk.dtype == self._products_dtype:
            return chunk, factor[here]
        # Scaled while they are cast, before a product in half precision could overflow.
        narrow = torch.empty_like(chunk, dtype=self._products_dtype)
        return torch.mul(chunk, factor[here, None], out=narrow), None

    @cached_property
    def _scratch(self) -> Float[Tensor, "b V"]:
        """A block's log-probs."""
        shape = (self._block, self._vocabulary)
        return torch.empty(shape, dtype=self.logits_dtype, device=self._target.device)

    def _finish(self, logits: Tensor, log_probs: Tensor, target: Tensor, statistics: Sequence[Tensor]) -> None:
        """Overwrites a block's logits with its errors; fills the `statistics`, if there are any."""
        cap, scale = self._transform.cap, self._transform.scale
        slope = None if cap is None else 1 - (logits / cap).square_()  # of tanh, from its value
        if statistics:
            # In half precision the largest logit is often there twice; then the first one counts, as for `argmax`.
            is_exact = self._products_dtype == self.logits_dtype
            largest = logits.amax(-1, keepdim=True) if is_exact else logits.argmax(-1, keepdim=True)
            is_top1 = (logits.gather(-1, target) if is_exact else target) == largest
            statistics[1][:], statistics[2][:] = logits.mean(-1), is_top1.squeeze(-1)
        probs = torch.exp(log_probs, out=logits)
        if statistics:
            statistics[0][:], statistics[3][:] = -log_probs.mul_(probs).sum(-1), log_sum_sq(probs)
        errors = probs.scatter_add_(-1, target, probs.new_full(target.shape, -1.0))
        if slope is not None:
            errors.mul_(slope)
        if scale != 1.0:
            errors.mul_(scale)


def log_sum_sq(probs: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
    """log sum_v p(v)^2 of each row."""
    return 2 * torch.linalg.vector_norm(probs, dim=-1).log()
