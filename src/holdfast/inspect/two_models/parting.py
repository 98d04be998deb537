"""Where the hidden states of two models part: the first module, in the order of computing, that gives other numbers.

Both models compute one sequence, that of the largest gap. Hooks on every module see what it is given and what it
returns, under the module's name in the bare model. A module that returns other numbers although it was given the same
is where they part; where one is given other numbers although all modules before returned the same, they part in the
code between, such as the attention itself. Of each tensor the last `_KEPT` tokens up to that of the gap are kept, of
embeddings all. Given up: what happens at earlier tokens alone.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from holdfast.batch import PairBatch
from holdfast.inspect.two_models.gaps import on_device
from holdfast.inspect.two_models.rows import Completion, Rows
from holdfast.inspect.two_models.sides import Side
from holdfast.scoring.causal_lm import output_embeddings, unwrap
from holdfast.scoring.frozen import frozen_logps

_KEPT = 64
_LAYER = re.compile(r"(?:.*\.)?\d+")


class Event(NamedTuple):
    """What a module is given ("given") or returns ("returned"), and which of the tensors: a number or a name."""

    module: str
    when: str
    what: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Parted:
    """Tensors that differ: the event, and |a - b| / |a| over the kept tokens, where a is the model's (None where the
    shapes do not fit, or where one has no such tensor)."""

    event: Event
    relative: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistance:
    """How far the hidden states are apart that a layer returns: |a - b| / |a|."""

    name: str
    relative: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Where the hidden states of two models part on a completion of `num_tokens` tokens.

    `first` is the first tensor that is not equal to the bit, `beyond_rounding` the first that is further apart than
    `rounding`; None where there is none. `layers` are the embeddings, all layers and the last norm, in order.
    """

    row: int
    side: str
    num_tokens: int
    rounding: float
    first: Parted | None
    beyond_rounding: Parted | None
    layers: tuple[LayerDistance, ...]


Recorded = dict[Event, Tensor]


def record(side: Side, rows: Rows, completion: Completion, position: int, device: torch.device) -> Recorded:
    """What every module of a model is given and returns for a completion, in order, in host memory."""
    recorded: Recorded = {}
    sequence = completion.sequence
    kept = slice(max(0, position + 1 - _KEPT), position + 1)
    batch = PairBatch.from_tensors(on_device(rows.layout.of_completions([sequence]), device))
    num_columns = batch.inputs["input_ids"].shape[1]

    def keep(event: Event, tensor: Tensor) -> None:
        is_of_tokens = tensor.dim() > 1 and tensor.shape[1] == num_columns
        part = tensor[:, kept] if is_of_tokens and tensor.is_floating_point() else tensor
        recorded.setdefault(event, part.detach().to("cpu", copy=True))

    with _watched(side.model, keep):
        frozen_logps(side.model, batch, nullcontext)
    return recorded


def compare_states(model: Recorded, reference: Recorded, completion: Completion, rounding: float) -> Parting:
    """Where two models part that recorded these."""
    distances = {event: _relative(tensor, reference[event]) for event, tensor in model.items() if event in reference}
    parted = [
        Parted(event=event, relative=distance)
        for event, distance in distances.items()
        if distance is None or distance > 0 or not _is_equal(model[event], reference[event])
    ]
    beyond = (each for each in parted if each.relative is None or not each.relative <= rounding)
    layers = [
        LayerDistance(name=event.module, relative=distance)
        for event, distance in distances.items()
        if event.when == "returned" and event.what in ("0", "") and _is_of_layers(event.module, model)
    ]
    return Parting(
        row=completion.row,
        side=completion.side,
        num_tokens=len(completion.sequence.ids),
        rounding=rounding,
        first=next(iter(parted), None),
        beyond_rounding=next(beyond, None),
        layers=tuple(layers),
    )


def _is_of_layers(name: str, recorded: Recorded) -> bool:
    """Whether a module is a layer of the body, or a module of the body that stands beside its layers."""
    if _LAYER.fullmatch(name):
        return name.count(".") == min(each.module.count(".") for each in recorded if _LAYER.fullmatch(each.module))
    is_beside = "norm" in name.rpartition(".")[2] or "emb" in name.rpartition(".")[2] or name.endswith(("ln_f", "wte"))
    depth = min((each.module.count(".") for each in recorded if _LAYER.fullmatch(each.module)), default=0)
    return is_beside and "rotary" not in name and name.count(".") < depth


def _is_equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


def _relative(ours: Tensor, theirs: Tensor) -> float | None:
    if ours.shape != theirs.shape:
        return None
    a, b = ours.double(), theirs.double()
    a, b = (torch.nan_to_num(each, neginf=-1e30, posinf=1e30) for each in (a, b))
    norm, gap = float(a.norm()), float((a - b).norm())
    return gap / norm if norm else (float("inf") if gap else 0.0)


@contextlib.contextmanager
def _watched(model: nn.Module, keep: Callable[[Event, Tensor], None]) -> Iterator[None]:
    """A context in which `keep` gets every floating-point tensor that a module is given or returns.

    The head is not asked: scoring gives it another forward. What it is given is.
    """
    causal_lm = unwrap(model)
    head = output_embeddings(causal_lm)

    def given(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for what, tensor in _tensors({**{str(n): each for n, each in enumerate(args)}, **kwargs}):
                keep(Event(name, "given", what), tensor)

        return hook

    def returned(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            for what, tensor in _tensors(output):
                keep(Event(name, "returned", what or "0"), tensor)

        return hook

    handles = []
    try:
        for name, module in _bare_modules(causal_lm):
            handles.append(module.register_forward_pre_hook(given(name), with_kwargs=True))
            if module is not head:
                handles.append(module.register_forward_hook(returned(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bare_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules inside a bare model, by path; one with adapters as a whole."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        yield inner, child
        if not isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield from _bare_modules(child, inner)


def _tensors(value: Any, what: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a nest of mappings and sequences, each with its path in it."""
    if isinstance(value, Tensor):
        yield what, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _tensors(each, f"{what}.{key}" if what else str(key))
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _tensors(each, f"{what}.{number}" if what else str(number))
