"""What each optimizer step's loss and gradient norm say, on the device until the host reads anyway.

The first step at which either is NaN or infinite is a minimum over steps, and whether gradients move anything is a
count. Both are updated without waiting for the device, at the cost of a few operations on single numbers. They are read
once per log, evaluation and checkpoint. Given up: which micro-batch of the step it was, and which pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from holdfast.checkpoint.finite import Break

_QUANTITIES = ("loss", "gradient norm")
"""In the order in which a step computes them."""

_VALUES = ("NaN", "infinite")

_NEVER = torch.iinfo(torch.int64).max

_STILL = 1e-20
"""The largest gradient norm that moves nothing: AdamW divides by at least eps=1e-8, so the step is below 1e-12 of the
learning rate."""


_MOST_SKIPPED = 32
"""More than as many steps in a row are never skipped for good reason: the loss scale begins at 2^16, and is halved."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a `StepRecord` says when it is read.

    `first` is the first step that broke, None where none did. `num_still` is the number of steps whose gradient norm is
    known, where none of them was a finite number that moves anything; else 0.
    """

    first: Break | None
    num_still: int


@final
class StepRecord:
    """The first step whose loss or gradient norm was not finite, and whether any step's gradient was above zero.

    `skips_steps`: fp16 scales its loss, and skips the step where its gradients overflow. A gradient norm that is not
    finite is no break there.
    """

    def __init__(self, *, skips_steps: bool = False) -> None:
        self.skips_steps = skips_steps
        self._first: dict[str, Tensor] = {}
        self._num_moving: Tensor | None = None
        self._num_steps = 0

    def add_loss(self, loss: Tensor, step: int) -> None:
        """Adds the loss of a micro-batch of optimizer step `step`, on the device."""
        self._add("loss", loss.detach(), step)

    def add_gradient_norm(self, norm: Any, step: int) -> None:
        """Adds the gradient norm of optimizer step `step`, on the device. An engine may give a float, or None."""
        if norm is None:
            return
        norm = norm.detach() if isinstance(norm, Tensor) else torch.full((), float(norm))
        if hasattr(norm, "full_tensor"):  # of sharded gradients
            norm = norm.full_tensor()
        if not self.skips_steps:
            self._add("gradient norm", norm, step)
        is_moving = ((norm > _STILL) & norm.isfinite()).long()
        self._num_moving = is_moving if self._num_moving is None else self._num_moving + is_moving
        self._num_steps += 1

    def _add(self, quantity: str, value: Tensor, step: int) -> None:
        steps = torch.where(torch.stack([value.isnan(), value.isinf()]), step, _NEVER)
        before = self._first.get(quantity)
        self._first[quantity] = steps if before is None else torch.minimum(before, steps)

    def read(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> Reading:
        """What was recorded on all processes; they must ask together. Waits for the device. `gather` puts the rows of
        all processes together."""
        never = torch.full((len(_VALUES),), _NEVER, device=device)
        moving = torch.zeros((), dtype=torch.int64, device=device) if self._num_moving is None else self._num_moving
        recorded = [self._first.get(quantity, never).to(device) for quantity in _QUANTITIES]
        rows = gather(torch.cat([*recorded, moving.to(device).view(1)]).unsqueeze(0)).tolist()
        steps = [min(row[number] for row in rows) for number in range(len(_QUANTITIES) * len(_VALUES))]
        kinds = [(quantity, value) for quantity in _QUANTITIES for value in _VALUES]
        step, (quantity, value) = min(zip(steps, kinds, strict=True), key=lambda found: found[0])
        first = Break(quantity=quantity, value=value, step=step) if step != _NEVER else None
        return Reading(first=first, num_still=0 if any(row[-1] for row in rows) else self._num_steps)

    def begin_period(self) -> None:
        """Forgets which steps moved something; the first break stays."""
        self._num_moving, self._num_steps = None, 0


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
