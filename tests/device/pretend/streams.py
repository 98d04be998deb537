"""Streams and events of the pretend device, where all is done at once. To wait for one is told as a read."""

from collections.abc import Callable
from typing import Any

from pretend.device import Event


class IdleEvent:
    """A `torch.cuda.Event`."""

    def __init__(self, observer: Callable[[Event], None]) -> None:
        self._observer = observer

    def record(self, stream: Any = None) -> None:
        """Nothing: all that was asked for is done."""

    def wait(self, stream: Any = None) -> None:
        """Nothing: a stream waits, and the host does not."""

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """The milliseconds to another event: none."""
        return 0.0

    def synchronize(self) -> None:
        """The host would wait."""
        self._observer(Event("read", "event.synchronize"))


class IdleStream:
    """A `torch.cuda.Stream`."""

    def __init__(self, observer: Callable[[Event], None]) -> None:
        self._observer = observer

    def wait_stream(self, stream: Any) -> None:
        """Nothing: a stream waits, and the host does not."""

    def wait_event(self, event: Any) -> None:
        """Nothing: a stream waits, and the host does not."""

    def record_event(self, event: Any = None) -> IdleEvent:
        """An event that has happened."""
        return event or IdleEvent(self._observer)

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def synchronize(self) -> None:
        """The host would wait."""
        self._observer(Event("read", "stream.synchronize"))
