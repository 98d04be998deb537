"""What all processes of a run decide together, so that none waits for a step that another does not take.

Where weights are spread over processes, every forward pass is one of all processes: it gathers weights from them. So
all make the same passes in the same order, and whether to make one is no process's own decision. The same holds for an
error: a process that raises alone leaves the others waiting for it.

Each function here is a collective call, which all processes make at the same place of the code. In a run of one process
they return at once. Given up: time for an exchange between the processes, so nothing here is called where processes may
go their own ways, as under DDP between two steps of the optimizer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

T = TypeVar("T")

_KINDS: tuple[type[Exception], ...] = (TypeError, ValueError)
"""The kinds of error that all processes raise as such. Any other is a RuntimeError on the processes that had none."""

_IS_OF_ALL = "_is_raised_by_all_processes"


def num_processes() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def of_all(value: T) -> list[T]:
    """The `value` of each process, in their order."""
    if num_processes() == 1:
        return [value]
    values: list[T | None] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values  # pyright: ignore[reportReturnType]


def any_of_all(flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    return largest_of_all([float(flag)])[0] > 0


def largest_of_all(values: Sequence[float]) -> list[float]:
    """The largest value of any process, at each place of `values`."""
    if num_processes() == 1:
        return list(values)
    return reduced(torch.tensor(values, dtype=torch.float32), dist.ReduceOp.MAX).tolist()


def reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """`values` of all processes, put together place by place; in host memory."""
    if num_processes() == 1:
        return values
    has_cpu = "gloo" in dist.get_backend_config()  # else a collective call takes tensors on the device
    own = values.to("cpu" if has_cpu else PartialState().device, copy=True)
    dist.all_reduce(own, operation)
    return own.cpu()


@contextlib.contextmanager
def raised_together(*, where: bool = True) -> Iterator[None]:
    """A context that ends with an error on all processes where it ends with one on any: that of the first process that
    has one, and the message says which process that is, unless all have the same.

    No collective call may follow an error inside the context, unless all processes make it. Such an error that all
    processes raise already passes. With `where` false each process raises its own.
    """
    if not where or num_processes() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if is_of_all(error):
            raise
        own = error
    raise_first(own)


def raise_first(own: Exception | None) -> None:
    """Raises, on all processes, the error of the first process that has one (`own` on this process); see
    `raised_together`."""
    errors = of_all(None if own is None else (_kind(own), _message(own)))
    first = next((number for number, error in enumerate(errors) if error is not None), None)
    if first is None:
        return
    kind, message = errors[first] or (RuntimeError, "")
    if any(error != errors[first] for error in errors):
        message = f"Process {first} of {len(errors)}: {message}"
    raised = kind(message)
    setattr(raised, _IS_OF_ALL, True)
    raise raised from own


def is_of_all(error: Exception) -> bool:
    """Whether all processes raise `error`, by this module."""
    return hasattr(error, _IS_OF_ALL)


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, (*_KINDS, RuntimeError)) else f"{type(error).__name__}: {error}"
