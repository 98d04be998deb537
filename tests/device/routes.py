"""Which attention routes work on the pretend device: they are tried with values, which do not exist there. The head's
kernels work."""

import contextlib
from collections.abc import Iterator, Sequence
from unittest.mock import patch

from torch._subclasses.fake_tensor import FakeTensor

from holdfast.scoring import causal_lm, flex, head
from pretend.softmax import softmax_class


@contextlib.contextmanager
def only_these_work(names: Sequence[str]) -> Iterator[None]:
    """Inside, the routes of these names are found to work, and no other."""
    is_usable = patch.object(flex, "is_usable", lambda device, dtype: device.type == "cuda" and "flex" in names)
    plain_tensors = patch.object(causal_lm, "Tensor", FakeTensor)  # else no head would be a plain matrix
    with is_usable, plain_tensors, patch.object(head, "softmax_class", softmax_class):
        yield
