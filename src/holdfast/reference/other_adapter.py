"""A reference that the user names among the policy's own adapters, or the bare base under them (`"__base__"`).

For a policy that carries an SFT adapter next to the one that trains: the weights are there already, so the reference
costs nothing but a forward pass per batch. Only flags of the adapter layers are switched; `requires_grad` stays.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, final

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.internals.peft import adapter_layers, switched
from holdfast.policy.adapters import check_adapter
from holdfast.reference.base import PER_BATCH, FixedReference
from holdfast.reference.identity import Identity
from holdfast.scoring.frozen import Autocast, frozen_logps

BASE = "__base__"


@final
class NamedAdapterReference(FixedReference):
    """The policy's base with its adapter `name` alone, or bare where `name` is `"__base__"`."""

    def __init__(self, policy: PeftModel, autocast: Autocast, name: str) -> None:
        super().__init__()
        self._policy = policy
        self._autocast = autocast
        self._name = name

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """Within it the policy's module computes as the reference; undone on leaving, exceptions included."""
        with switched(self._policy, None if self._name == BASE else self._name):
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
        """None beyond the policy's own."""
        return iter(())

    def identity(self) -> Identity:
        """See `Reference.identity`."""
        with self.held():
            return Identity.of(self._policy)

    def describe(self, asked: str = PER_BATCH) -> str:
        """See `Reference.describe`."""
        what = "the bare base" if self._name == BASE else f"the adapter {self._name!r} on the base"
        return f"{what}, inside the policy, {asked}, fixed"

    @property
    def module(self) -> nn.Module | None:
        """None: the module is the policy's."""
        return None


def check_named(policy: nn.Module, name: str) -> PeftModel:
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
