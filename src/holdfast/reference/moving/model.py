"""The explicit reference that moves: a second module, mixed with the policy at every sync (TR-DPO).

Under PEFT the module has the adapters merged into its weights: two models are mixed by their effective weights, not by
their factors. Given up: memory for its weights, for an fp32 state beside weights in half precision, and for a merged
copy of a PEFT policy during a sync.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Self, final

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.policy.adapters import is_adapted
from holdfast.policy.half_weights import as_loaded
from holdfast.policy.quantised import is_quantised
from holdfast.policy.sharding import cut_like, give_back, is_sharded, own_part, total, whole_from_part
from holdfast.reference.base import Moving, Scorer, Share
from holdfast.reference.identity.identity import Identity
from holdfast.reference.moving.average import Average, check_mixable, parameter_name
from holdfast.reference.moving.effective import effective_copy, effective_parameters, effective_parts
from holdfast.reference.moving.squares import lengths
from holdfast.reference.scorers.model import freeze, independent_copy, inputs_on_device_of, weight_tensors
from holdfast.scoring.frozen import Autocast, frozen_logps


@final
class MovingModel(Scorer, Moving):
    """A frozen second module that a sync moves towards `policy`. `origin` says in words what it is."""

    kind = "ModelReference"

    def __init__(self, module: nn.Module, autocast: Autocast, *, origin: str, policy: nn.Module) -> None:
        self.module: nn.Module = module
        self.version = 0
        self.drift = 0.0
        self._autocast = autocast
        self._origin = origin
        self._policy = policy
        self._average = Average()

    @classmethod
    def capture(cls, policy: nn.Module, autocast: Autocast) -> Self:
        """The reference that is a copy of `policy` as it is now. ValueError where the policy is quantised."""
        _check_mergeable(policy)
        module = effective_copy(policy) if is_adapted(policy) else independent_copy(policy)
        return cls(freeze(module), autocast, origin="a copy of the policy", policy=policy)

    @classmethod
    def of_model(cls, ref_model: nn.Module, autocast: Autocast, *, origin: str, policy: nn.Module) -> Self:
        """The reference that begins as `ref_model`. ValueError where it cannot be mixed with `policy`."""
        check_mixable(dict(ref_model.named_parameters()), effective_parameters(policy))
        return cls(freeze(ref_model), autocast, origin=origin, policy=policy)

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`."""
        return frozen_logps(self.module, inputs_on_device_of(self.module, batch), self._autocast)

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`: the weights always are."""
        return contextlib.nullcontext()

    def sync(self, mixup_alpha: float) -> None:
        """See `Moving.sync`."""
        if is_sharded(self.module) or is_sharded(self._policy):
            self._move_parts(mixup_alpha)
        else:
            as_loaded(self._policy)
            own = dict(self.module.named_parameters())
            squares = self._average.move(own, effective_parameters(self._policy), mixup_alpha)
            self.drift = lengths({"": squares}, mixup_alpha)[""]
        self.version += 1

    def _move_parts(self, mixup_alpha: float) -> None:
        """Each process moves its part of the reference."""
        give_back(self._policy)
        own, policy = self._own_parts(), effective_parts(self._policy, self.module)
        moves = lengths({n: self._average.move({n: own[n]}, policy, mixup_alpha) for n in own}, mixup_alpha)
        self.drift = math.sqrt(total((self.module.get_parameter(name), length**2) for name, length in moves.items()))

    def _own_parts(self) -> dict[str, Tensor]:
        """This process's part of each parameter of the module: all of it, unless the module is sharded."""
        give_back(self.module)
        return {name: own_part(parameter) for name, parameter in self.module.named_parameters()}

    def models(self) -> Sequence[Share]:
        """See `Scorer.models`: its own."""
        return [(1.0, self.module)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: the module's weights, and their fp32 state."""
        yield from weight_tensors(self.module)
        yield from self._average.tensors()

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        return Identity.of(self.module)

    def parts(self) -> dict[str, Tensor]:
        """See `Moving.parts`."""
        return self._own_parts() | dict(self._average.tensors())

    def state_dict(self) -> dict[str, Tensor]:
        """See `Moving.state_dict`: the module's parameters, and their fp32 state."""
        if not is_sharded(self.module):
            return dict(self.module.named_parameters()) | dict(self._average.tensors())
        parts = self._own_parts() | dict(self._average.tensors())
        return {name: whole_from_part(part, self._parameter_of(name)).cpu() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """See `Moving.load_state_dict`."""
        parts = {name: cut_like(value, self._parameter_of(name)) for name, value in state.items()}
        self._average.restore(self._own_parts(), parts)
        self.version, self.drift = version, drift

    def _parameter_of(self, name: str) -> nn.Parameter:
        """The parameter of which `name` is the value or the fp32 state."""
        return self.module.get_parameter(parameter_name(name))

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return f"{self._origin}, a module of its own, {when}, moved {self.version} times"


def _check_mergeable(policy: nn.Module) -> None:
    """ValueError where the policy's adapters cannot be merged into its weights, since these are quantised."""
    if is_quantised(policy):
        name = next(name for name, parameter in policy.named_parameters() if not parameter.is_floating_point())
        raise ValueError(
            "A moving copy of the policy was to be the reference, but the policy is quantised: adapters cannot be "
            f"merged into `{name}` without rounding, so the copy would not be the policy. Leave `reference` at 'auto', "
            "which moves the adapters inside the policy, or use sync_ref_model=False."
        )
