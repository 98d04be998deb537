"""A reference inside a PEFT policy: an adapter beside the one that trains, or the bare base (`"__base__"`).

It is meant for a policy that has an SFT adapter next to the adapter that trains. The weights are in memory already, so
the reference costs a forward pass per batch and no memory. To score, flags of the adapter layers are switched, and no
parameter's `requires_grad` is touched. Given up: policies with an adapter that learns a prompt.
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
    """The policy with its adapter `name` alone, or with no adapter where `name` is `"__base__"`."""

    kind = "NamedAdapterReference"

    def __init__(self, policy: PeftModel, autocast: Autocast, name: str) -> None:
        super().__init__(policy, autocast)
        self._name = name

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`. The policy is as before on leaving, also after an exception."""
        return switched(self.policy, None if self._name == BASE else self._name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: none."""
        return iter(())

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        model = "the bare base" if self._name == BASE else f"the adapter {self._name!r} on the base"
        return f"{model}, inside the policy, {when}, fixed"


def check_other_adapter(policy: nn.Module, name: str) -> PeftModel:
    """`policy` as a PeftModel, once its adapter `name` (or bare base) was found fit to be the reference. ValueError
    where there is no such adapter, where it would train along, or where it cannot be switched to."""
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
    """The parameters of a layer's adapters, without those of its base."""
    names = layer.adapter_layer_names + layer.other_param_names if isinstance(layer, BaseTunerLayer) else ()
    values = [getattr(layer, name) for name in names]
    if not isinstance(layer, BaseTunerLayer):
        values = [child for name, child in layer.named_children() if name != "original_module"]
    for value in values:
        if isinstance(value, nn.Module):
            yield from value.parameters()
