"""The flex route on a CPU: compiled by a backend that changes nothing, so its graphs can be counted and its gradients
compared. torch refuses gradients of FlexAttention on CPUs for want of a kernel; its definition has them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from holdfast.scoring.routes import choice, flex_kernel, probes
from holdfast.scoring.routes.flex import FlexRoute


def num_graphs() -> int:
    """How many graphs were compiled since `flex_on_cpu` was entered."""
    return counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def flex_on_cpu(backend: str = "aot_eager") -> Iterator[None]:
    """Inside, the flex route runs on CPUs and no other route does. Nothing is compiled yet."""
    compile_function = torch.compile

    def compiled(function: Callable[..., Any], **options: Any) -> Any:
        return compile_function(function, **{"backend": backend} | options)

    changes: list[Any] = [
        patch.object(flex_attention, "_validate_device", lambda *_: None),
        patch.object(flex_kernel.torch, "compile", compiled),
        patch.object(FlexRoute, "runs_on", lambda self, device, dtype: True),
        patch.object(choice, "candidates", lambda device, dtype: [choice.FLEX]),
        patch.dict(flex_kernel._COMPILED, clear=True),
        patch.object(probes, "works", lambda *_: True),
    ]
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()
