"""A run's position in a stream, to which a resumed run must skip.

transformers takes `max_steps` steps for one epoch of a stream, however often the stream begins again. So after a second
pass it would skip the wrong number of batches. Here passes and batches are counted as they are handed out. Given up:
skipping without reading: a resumed run reads the stream up to this position.
"""

from collections.abc import Iterator
from typing import Any, final


@final
class StreamPosition:
    """`num_passes` through the stream are over, and `num_batches` of the current pass were handed out."""

    def __init__(self, num_passes: int = 0, num_batches: int = 0) -> None:
        self.num_passes = num_passes
        self.num_batches = num_batches
        self._batches: Iterator[Any] | None = None

    def record(self) -> dict[str, int]:
        """The position as a checkpoint's JSON holds it: the arguments of the constructor."""
        return {"num_passes": self.num_passes, "num_batches": self.num_batches}

    def advance(self, batches: Iterator[Any], num_batches: int) -> None:
        """Counts `num_batches` more that were taken from `batches`. Another iterator than before is another pass."""
        if self._batches is not None and batches is not self._batches:
            self.num_passes, self.num_batches = self.num_passes + 1, 0
        self._batches = batches
        self.num_batches += num_batches
