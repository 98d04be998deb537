"""Which attention routes work on the pretend device: they are tried with values, which do not exist there."""

import contextlib
from collections.abc import Iterator, Sequence
from unittest.mock import patch

from holdfast.scoring import flex


@contextlib.contextmanager
def only_these_work(names: Sequence[str]) -> Iterator[None]:
    """Inside, the routes of these names are found to work, and no other."""
    with patch.object(flex, "is_usable", lambda device, dtype: device.type == "cuda" and "flex" in names):
        yield
