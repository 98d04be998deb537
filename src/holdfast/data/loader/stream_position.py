"""Where in a stream a run is: what a resumed run must skip, and what transformers does not know.

It takes an epoch of a stream for `max_steps` steps, however often the stream begins again, so after a second pass it
would skip the wrong number of batches. Here passes and batches are counted as they are handed out.
"""

from collections.abc import Iterator
from typing import Any, final


@final
class StreamPosition:
    """`num_passes` through the stream are over, and `num_batches` of the next are handed out."""

    def __init__(self, num_passes: int = 0, num_batches: int = 0) -> None:
        self.num_passes = num_passes
        self.num_batches = num_batches
        self._batches: Iterator[Any] | None = None

    def record(self) -> dict[str, int]:
        """As JSON holds it: the arguments that make it again."""
        return {"num_passes": self.num_passes, "num_batches": self.num_batches}

    def advance(self, batches: Iterator[Any], num_batches: int) -> None:
        """`num_batches` more were taken from `batches`; another iterator than before is another pass."""
        if self._batches is not None and batches is not self._batches:
            self.num_passes, self.num_batches = self.num_passes + 1, 0
        self._batches = batches
        self.num_batches += num_batches
