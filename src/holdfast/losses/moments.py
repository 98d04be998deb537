"""`MarginMoments`: mean and deviation of a margin over the batches of training, which some losses compare a pair with.

They are averages with a memory of about ten batches (momentum 0.9, as in beta-DPO, Wu et al. 2024, arXiv:2407.08639),
and begin with those of the first batch instead of zero. A loss reads them; the trainer makes new ones with each batch
of training and keeps them in its checkpoints. Given up: a value of a pair that does not depend on the batches before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

MOMENTUM = 0.9
_LEAST_DEVIATION = 0.01
"""Nats. Before the first step all margins are 0 but for rounding, which must not be taken for a difference."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MarginMoments:
    """`mean` and `deviation` (nats, without gradient) after `num_updates` batches."""

    mean: Float[Tensor, ""]
    deviation: Float[Tensor, ""]
    num_updates: int

    @classmethod
    def of(cls, margins: Float[Tensor, "P"]) -> "MarginMoments":
        """The moments of one batch."""
        margins = margins.detach()
        return cls(mean=margins.mean(), deviation=margins.std(correction=0), num_updates=1)

    def after(self, margins: Float[Tensor, "P"]) -> "MarginMoments":
        """The moments with one more batch: 0.9 of these and 0.1 of its own."""
        batch = MarginMoments.of(margins)
        return MarginMoments(
            mean=torch.lerp(batch.mean, self.mean, MOMENTUM),
            deviation=torch.lerp(batch.deviation, self.deviation, MOMENTUM),
            num_updates=self.num_updates + 1,
        )

    def standardised(self, margins: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """(margin - mean) / deviation, where the deviation counts as 0.01 nats at least."""
        return (margins - self.mean) / self.deviation.clamp(min=_LEAST_DEVIATION)

    def record(self) -> dict[str, float]:
        """The moments as plain numbers, exactly. Waits for the device."""
        return {"mean": float(self.mean), "deviation": float(self.deviation), "num_updates": self.num_updates}

    @classmethod
    def restored(cls, record: Mapping[str, Any], device: torch.device) -> "MarginMoments":
        """The moments that `record` was made of."""
        mean, deviation = torch.tensor([record["mean"], record["deviation"]], device=device).unbind()
        return cls(mean=mean, deviation=deviation, num_updates=int(record["num_updates"]))
