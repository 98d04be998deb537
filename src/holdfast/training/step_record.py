"""What each optimizer step's loss and gradient norm say, on the device until the host reads anyway.

The numbers of recent steps stay where they are. Every few hundred they are folded into the first position that is NaN
or infinite and the count of gradient norms that move anything, without waiting for the device. That is read once per
log, evaluation and checkpoint. A step costs two appends to a list. Given up: which micro-batch of the step it was, and
which pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from holdfast.checkpoint.finite import Break

_VALUES = ("NaN", "infinite")

_NEVER = torch.iinfo(torch.int64).max

_NUM_RECENT = 256
"""How many numbers wait on the device to be folded into one."""

_STILL = 1e-20
"""The largest gradient norm that moves nothing: AdamW divides by at least eps=1e-8, so the step is below 1e-12 of the
learning rate."""


_MOST_SKIPPED = 32
"""More than as many steps in a row are never skipped for good reason: the loss scale begins at 2^16, and is halved."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a `StepRecord` says when it is read.

    `first` is the first step that broke, None where none did. `num_still` is the number of steps since the period began
    in which something moved last, where none since had a finite gradient norm that moves anything; else 0.
    """

    first: Break | None
    num_still: int


@final
class _Numbers:
    """One number of each step, or of each micro-batch, since the last reading."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        """The optimizer step of each position."""
        self._recent: list[Tensor] = []
        self._folded: Tensor | None = None

    def add(self, value: Tensor, step: int) -> None:
        self.steps.append(step)
        self._recent.append(value)
        if len(self._recent) == _NUM_RECENT:
            self._fold()

    def _fold(self) -> None:
        values = torch.stack(self._recent)
        positions = torch.arange(len(self.steps) - len(values), len(self.steps), device=values.device)
        first = torch.where(torch.stack([values.isnan(), values.isinf()]), positions, _NEVER).amin(1)
        num_moving = ((values > _STILL) & values.isfinite()).sum().view(1)
        if self._folded is not None:
            first = torch.minimum(first, self._folded[:-1])
            num_moving = num_moving + self._folded[-1:]
        self._folded, self._recent = torch.cat([first, num_moving]), []

    def folded(self, device: torch.device) -> Tensor:
        """The first positions that are NaN and that are infinite, and the number of those that move anything."""
        if self._recent:
            self._fold()
        if self._folded is None:
            return torch.tensor([_NEVER, _NEVER, 0], device=device)
        return self._folded.to(device)


@final
class StepRecord:
    """The first step whose loss or gradient norm was not finite, and whether any step's gradient was above zero.

    `skips_steps`: fp16 scales its loss, and skips the step where its gradients overflow. A gradient norm that is not
    finite is no break there.
    """

    def __init__(self, *, skips_steps: bool = False) -> None:
        self.skips_steps = skips_steps
        self._losses, self._norms = _Numbers(), _Numbers()
        self._num_steps, self._has_moved = 0, False

    def add_loss(self, loss: Tensor, step: int) -> None:
        """Adds the loss of a micro-batch of optimizer step `step`; it stays on its device."""
        self._losses.add(loss.detach(), step)

    def add_gradient_norm(self, norm: Any, step: int) -> None:
        """Adds the gradient norm of optimizer step `step`, likewise. An engine may give a float, or None."""
        if norm is None:
            return
        norm = norm.detach() if isinstance(norm, Tensor) else torch.full((), float(norm))
        self._norms.add(norm.full_tensor() if hasattr(norm, "full_tensor") else norm, step)  # of sharded gradients

    def read(self, gather: Callable[[Tensor], Tensor], device: torch.device, *, ends_period: bool = False) -> Reading:
        """What was recorded on all processes; they must ask together. Waits for the device. `gather` puts the rows of
        all processes together. Where nothing broke, the numbers are forgotten. With `ends_period` the next period
        begins, if anything moved in this one."""
        folded = torch.cat([self._losses.folded(device), self._norms.folded(device)])
        *positions, num_moving = (min(column) for column in zip(*gather(folded.unsqueeze(0)).tolist(), strict=True))
        found = [
            Break(quantity="loss", value=value, step=self._losses.steps[position])
            for value, position in zip(_VALUES, positions[:2], strict=True)
            if position != _NEVER
        ]
        found += [
            Break(quantity="gradient norm", value=value, step=self._norms.steps[position])
            for value, position in zip(_VALUES, positions[3:], strict=True)
            if position != _NEVER and not self.skips_steps
        ]
        if found:
            return Reading(first=min(found, key=lambda one: one.step), num_still=0)
        self._num_steps += len(self._norms.steps)
        self._has_moved = self._has_moved or num_moving > 0
        self._losses, self._norms = _Numbers(), _Numbers()
        reading = Reading(first=None, num_still=0 if self._has_moved else self._num_steps)
        if ends_period and self._has_moved:
            self._num_steps, self._has_moved = 0, False
        return reading


def still_line(reading: Reading, optim: Any, *, skips_steps: bool) -> str | None:
    """One line where no step of a period moved anything; None where one did. An optimizer that updates in the backward
    pass leaves no gradients to measure. fp16 halves its scale in each skipped step, so a few of them are no sign."""
    patience = _MOST_SKIPPED if skips_steps else 0
    if reading.num_still <= patience or any(word in str(optim) for word in ("layerwise", "lomo")):
        return None
    reason = (
        "were skipped, since gradients overflowed in fp16, or vanished"
        if skips_steps
        else f"had a gradient norm of 0 (at most {_STILL:.0e})"
    )
    return (
        f"The last {reading.num_still} optimizer steps {reason}: nothing trains. The loss is saturated, or its "
        "gradient has vanished: look at beta, at the losses' own options and at the logged rewards/margins."
    )
