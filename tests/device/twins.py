"""A trainer that was made on the CPU is put on the pretend device: its tensors are exchanged for twins without values.

With the modules of a larger model beside it, a small model takes that one's shapes: parameters as large, and the
numbers that modules and the configuration keep. So a trainer of a model of any size is made in seconds.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from holdfast.reference.tensor_file import TensorMemory
from pretend.device import PretendDevice


class Twins:
    """The tensors' twins on `device`, each tensor's the same wherever it is found."""

    def __init__(self, device: PretendDevice) -> None:
        self._device = device
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor, so that its id stays taken

    def of(self, tensor: Tensor, shape: Any = None) -> Tensor:
        """The twin of `tensor`, which is in host memory; a twin is its own."""
        if tensor.device.type != "cpu":
            return tensor
        if id(tensor) not in self._made:
            twin = self._device.twin(tensor, shape)
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            self._made[id(tensor)] = tensor, twin
        return self._made[id(tensor)][1]

    def exchange(self, module: nn.Module, larger: nn.Module | None = None) -> None:
        """Exchanges all tensors of `module`, in place; for those of `larger`, a module with the same names."""
        others: dict[str, nn.Module] = {} if larger is None else dict(larger.named_modules())
        for name, part in module.named_modules():
            other = others.get(name)
            for kind in ("_parameters", "_buffers"):
                for key, tensor in vars(part)[kind].items():
                    if tensor is not None:
                        wanted = None if other is None else vars(other)[kind][key].shape
                        vars(part)[kind][key] = self.of(tensor, wanted)
            for key, value in list(vars(part).items()):
                if isinstance(value, Tensor):  # kept beside the buffers, such as `original_inv_freq`
                    vars(part)[key] = self.of(value, None if other is None else vars(other)[key].shape)
                elif other is not None and isinstance(value, int | float) and not isinstance(value, bool):
                    vars(part)[key] = vars(other)[key]
            if other is not None and "config" in vars(part):
                vars(vars(part)["config"]).update(vars(vars(other)["config"]))


def exchange_kept(holder: Any, twins: Twins) -> None:
    """Exchanges the tensors that objects of holdfast keep beside the modules, but for those kept in host memory."""
    for one in _reachable(holder):
        if isinstance(one, TensorMemory) and one._in_host_memory:
            continue
        attributes = vars(one)
        for key, value in attributes.items():
            if isinstance(value, Tensor):
                attributes[key] = twins.of(value)
            elif isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values()):
                for name, each in value.items():
                    value[name] = twins.of(each) if isinstance(each, Tensor) else each


def modules_of(holder: Any) -> list[nn.Module]:
    """The modules that `holder` and objects of holdfast within it keep, each once."""
    found = [value for one in _reachable(holder) for value in vars(one).values() if isinstance(value, nn.Module)]
    return list({id(module): module for module in found}.values())


def _reachable(holder: Any) -> Iterator[Any]:
    """`holder` and the objects of holdfast's references that it holds, directly or in a list, tuple or dict."""
    waiting, seen = [holder], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, list | tuple):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend(one.values())
        elif type(one).__module__.startswith("holdfast.reference") and hasattr(one, "__dict__"):
            yield one
            waiting.extend(vars(one).values())
