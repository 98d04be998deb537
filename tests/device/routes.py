"""Which attention routes work on the pretend device: they are tried with values, which do not exist there. The head's
kernels work."""

import contextlib
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

from holdfast.scoring import causal_lm, head
from holdfast.scoring.routes import flex_kernel, probes
from holdfast.scoring.routes.base import Route
from holdfast.scoring.routes.choice import ROUTES
from pretend.softmax import softmax_class


@contextlib.contextmanager
def only_these_work(names: Sequence[str]) -> Iterator[None]:
    """Inside, the routes of these names are found to work on the device, and no other but the last, which always does.
    With no names, all of them work. What a route would compile runs as it is: it ends in one kernel."""

    def works(route: Route, device: torch.device, dtype: torch.dtype) -> bool:
        return not names or route.name in names or route is ROUTES[-1]

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(probes, "works", works))
        stack.enter_context(patch.object(flex_kernel, "compiled", lambda function: function))
        stack.enter_context(patch.object(causal_lm, "Tensor", FakeTensor))  # else no head would be a plain matrix
        stack.enter_context(patch.object(head, "softmax_class", softmax_class))
        yield
