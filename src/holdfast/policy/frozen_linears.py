"""Which frozen weights of a model are read by linear layers alone, in fp32 and under autocast in half precision.

Autocast casts the arguments of a linear map to its dtype in every forward pass. A weight that no other operation reads
may be held in that dtype, and no number changes. So a weight counts only if each module that has it is exactly such a
layer: `nn.Linear`, or the `Conv1D` of GPT-2. A weight that is tied to an embedding does not count, nor do norms,
embeddings, experts in one tensor, adapters, and the layer below an adapter that reads its weight (DoRA). Given up:
subclasses of these layers, and adapters of kinds that are not listed here.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.vera.layer import Linear as VeraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from holdfast.internals.peft import adapter_layers
from holdfast.policy.quantised import is_quantised
from holdfast.policy.sharding import is_sharded

_LAYERS = (nn.Linear, Conv1D)
PLAIN: tuple[type, ...] = (nn.Parameter,)
"""The classes of parameters without products of their own, which quantised ones have."""
_ADAPTED = (LoraLinear, VeraLinear, IA3Linear, SVDLinear)
"""Adapted layers that call the layer below and never read its weight."""


def frozen_linears(models: Sequence[nn.Module], *, unfit: Iterable[nn.Module] = ()) -> dict[str, nn.Parameter]:
    """The frozen fp32 weights and biases that linear layers of `models` alone read, each once, by name: `<number of the
    model>.<name in it>`. Nothing of a quantised or sharded model, of one of `unfit`, or of one that has it in common
    with these."""
    names: dict[int, str] = {}
    parameters: dict[int, nn.Parameter] = {}
    others: set[int] = set()
    unfit = {*unfit}
    for number, model in enumerate(models):
        is_fit = model not in unfit and not is_quantised(model) and not is_sharded(model)
        readers = _readers_of_weights(model)
        for path, module in model.named_modules():
            is_layer = is_fit and type(module) in _LAYERS and "forward" not in vars(module) and module not in readers
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                names.setdefault(id(parameter), f"{number}.{path}.{name}")
                parameters[id(parameter)] = parameter
                if not (is_layer and _is_frozen(parameter)):
                    others.add(id(parameter))
    others |= _sharing_memory(parameters.values())
    return {names[key]: parameter for key, parameter in parameters.items() if key not in others}


def num_bytes(parameters: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    """The bytes of the values of `parameters`: as they are, or in `dtype`."""
    return sum(p.numel() * (p.element_size() if dtype is None else dtype.itemsize) for p in parameters)


def _is_frozen(parameter: nn.Parameter) -> bool:
    is_plain = type(parameter) in PLAIN and parameter.dtype == torch.float32
    return is_plain and parameter.numel() > 0 and not parameter.requires_grad and parameter.grad is None


def _readers_of_weights(model: nn.Module) -> set[nn.Module]:
    """The modules of adapters, and those below an adapter that reads their weights."""
    found: set[nn.Module] = set()
    for layer in adapter_layers(model).values():
        below = _below(layer)
        found.update(_modules_without(layer, below) if below is not None else layer.modules())
    return found


def _below(layer: Any) -> nn.Module | None:
    """The module below an adapter that does no more than call it; None where the adapter reads its weight."""
    if isinstance(layer, ModulesToSaveWrapper):
        return layer.original_module
    if type(layer) not in _ADAPTED or layer.merged:
        return None
    is_variant = bool(getattr(layer, "lora_variant", None)) or any(getattr(layer, "use_dora", {}).values())
    return None if is_variant else layer.base_layer


def _modules_without(layer: nn.Module, below: nn.Module) -> Iterator[nn.Module]:
    for child in layer.children():
        if child is not below:
            yield from child.modules()


def _sharing_memory(parameters: Iterable[nn.Parameter]) -> set[int]:
    """The ids of parameters whose values begin where those of another one do."""
    first: dict[tuple[torch.device, int], int] = {}
    found: set[int] = set()
    for parameter in parameters:
        if parameter.is_meta or not parameter.data_ptr():  # it has no values
            continue
        key = id(parameter)
        other = first.setdefault((parameter.device, parameter.data_ptr()), key)
        if other != key:
            found |= {key, other}
    return found
