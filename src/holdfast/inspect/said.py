"""What a run says of its data while it prepares them: its warnings, collected, so that a report shows them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def warnings_collected() -> Iterator[list[str]]:
    """A context in which the warnings that this package logs are in a list, in their order."""
    collector = _Collector()
    logger = logging.getLogger("holdfast")
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)
