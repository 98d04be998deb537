"""Which tensors of two models differ, by how much, and what that looks like: a rounding, a LoRA, another model.

Tensors go by their names in the bare model. An adapter is merged into the weights that it changes, and integers are
turned into numbers, each for the moment in which a tensor is compared; so a merged model and an adapter over its base
have the same tensors. Given up: adapters that peft cannot merge and integers that it cannot turn back are compared as
they are, under names of their own.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from holdfast.inspect.two_models.sides import Side
from holdfast.reference.identity.contents import module_contents
from holdfast.scoring.causal_lm import unwrap

Tensors = Mapping[str, Callable[[], Tensor]]
"""What reads a tensor, by its name in the bare model."""

_CHUNK = 2**24
_MOST_RANK = 256
_LEAST_SHARE = 1e-3
"""A singular value below this share of the largest one counts as noise."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A tensor whose values differ, compared in fp32.

    `largest` is the largest distance of two values, `relative` is |a - b| / |a| by Frobenius norms and `cosine`
    a.b / (|a| |b|), where a is the model's. `num_differing` of `num_values` values differ. Where only the number of
    rows is another, these are of the rows that both have; for other shapes they are None. `rounded` says whose values
    are the other's, rounded ("reference" or "model"), and to which dtype.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    largest: float | None
    relative: float | None
    cosine: float | None
    num_differing: int
    num_values: int
    rounded: tuple[str, str] | None

    @property
    def is_of_rows_only(self) -> bool:
        """Whether all rows that both have are equal, and only their number differs."""
        return self.shapes[0] != self.shapes[1] and self.largest is not None and self.num_differing == 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DifferingGroup:
    """Differing tensors of the same name in several layers: their number, of how many of that name, and the mean
    `relative` and largest `largest` of them (None where shapes do not fit)."""

    pattern: str
    count: int
    num_tensors: int
    relative: float | None
    largest: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All tensors of two models, compared.

    `num_common` have the same name, `num_equal` of them are equal to the bit. `only_model` and `only_reference` are
    names that the other lacks. `base_is_reference` says whether the model without its adapter is the reference to the
    bit, `model_is_base` whether the model is the reference without its adapter, `same_base` whether both are without
    theirs; None where there is no such adapter. `rank` is that of the difference of `rank_of`, a matrix, where it is
    low.
    """

    num_common: int
    num_equal: int
    differing: tuple[TensorDifference, ...]
    groups: tuple[DifferingGroup, ...]
    only_model: tuple[str, ...]
    only_reference: tuple[str, ...]
    base_is_reference: bool | None = None
    model_is_base: bool | None = None
    same_base: bool | None = None
    rank: int | None = None
    rank_of: str | None = None

    @property
    def are_equal(self) -> bool:
        """Whether both have the same tensors to the bit."""
        return not (self.differing or self.only_model or self.only_reference)

    @property
    def is_resized(self) -> bool:
        """Whether nothing differs but the number of rows of some tensors."""
        has_all = not (self.only_model or self.only_reference)
        return has_all and bool(self.differing) and all(each.is_of_rows_only for each in self.differing)

    @property
    def rounded(self) -> tuple[str, str] | None:
        """Whose tensors are the other's, rounded, and to which dtype, where that is so of all that differ."""
        found = {each.rounded for each in self.differing}
        has_all = not (self.only_model or self.only_reference)
        return next(iter(found)) if has_all and len(found) == 1 else None

    @property
    def is_of_other_dtype(self) -> bool:
        """Whether nothing differs but the dtypes of equal values."""
        has_all = not (self.only_model or self.only_reference)
        return (
            has_all
            and bool(self.differing)
            and all(d.shapes[0] == d.shapes[1] and d.num_differing == 0 for d in self.differing)
        )

    @property
    def is_of_other_shape(self) -> bool:
        """Whether one has tensors that the other lacks, or has in another shape (not only with more rows)."""
        return bool(self.only_model or self.only_reference) or any(d.relative is None for d in self.differing)

    @property
    def median_cosine(self) -> float | None:
        """The median cosine of the matrices that differ: near 1 for a model that was trained on, near 0 for another
        one. None where there is none."""
        cosines = sorted(each.cosine for each in self.differing if each.cosine is not None and len(each.shapes[0]) > 1)
        return cosines[len(cosines) // 2] if cosines else None

    @property
    def most_relative(self) -> float:
        """The largest `relative` of all; infinite where shapes do not fit."""
        return max((float("inf") if d.relative is None else d.relative for d in self.differing), default=0.0)


@torch.no_grad()
def compare_weights(model: Side, reference: Side) -> Weights:
    """The tensors of both, compared."""
    ours, theirs = tensors_of(model), tensors_of(reference)
    names = [name for name in ours if name in theirs]
    differing = [found for name in names if (found := _difference(name, ours[name](), theirs[name]()))]
    bare = {side.label: _without_adapter(side) for side in (model, reference) if side.peft is not None}
    base, other_base = bare.get(model.label), bare.get(reference.label)
    rank, rank_of = _rank(differing, ours, theirs)
    return Weights(
        num_common=len(names),
        num_equal=len(names) - len(differing),
        differing=tuple(differing),
        groups=_groups(differing, names),
        only_model=tuple(name for name in ours if name not in theirs),
        only_reference=tuple(name for name in theirs if name not in ours),
        base_is_reference=None if base is None else _are_equal(base, theirs),
        model_is_base=None if other_base is None else _are_equal(ours, other_base),
        same_base=None if base is None or other_base is None else _are_equal(base, other_base),
        rank=rank,
        rank_of=rank_of,
    )


# Reading -------------------------------------------------------------------------------------------------------------


def tensors_of(side: Side) -> Tensors:
    """The tensors that the model computes with, by name."""
    own: dict[str, Callable[[], Tensor]] = {}
    of_adapters: dict[str, Callable[[], Tensor]] = {}
    for contents in module_contents(side.model):
        for name, tensor in contents.tensors.items():
            (of_adapters if "|" in name else own)[name.removeprefix(".")] = partial(_itself, tensor)
    adapted = {name.partition("|")[0] for name in of_adapters}
    for path, module in _bare_modules(unwrap(side.model)):
        layer: Any = getattr(module, "base_layer", module)
        if _is_dequantisable(layer):  # its scales and code books are in its numbers
            kept = (f"{path}.bias", f"{path}.weight")
            own = {name: read for name, read in own.items() if name in kept or not name.startswith(f"{path}.")}
            own[f"{path}.weight"] = partial(_dequantised, layer)
        if path in adapted and isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            of_adapters = {name: read for name, read in of_adapters.items() if not name.startswith(f"{path}|")}
            own |= {f"{path}.{name}": partial(_merged, module, name) for name in _names(module)}
    return own | of_adapters


def _without_adapter(side: Side) -> Tensors:
    """The tensors that the model computes with while its adapter is off."""
    assert side.peft is not None
    with side.peft.disable_adapter():
        return {name: read for name, read in tensors_of(side).items() if "|" not in name}


def _bare_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    """The modules of a bare model by path; layers with adapters as they are, without what is in them."""
    yield path, module
    if not isinstance(module, BaseTunerLayer):
        for name, child in module.named_children():
            yield from _bare_modules(child, f"{path}.{name}" if path else name)


def _itself(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _chain(layer: Any) -> list[Any]:
    """The layers with adapters that stand around one layer, the innermost first."""
    layers = [layer]
    while isinstance(layers[0].base_layer, BaseTunerLayer):
        layers.insert(0, layers[0].base_layer)
    return layers


def _names(layer: Any) -> list[str]:
    """The names of the tensors that an adapter may be merged into."""
    base: nn.Module = layer.get_base_layer()
    return ["weight"] if _is_dequantisable(base) else [name for name, _ in base.named_parameters()]


def _merged(layer: Any, name: str) -> Tensor:
    """A tensor of a layer with its active adapters merged into it. The layer is left as it was, to the bit."""
    base: nn.Module = layer.get_base_layer()
    if _is_dequantisable(base):
        weight = _dequantised(base)
        added = [each.get_delta_weight(name) for each in _chain(layer) for name in each.active_adapters]
        return sum((delta.to(weight) for delta in added), weight)
    before = {key: parameter.detach().clone() for key, parameter in base.named_parameters()}
    for each in _chain(layer):
        each.merge()
    merged = base.get_parameter(name).detach().clone()
    for each in reversed(_chain(layer)):
        each.unmerge()
    for key, values in before.items():
        base.get_parameter(key).copy_(values)
    return merged


def _is_dequantisable(layer: Any) -> bool:
    """Whether the weight of a layer is integers that peft knows how to turn into numbers."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and type(weight).__name__ in ("Params4bit", "Int8Params")


def _dequantised(layer: Any) -> Tensor:
    return dequantize_module_weight(layer).detach()


# Comparing -----------------------------------------------------------------------------------------------------------


def _are_equal(ours: Tensors, theirs: Tensors) -> bool:
    if ours.keys() != theirs.keys():
        return False
    return all(_is_same(ours[name](), theirs[name]()) for name in ours)


def _is_same(ours: Tensor, theirs: Tensor) -> bool:
    same_kind = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same_kind and torch.equal(ours.cpu(), theirs.cpu())


def _difference(name: str, ours: Tensor, theirs: Tensor) -> TensorDifference | None:
    """How a tensor differs; None where it does not."""
    if _is_same(ours, theirs):
        return None
    shapes = tuple(ours.shape), tuple(theirs.shape)
    dtypes = tuple(str(each.dtype).removeprefix("torch.") for each in (ours, theirs))
    ours, theirs = ours.cpu(), theirs.cpu()
    if shapes[0][1:] == shapes[1][1:] and len(shapes[0]) == len(shapes[1]) > 0:
        rows = min(shapes[0][0], shapes[1][0])
        ours, theirs = ours[:rows], theirs[:rows]
    if ours.shape != theirs.shape:
        return TensorDifference(name=name, shapes=shapes, dtypes=(dtypes[0], dtypes[1]), largest=None, relative=None,
                                cosine=None, num_differing=0, num_values=0, rounded=None)  # fmt: skip
    numbers = _Distance.between(ours, theirs)
    return TensorDifference(
        name=name,
        shapes=shapes,
        dtypes=(dtypes[0], dtypes[1]),
        largest=numbers.largest,
        relative=numbers.relative,
        cosine=numbers.cosine,
        num_differing=numbers.num_differing,
        num_values=ours.numel(),
        rounded=_rounded(ours, theirs),
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Distance:
    largest: float
    relative: float
    cosine: float | None
    num_differing: int

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> "_Distance":
        """The distance of two tensors of one shape, summed in fp64 over chunks."""
        largest, num_differing = 0.0, 0
        squares = torch.zeros(4, dtype=torch.float64)  # of a - b, of a, of b, and a.b
        for a, b in zip(ours.reshape(-1).split(_CHUNK), theirs.reshape(-1).split(_CHUNK), strict=True):
            a, b = a.double(), b.double()
            gap = a - b
            largest = max(largest, float(gap.abs().max())) if len(gap) else largest
            num_differing += int((a != b).sum())
            squares += torch.stack([gap @ gap, a @ a, b @ b, a @ b])
        of_gap, of_a, of_b, product = squares.tolist()
        relative = (of_gap / of_a) ** 0.5 if of_a else (float("inf") if of_gap else 0.0)
        norms = (of_a * of_b) ** 0.5
        cosine = product / norms if norms else None
        return cls(largest=largest, relative=relative, cosine=cosine, num_differing=num_differing)


def _rounded(ours: Tensor, theirs: Tensor) -> tuple[str, str] | None:
    """Whose values are the other's, rounded to a smaller dtype; None where neither is, and where all are equal."""
    if not (ours.is_floating_point() and theirs.is_floating_point()) or torch.equal(ours.float(), theirs.float()):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        if torch.equal(ours.to(dtype).float(), theirs.float()):
            return "reference", name
        if torch.equal(theirs.to(dtype).float(), ours.float()):
            return "model", name
    return None


def pattern_of(name: str) -> str:
    """A tensor's name with `*` in place of its layer's number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _groups(differing: Sequence[TensorDifference], names: Sequence[str]) -> tuple[DifferingGroup, ...]:
    """The differing tensors by name without the layer's number, those that differ most first."""
    patterns = [pattern_of(name) for name in names]
    groups = []
    for pattern in dict.fromkeys(pattern_of(each.name) for each in differing):
        of_group = [each for each in differing if pattern_of(each.name) == pattern]
        relative = [each.relative for each in of_group if each.relative is not None]
        largest = [each.largest for each in of_group if each.largest is not None]
        fits = len(relative) == len(of_group)
        groups.append(
            DifferingGroup(
                pattern=pattern,
                count=len(of_group),
                num_tensors=patterns.count(pattern),
                relative=sum(relative) / len(relative) if fits else None,
                largest=max(largest) if fits else None,
            )
        )
    return tuple(sorted(groups, key=lambda group: -(float("inf") if group.relative is None else group.relative)))


def _rank(differing: Sequence[TensorDifference], ours: Tensors, theirs: Tensors) -> tuple[int | None, str | None]:
    """The rank of the difference of the matrix that differs most, where it is at most a quarter of what it could be.

    The difference is multiplied by a random matrix of `_MOST_RANK` + 1 columns, which keeps a rank up to `_MOST_RANK`
    (Halko et al. 2011, arXiv:0909.4061).
    """
    matrices = [d for d in differing if d.relative and len(d.shapes[0]) == 2 and d.shapes[0] == d.shapes[1]]
    if not matrices:
        return None, None
    name = max(matrices, key=lambda each: each.relative or 0.0).name
    gap = ours[name]().cpu().double() - theirs[name]().cpu().double()
    if not bool(gap.isfinite().all()):
        return None, None
    draw = torch.Generator().manual_seed(0)
    columns = min(_MOST_RANK + 1, *gap.shape)
    values = torch.linalg.svdvals(gap @ torch.randn(gap.shape[1], columns, generator=draw, dtype=gap.dtype))
    rank = int((values > _LEAST_SHARE * values[0]).sum())
    return (rank, name) if rank <= min(_MOST_RANK, *(size // 4 for size in gap.shape)) else (None, None)
