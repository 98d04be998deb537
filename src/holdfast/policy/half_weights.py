"""The frozen weights of linear layers in half precision, while a run computes under autocast.

Autocast casts an fp32 weight in every forward pass, and casts one that does not train to the same numbers each time.
`HalfWeights` casts it once and lets go of the fp32 values: log-probs and gradients are the same to the bit, in half the
memory for these weights. What holdfast believes of a model is tried: `numbers` of it are compared before and after, and
a model that computes another number is left as it was loaded.

The original values come back whenever somebody reads weights rather than computes: at the end of a run, for a state
dict, for a digest or a sync, and for a forward pass outside of autocast. Most models were read from files in half
precision, so a cast back gives the original. The other values are kept by `Originals` meanwhile. Given up: seeing that
somebody reads `parameter.data`; a weight that was changed while it was held is an error when it is put back.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from holdfast.internals.torch import is_compiled, uncompiled
from holdfast.policy.frozen_linears import frozen_linears
from holdfast.scoring.causal_lm import unwrap

_CHUNK = 2**22
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Numbers = Callable[[nn.Module], list[Tensor]]
"""The numbers by which a model is compared with itself: log-probs, and gradients where it trains."""


class Originals(Protocol):
    """Keeps values that a cast to half precision would lose."""

    def keep(self, name: str, value: Tensor) -> None:
        """Keeps `value` under `name`. ValueError where there is no room."""
        ...

    def read(self, name: str) -> Tensor:
        """The value of that name. ValueError where it is not the one that was kept."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A parameter in half precision with the checksum of its bits. `is_exact`: a cast back gives its fp32 values."""

    name: str
    parameter: nn.Parameter
    checksum: Tensor
    is_exact: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What is held: the number of weights, their bytes as loaded and as they are held, how many have originals that
    are kept, how many were left for want of room to keep them, and how many models were left as loaded."""

    num_weights: int
    bytes_loaded: int
    bytes_held: int
    num_kept: int
    num_left: int
    num_models_left: int


@final
class HalfWeights:
    """Holds frozen weights in `dtype`."""

    def __init__(self, dtype: torch.dtype, numbers: Numbers) -> None:
        self.dtype = dtype
        self._numbers = numbers
        self._originals: Originals | None = None
        self._held: dict[int, _Held] = {}
        self._left: set[str] = set()
        self._is_complete = False
        self._is_within_step = False
        self._reads_adapters_alone = False
        self._hooks: list[RemovableHandle] = []
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._tried: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        """The models that were tried, and whether with all of their weights."""
        self._unfit: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    # --- holding ------------------------------------------------------------------------------------------------------

    def hold(self, models: Sequence[nn.Module], originals: Originals | None) -> None:
        """Casts what can be held of `models`; what is held already stays. Without `originals`, only weights that a cast
        back restores. It must be called before each step, since what starts to train is put back."""
        self.put_back(held.parameter for held in self._held.values() if held.parameter.requires_grad)
        if self._is_complete:
            return
        self._originals = originals
        is_all = originals is not None
        untried = [model for model in models if self._tried.get(model, False) < is_all or model not in self._tried]
        before = [self._stable_numbers(model) for model in untried] if frozen_linears(untried) else []
        self._cast(models)
        for model, expected in zip(untried, before, strict=bool(before)):
            self._tried[model] = is_all
            if not self._gives(model, expected):
                self._unfit.add(model)
        if any(model in self._unfit for model in untried):
            self.put_back()
            self._cast(models)
        self._is_complete = True

    def _cast(self, models: Sequence[nn.Module]) -> None:
        for name, parameter in frozen_linears(models, unfit=self._unfit).items():
            if (held := self._cast_one(name, parameter)) is not None:
                self._held[id(parameter)] = held
        for model in models if self._held else ():
            self._watch(model)

    @torch.no_grad()
    def _cast_one(self, name: str, parameter: nn.Parameter) -> _Held | None:
        value = parameter.data
        half = value.to(self.dtype)
        is_exact = equal(half.float(), value)
        if not is_exact:
            if self._originals is None or not half.isfinite().all():
                return None
            try:
                self._originals.keep(name, value)
            except ValueError:
                self._left.add(name)
                return None
        parameter.data = half
        return _Held(name=name, parameter=parameter, checksum=checksum(half), is_exact=is_exact)

    def holding(self, models: Sequence[nn.Module]) -> Holding:
        """What of `models` is held now."""
        now = [held for held in self._held.values() if self._is_half(held)]
        numbers = [held.parameter.numel() for held in now]
        return Holding(
            num_weights=len(numbers),
            bytes_loaded=sum(numbers) * torch.float32.itemsize,
            bytes_held=sum(numbers) * self.dtype.itemsize,
            num_kept=sum(not held.is_exact for held in now),
            num_left=len(self._left),
            num_models_left=sum(model in self._unfit for model in models),
        )

    # --- putting back -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def put_back(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Gives `parameters`, or all that are held, their original values until the next `hold`. ValueError where one
        was changed while it was held, or where its values are lost."""
        chosen = self._held.keys() if parameters is None else map(id, parameters)
        changed: list[str] = []
        for held in [self._held[key] for key in chosen if key in self._held]:
            if not self._is_half(held):
                continue
            self._is_complete = False
            if equal(checksum(held.parameter.data), held.checksum):
                held.parameter.data = self._original(held)
            else:
                changed.append(held.name.partition(".")[2])
                held.parameter.data = held.parameter.data.float()
        if changed:
            raise ValueError(
                f"The frozen weight `{changed[0]}` (first of {len(changed)}) was held in {self.dtype} while the run "
                "computes, and was changed meanwhile, by a callback that merges adapters for example, so its original "
                "values are lost. Train with frozen_weights_dtype='as_loaded'."
            )

    def _is_half(self, held: _Held) -> bool:
        """Whether the parameter is in half precision now; others may have put back, or taken, its values."""
        return held.parameter.dtype == self.dtype

    def _original(self, held: _Held) -> Tensor:
        if held.is_exact:
            return held.parameter.data.float()
        assert self._originals is not None
        return self._originals.read(held.name).to(held.parameter.device)

    def close(self) -> None:
        """Puts everything back, and watches no model any more."""
        try:
            self.put_back()
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._hooked.clear()
            self._held.clear()
            self._left.clear()
            self._is_complete = False
            self._originals = None

    # --- who reads weights --------------------------------------------------------------------------------------------

    @contextmanager
    def within_step(self) -> Iterator[None]:
        """A context of one training step, in which graphs need the weights as they are."""
        self._is_within_step = True
        try:
            yield
        finally:
            self._is_within_step = False

    @contextmanager
    def reading_adapters(self) -> Iterator[None]:
        """A context in which state dicts are read for their adapters alone."""
        self._reads_adapters_alone = True
        try:
            yield
        finally:
            self._reads_adapters_alone = False

    def _watch(self, model: nn.Module) -> None:
        """Has the weights put back for whoever reads a state dict of `model`, or runs it outside of autocast."""
        if model in self._hooked:
            return
        self._hooked.add(model)
        owner: weakref.ref[HalfWeights] = weakref.ref(self)  # a copy of the model must not copy what holds its weights
        _HOLDERS[model] = owner

        def before_state_dict(*_: Any) -> None:
            if (holder := owner()) is not None and not holder._reads_adapters_alone:
                holder.put_back()

        def before_forward(_module: nn.Module, inputs: Any, keywords: Any) -> None:
            if (holder := owner()) is not None:
                holder._before_forward([*inputs, *keywords.values()])

        causal_lm: Any = unwrap(model)
        body: nn.Module = getattr(causal_lm, "base_model", causal_lm)
        self._hooks.append(body.register_forward_pre_hook(before_forward, with_kwargs=True))
        for module in model.modules():
            if any(id(p) in self._held for p in module.parameters(recurse=False)):
                self._hooks.append(module.register_state_dict_pre_hook(before_state_dict))

    def _before_forward(self, inputs: Sequence[Any]) -> None:
        device = next((value.device.type for value in inputs if isinstance(value, Tensor)), None)
        if device is None or torch.is_autocast_enabled(device):
            return
        if self._is_within_step and any(map(self._is_half, self._held.values())):
            raise ValueError(
                "A model was run outside of autocast in the middle of a training step, while frozen weights are held "
                f"in {self.dtype} for autocast. Run it within `trainer.accelerator.autocast()`, or train with "
                "frozen_weights_dtype='as_loaded'."
            )
        self.put_back()

    # --- whether a model computes the same ----------------------------------------------------------------------------

    def _stable_numbers(self, model: nn.Module) -> list[Tensor | None] | None:
        """Checksums of the model's numbers, with None for those that differ from one time to the next; None where the
        model cannot be tried."""
        first, second = self._checksums(model), self._checksums(model)
        if first is None or second is None:
            return None
        return [a if equal(a, b) else None for a, b in zip(first, second, strict=True)]

    def _gives(self, model: nn.Module, expected: Sequence[Tensor | None] | None) -> bool:
        found = self._checksums(model)
        if found is None or expected is None:
            return False
        return all(a is None or equal(a, b) for a, b in zip(expected, found, strict=True))

    def _checksums(self, model: nn.Module) -> list[Tensor] | None:
        try:
            return [checksum(value) for value in self._numbers(_plain(model))]
        except (RuntimeError, TypeError, ValueError):
            return None


_HOLDERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[HalfWeights]] = weakref.WeakKeyDictionary()


def as_loaded(model: nn.Module) -> None:
    """Gives `model` its original weights, until the next step of the run that holds some of them."""
    owner = _HOLDERS.get(model)
    if owner is not None and (holder := owner()) is not None:
        holder.put_back()


def equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same values."""
    return torch.equal(ours, theirs)


def checksum(values: Tensor) -> Tensor:
    """Two sums over the bits of `values`, exact on every device `[2]`."""
    bits = values.detach().contiguous().view(-1)
    bits = bits.view(_BITS[bits.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        wide = chunk.to(torch.int64)
        sums[0] += wide.sum()
        sums[1] += wide.mul_(torch.arange(1, len(wide) + 1, device=wide.device)).sum()
    return sums


def _plain(model: nn.Module) -> nn.Module:
    return uncompiled(model) if is_compiled(model) else model
