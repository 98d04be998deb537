"""The pretend accelerator: tensors "on" cuda have shapes and no values; tensors in host memory are real.

`PretendDevice` is a dispatch mode. An operation that touches a tensor on the device, or makes one, runs as a fake one,
and is told to the `observer`; every other runs as ever. So what the host computes has its values, as on a GPU, and what
comes back from the device is zero. Three things are told: operations on the device, copies between it and the host, and
reads, for which the host would wait for the device. A read of one number is answered, with zero, and the run goes on.

Given up: values. What depends on them is not seen, and neither is what a kernel does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretend.pinned import is_pinned, pin

CUDA = torch.device("cuda", 0)

READS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::bincount",
    "aten::is_nonzero", "aten::allclose",
}  # fmt: skip
"""Operations of which the host must know the result, or its size."""

INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
NO_KERNEL = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift", "aten::lift_fresh", "aten::set_", "aten::resize_",
    "aten::detach", "aten::detach_", "aten::record_stream", "aten::is_same_size", "prim::device",
}  # fmt: skip
"""Operations that start nothing on a device, besides views."""


@dataclass(frozen=True, slots=True)
class Event:
    """`kind` is "operation", "copy" or "read"; of a copy, `detail` says from where to where, and whether it blocks."""

    kind: str
    name: str
    detail: str = ""
    blocks: bool = False
    args: tuple[Any, ...] = ()


class PretendDevice(TorchDispatchMode):
    """Inside, there is one device, cuda:0. `observer` is told of every event on it."""

    def __init__(self, observer: Callable[[Event], None]) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._observer = observer
        self._lifts: list[bool] = []

    def __enter__(self) -> Any:
        self._lifts.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` copies where this mode sees it
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts.pop())

    def twin(self, tensor: Tensor, shape: Iterable[int] | None = None) -> Tensor:
        """A tensor on the device like `tensor`, which is in host memory; of another shape where one is given."""
        with self.fake:
            if shape is not None and tuple(shape) != tuple(tensor.shape):
                return torch.empty(tuple(shape), dtype=tensor.dtype, device=CUDA)
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, device = func._schema.name, kwargs.get("device")
        if kwargs.get("pin_memory") and (device is None or torch.device(device).type == "cpu"):
            return pin(func(*args, **kwargs | {"pin_memory": False}))
        if name == "aten::_pin_memory":
            return pin(args[0].clone())
        is_here = device is not None and torch.device(device).type == "cuda"
        if not is_here and not _has_fake(args) and not (kwargs and _has_fake(kwargs.values())):
            return func(*args, **kwargs)
        if name in COPIES:
            return self._copied(func, name, args, kwargs)
        if name in INDEXING:
            self._see_indices(name, args)
        if name in READS or f"{name}.{func._overloadname}" in READS:
            return self._read(func, name, args, kwargs)
        if func.is_view or name in NO_KERNEL:
            with self.fake:
                return func(*args, **kwargs)
        if name == "aten::_grouped_mm" and args[0].dtype != torch.bfloat16:
            return self._grouped_in_a_loop(func, args, kwargs)
        self._observer(Event("operation", name, args=args))
        with self.fake:
            return func(*args, **kwargs)

    def _grouped_in_a_loop(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """torch has a grouped kernel for bf16 alone. In other dtypes it reads how many rows each group has, and makes a
        product for each; its fake version refuses them."""
        left, right, *others = args
        self._observer(Event("read", "aten::_grouped_mm in a loop over groups"))
        ends = kwargs.get("offs", others[0] if others else None)
        for _ in range(len(ends)):
            self._observer(Event("operation", "aten::mm", args=args))
        with self.fake:
            half = func(left.to(torch.bfloat16), right.to(torch.bfloat16), *others, **kwargs)
            return torch.empty_like(half, dtype=left.dtype)

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        self._observer(Event("read", name))
        if name == "aten::_local_scalar_dense":
            dtype = args[0].dtype
            return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        if name in ("aten::equal", "aten::is_nonzero", "aten::allclose"):
            return False
        with self.fake:
            return func(*args, **kwargs)

    def _see_indices(self, name: str, args: Any) -> None:
        for index in args[1]:
            if not isinstance(index, Tensor):
                continue
            if index.dtype in (torch.bool, torch.uint8):
                self._observer(Event("read", f"{name} by booleans"))
            if index.device.type == "cpu" and isinstance(args[0], FakeTensor):
                self._observer(Event("copy", f"{name} by host tensor", "cpu->cuda", blocks=True))

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        into = name == "aten::copy_"
        source = args[1] if into else args[0]
        target = args[0].device if into else torch.device(kwargs.get("device") or source.device)
        asks_not_to_wait = bool(kwargs.get("non_blocking") or (into and len(args) > 2 and args[2]))
        if source.device.type == target.type:
            self._observer(Event("operation", name, args=(source,)))
            with self.fake:
                return func(*args, **kwargs)
        way = f"{source.device.type}->{target.type}"
        if target.type == "cuda":
            unpinned = not is_pinned(source)
            detail = f"{way} from unpinned memory" if asks_not_to_wait and unpinned else way
            self._observer(Event("copy", name, detail, blocks=not asks_not_to_wait or unpinned))
            if into:
                return args[0]
            with self.fake:
                return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=CUDA)
        blocks = not asks_not_to_wait or (into and not is_pinned(args[0]))
        self._observer(Event("copy", name, way, blocks=blocks))
        if into:
            return args[0].zero_()
        made = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return pin(made) if asks_not_to_wait else made


def _has_fake(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, FakeTensor):
            return True
        if isinstance(value, list | tuple) and _has_fake(value):
            return True
    return False
