"""Which attention routes work on the pretend device: they are tried with values, which do not exist there."""

import contextlib
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import torch

from holdfast.scoring.routes import probes
from holdfast.scoring.routes.base import Route
from holdfast.scoring.routes.choice import ROUTES


@contextlib.contextmanager
def only_these_work(names: Sequence[str]) -> Iterator[None]:
    """Inside, the routes of these names are found to work on the device, and no other but the last, which always does.
    With no names, all of them work."""

    def works(route: Route, device: torch.device, dtype: torch.dtype) -> bool:
        return not names or route.name in names or route is ROUTES[-1]

    with patch.object(probes, "works", works):
        yield
