"""The margins of all pairs since the last log: their quantiles, exact over all batches and processes.

A mean hides that half of the pairs may be far above it and the other half below 0. So each pair's rewards are kept,
8 bytes a pair, on the device until the log, where the host waits anyway. A checkpoint holds what was not logged yet, so
a resumed run logs the quantiles of the uninterrupted one. Given up: quantiles by source.
"""

import base64
from collections.abc import Sequence
from typing import final

import numpy as np
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, cat

from holdfast.options.metric_names import MARGIN_QUANTILES

QUANTILES = dict(zip(MARGIN_QUANTILES, (0.1, 0.5, 0.9), strict=True))
"""The metrics, and which share of the pairs has a smaller margin."""


@final
class Margins:
    """Rewards of pairs since the last log, on this process."""

    def __init__(self) -> None:
        self._restart(np.empty(0, np.float32))

    def _restart(self, margins: np.ndarray) -> None:
        self._chosen: list[Tensor] = []
        self._rejected: list[Tensor] = []
        self._on_host = margins

    def add(self, chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> None:
        """Adds the rewards of a batch's pairs, beta * nats; they stay on their device."""
        self._chosen.append(chosen.detach())
        self._rejected.append(rejected.detach())

    def reset(self) -> dict[str, float]:
        """The quantiles of the margins over all processes, which must ask together; none where there are no pairs.
        Between two margins they are interpolated linearly. Then all are forgotten. Waits for the device."""
        of_all: list[bytes] = gather_object([self._read().tobytes()])
        self._restart(np.empty(0, np.float32))
        margins = np.frombuffer(b"".join(of_all), np.float32).astype(np.float64)
        if not len(margins):
            return {}
        return dict(zip(QUANTILES, np.quantile(margins, [*QUANTILES.values()]).tolist(), strict=True))

    def record(self) -> str:
        """The margins, as text for a checkpoint. Waits for the device."""
        self._restart(self._read())
        return base64.b64encode(self._on_host.astype("<f4").tobytes()).decode()

    def restore(self, records: Sequence[str]) -> None:
        """Makes what `record` gave, of one process or of several, the margins that were added so far."""
        self._restart(np.frombuffer(b"".join(map(base64.b64decode, records)), "<f4").astype(np.float32))

    def _read(self) -> np.ndarray:
        """The margins so far, on the host."""
        if not self._chosen:
            return self._on_host
        margins = (cat(self._chosen).float() - cat(self._rejected).float()).cpu().numpy()
        return np.concatenate([self._on_host, margins])
