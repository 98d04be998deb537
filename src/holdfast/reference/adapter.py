"""The implicit reference: inside a PEFT policy, in no second module.

What the policy was when it was handed in differs from what it becomes only in the tensors that train. So:
a fresh LoRA that adds nothing yet *is* the base with its adapters off, at no memory; in every other case (a trained
adapter, PiSSA, biases, unfrozen norms, prompt tuning, ...) the trainable tensors' first values are kept and put in
place to score. The policy gets no second adapter, and no parameter's `requires_grad` is touched.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self, final

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.internals.peft import switched
from holdfast.reference.base import PER_BATCH, FixedReference, Reference
from holdfast.reference.identity import Identity
from holdfast.reference.snapshot import holding
from holdfast.scoring.frozen import Autocast, frozen_logps


@final
class AdapterReference(FixedReference):
    """The policy with its adapters off, or with `frozen` values in place of its trainable tensors."""

    def __init__(self, policy: nn.Module, autocast: Autocast, frozen: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._policy = policy
        self._autocast = autocast
        self._frozen = dict(frozen)

    @classmethod
    def capture(cls, policy: nn.Module, autocast: Autocast) -> Self:
        """A reference that is the PEFT model `policy` as it is now."""
        if adds_nothing(policy):
            return cls(policy, autocast, {})
        trainable = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
        return cls(policy, autocast, trainable)

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """Within it the policy's module computes as the reference; undone on leaving, exceptions included."""
        with holding(self._policy, self._frozen) if self._frozen else switched(self._policy, None):
            yield

    def held(self) -> AbstractContextManager[None]:
        """See `Reference.held`."""
        return self.null_ref_context()

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`."""
        with self.null_ref_context():
            return frozen_logps(self._policy, batch, self._autocast)

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Nothing to do: it is asked per batch."""

    def release(self) -> None:
        """Nothing to do: training does not change it."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The kept values of the trainable tensors; none where adapters are switched off."""
        yield from self._frozen.items()

    def identity(self) -> Identity:
        """See `Reference.identity`."""
        with self.held():
            return Identity.of(self._policy)

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        how = f"a frozen copy of its {len(self._frozen)} trainable tensors put in place" if self._frozen else "off"
        return f"the policy as it was handed in: adapters {how}, inside the policy, {asked}, fixed"

    @property
    def module(self) -> nn.Module | None:
        """None: the module is the policy's."""
        return None


def adds_nothing(policy: nn.Module) -> bool:
    """Whether the PEFT model `policy` computes exactly what it would with its adapters off, and trains only them.

    True only for plain LoRA factors of which one is all zero; everything unknown counts as adding something.
    """
    inert: set[int] = set()
    layers: Any = policy.modules()
    for layer in layers:
        if isinstance(layer, LoraLayer):
            active = set(layer.active_adapters)
            if active & getattr(layer, "lora_variant", {}).keys() or any(layer.use_dora.get(name) for name in active):
                return False
            pairs = (layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)
            for down, up in pairs:
                for name in active & set(down.keys()):
                    factors: list[Any] = [f.weight if isinstance(f, nn.Module) else f for f in (down[name], up[name])]
                    if all(bool(factor.detach().any()) for factor in factors):
                        return False
                    inert.update(id(factor) for factor in factors)
        elif isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return False  # a module that is saved whole may be a trained one
    return all(id(parameter) in inert for parameter in policy.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def null_ref_context(reference: Reference | None) -> Iterator[None]:
    """The context in which the policy's module computes as its reference; does nothing where that is another module."""
    within: Any = getattr(reference, "null_ref_context", contextlib.nullcontext)
    with within(), torch.no_grad():
        yield
