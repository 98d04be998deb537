"""The implicit reference: inside a PEFT policy, in no second module.

Training changes only the policy's trainable tensors. A fresh LoRA adds nothing yet, so its reference is the base with
adapters off, which costs no memory. In every other case (a trained adapter, PiSSA, biases, unfrozen norms, prompt
tuning, ...) the first values of the trainable tensors are copied, and put in place to score. The policy gets no second
adapter, and no parameter's `requires_grad` is touched. Where parameters are spread over processes, each process copies
its own part of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self, final

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from holdfast.internals.peft import switched
from holdfast.policy.adapters import lora_adds_nothing, lora_factors
from holdfast.reference.base import InsidePolicy
from holdfast.reference.scorers.exchange import exchanged
from holdfast.reference.scorers.snapshot import trainable
from holdfast.scoring.frozen import Autocast


@final
class AdapterReference(InsidePolicy):
    """The policy with `first_values` as its trainable tensors, or with its adapters off where there are none."""

    kind = "AdapterReference"

    def __init__(self, policy: nn.Module, autocast: Autocast, first_values: Mapping[str, Tensor]) -> None:
        super().__init__(policy, autocast)
        self._first_values = dict(first_values)

    @classmethod
    def capture(cls, policy: nn.Module, autocast: Autocast) -> Self:
        """The reference that is the PEFT model `policy` as it is now."""
        if adds_nothing(policy):
            return cls(policy, autocast, {})
        return cls(policy, autocast, {name: value.clone() for name, value in trainable(policy).items()})

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`. The policy is as before on leaving, also after an exception."""
        return exchanged(self.policy, self._first_values) if self._first_values else switched(self.policy, None)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The first values of the trainable tensors; none where adapters are switched off."""
        yield from self._first_values.items()

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        number = len(self._first_values)
        state = f"a frozen copy of its {number} trainable tensors put in place" if number else "off"
        return f"the policy as it was handed in: adapters {state}, inside the policy, {when}, fixed"


def adds_nothing(policy: nn.Module) -> bool:
    """Whether the PEFT model `policy` trains only its adapters and computes exactly as it would with them off.

    True only where every adapter is a plain LoRA with a factor that is zero. Anything else counts as adding something.
    """
    inert: set[int] = set()
    layers: Any = policy.modules()
    for layer in layers:
        if isinstance(layer, LoraLayer):
            for name in layer.active_adapters:
                if not lora_adds_nothing(layer, name):
                    return False
                inert.update(id(factor) for pair in lora_factors(layer, name) for factor in pair)
        elif isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return False  # the copy of a module in `modules_to_save` may have been trained
    return all(id(parameter) in inert for parameter in policy.parameters() if parameter.requires_grad)
