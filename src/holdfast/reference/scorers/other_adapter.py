"""A reference that the user names among the policy's own adapters, or the bare base under them (`"__base__"`).

Meant for a policy that carries an SFT adapter next to the one that trains. The weights are there already, so the
reference costs a forward pass per batch and no memory. Only flags of the adapter layers are switched, and
`requires_grad` stays.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, final

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from holdfast.internals.peft import adapter_layers, switched
from holdfast.policy.adapters import check_adapter
from holdfast.reference.base import InsidePolicy
from holdfast.scoring.frozen import Autocast

BASE = "__base__"


@final
class OtherAdapterReference(InsidePolicy):
    """The policy's base with its adapter `name` alone, or bare where `name` is `"__base__"`."""

    kind = "NamedAdapterReference"

    def __init__(self, policy: PeftModel, autocast: Autocast, name: str) -> None:
        super().__init__(policy, autocast)
        self._name = name

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`; undone on leaving, exceptions included."""
        return switched(self.policy, None if self._name == BASE else self._name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """None beyond the policy's own."""
        return iter(())

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        what = "the bare base" if self._name == BASE else f"the adapter {self._name!r} on the base"
        return f"{what}, inside the policy, {when}, fixed"


def check_other_adapter(policy: nn.Module, name: str) -> PeftModel:
    """`policy`, whose adapter `name` (or bare base) can be its reference. ValueError where that is not there, would
    train along, or cannot be switched to."""
    if not isinstance(policy, PeftModel):
        raise ValueError(
            f"ref_adapter_name={name!r} was asked for, but the policy is a {type(policy).__name__} without adapters. "
            "Pass a PeftModel, or name another reference with `ref_model`."
        )
    prompts = [key for key, config in policy.peft_config.items() if config.is_prompt_learning]
    if prompts:
        raise ValueError(
            f"ref_adapter_name={name!r} was asked for, but the adapter {prompts[0]!r} learns a prompt, which is no "
            "layer that can be switched. Leave ref_adapter_name out: the policy as it starts to train is kept."
        )
    if name != BASE:
        check_adapter("ref_adapter_name", name, policy)
    if name in policy.active_adapters:
        raise ValueError(
            f"ref_adapter_name={name!r} is the adapter that trains, so the reference would train along. Load the "
            "adapter under a second name, or leave ref_adapter_name out: the policy as it starts to train is kept."
        )
    own = {id(p) for layer in adapter_layers(policy).values() for p in _adapter_parameters(layer)}
    moving = [key for key, p in policy.named_parameters() if p.requires_grad and id(p) not in own]
    if moving:
        raise ValueError(
            f"ref_adapter_name={name!r} was asked for, but weights under the adapters train as well, `{moving[0]}` "
            f"first ({len(moving)} in all), so the reference would move. Freeze them, or pass a `ref_model`."
        )
    return policy


def _adapter_parameters(layer: Any) -> Iterator[Tensor]:
    names = layer.adapter_layer_names + layer.other_param_names if isinstance(layer, BaseTunerLayer) else ()
    parts = [getattr(layer, name) for name in names]
    if not isinstance(layer, BaseTunerLayer):
        parts = [child for name, child in layer.named_children() if name != "original_module"]
    for part in parts:
        if isinstance(part, nn.Module):
            yield from part.parameters()
