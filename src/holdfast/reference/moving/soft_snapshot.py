"""A snapshot that every sync mixes with the policy (TR-DPO with alpha < 1), accumulated in fp32.

Plain tensors are mixed as they are. LoRA layers are mixed by the products of their factors (see
`moving.lora_products`), since a mix of the factors A and B apart is a different model. Given up: adapters without an
exact mix, which `lora_products.mixing_obstacle` finds.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor, nn

from holdfast.policy.adapters import is_adapted
from holdfast.policy.sharding import is_sharded, parameters_of, standing_in, total
from holdfast.reference.base import InsidePolicy, LateCopy, Moving
from holdfast.reference.identity.identity import Identity
from holdfast.reference.moving import lora_products
from holdfast.reference.moving.added_products import adding_products
from holdfast.reference.moving.average import Average
from holdfast.reference.moving.product_shares import ProductShares
from holdfast.reference.moving.squares import lengths
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.exchange import exchanged
from holdfast.reference.scorers.snapshot import (
    Exchange,
    description,
    like_parameters,
    parts_of_state,
    trainable,
    where,
    whole_state,
)
from holdfast.reference.tensor_file import SnapshotDevice, own_tensors
from holdfast.scoring.frozen import Autocast


@final
class SoftSnapshot(InsidePolicy, LateCopy, Moving):
    """The policy with a moving average of its trainable tensors, in fp32 whatever the policy's dtype."""

    kind = "SnapshotReference"

    def __init__(self, policy: nn.Module, autocast: Autocast, *, device: SnapshotDevice, folder: RunFolder) -> None:
        super().__init__(policy, autocast)
        self.version = 0
        self.drift = 0.0
        self.is_off_device = device != "device"
        self._where = where(device, folder)
        self._plain = own_tensors(device, folder, "snapshot.safetensors")
        self._products = ProductShares(own_tensors(device, folder, "products.safetensors"))
        self._exchange = Exchange(self._values_in_place)

    def in_place(self) -> AbstractContextManager[None]:
        """See `Scorer.in_place`."""
        return self._exchange.in_place()

    def before_policy_changes(self) -> None:
        """See `LateCopy.before_policy_changes`. ValueError where a file cannot be written."""
        if self._exchange.is_policy:
            plain, products = self._state_of_policy()
            self._plain.write(plain)
            self._write_products(products)
            self._exchange.is_policy = False

    @torch.no_grad()
    def sync(self, mixup_alpha: float) -> None:
        """See `Moving.sync`. ValueError where alpha is 1, for which there is `HardSnapshot`."""
        if mixup_alpha == 1:
            raise ValueError(
                f"A sync (alpha {mixup_alpha}) was asked of a snapshot that was made for another motion "
                "(soft). Set sync_ref_model and ref_model_mixup_alpha when the trainer is made."
            )
        self.before_policy_changes()
        squares = 0.0
        if self._factor_names():
            products, squares = lora_products.synced_state(self.policy, self._products.whole(), mixup_alpha)
            self._write_products(products)
        policy, moved = self._plain_of_policy(), dict[str, list[Tensor]]()

        def move(name: str, value: Tensor) -> None:
            moved[name] = Average().move({name: value}, policy, mixup_alpha)

        self._plain.change(move)
        parameters, moves = parameters_of(self.policy), lengths(moved, mixup_alpha)
        if is_sharded(self.policy):
            squares += total((parameters[name], length**2) for name, length in moves.items())
            moves = {}
        self.drift = math.hypot(math.sqrt(squares), *moves.values())
        self.version += 1

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Scorer.tensors`: none while the reference is the policy, and none where the values are in a file."""
        if not self._exchange.is_policy:
            yield from self._plain.in_memory().items()
            yield from self._products.in_memory().items()

    def parts(self) -> dict[str, Tensor]:
        """See `Moving.parts`."""
        if self._exchange.is_policy:
            plain, products = self._state_of_policy()
            return plain | products
        return dict([*self._plain.items(), *self._products.own()])

    def state_dict(self) -> dict[str, Tensor]:
        """See `Moving.state_dict`."""
        if self._exchange.is_policy:
            return whole_state(self.policy, self.parts())
        return whole_state(self.policy, dict(self._plain.items())) | self._products.whole()

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """See `Moving.load_state_dict`."""
        if state:
            plain = parts_of_state(self.policy, {name: state[name] for name in self._plain_of_policy()})
            self._plain.write(plain)
            products = {name: value for name, value in state.items() if name not in plain}
            device = next(self.policy.parameters()).device
            self._write_products({name: value.to(device) for name, value in products.items()})
            self._exchange.is_policy = False
        self.version, self.drift = version, drift

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        if self._exchange.is_policy or not self._is_spread():
            return super().identity()
        products = self._products.whole()
        plain = like_parameters(self.policy, dict(self._plain.items()))
        pairs = lora_products.factor_values(self.policy, products)
        with exchanged(self.policy, plain), standing_in(self.policy, pairs):
            return Identity.of(self.policy)

    def describe(self, when: str) -> str:
        """See `Scorer.describe`."""
        return description(self._where, when, f"moved {self.version} times")

    @contextlib.contextmanager
    def _values_in_place(self) -> Iterator[None]:
        """A context within which the policy computes as this reference."""
        values, products = like_parameters(self.policy, dict(self._plain.items())), self._products.whole()
        if self._is_spread():
            with exchanged(self.policy, values), adding_products(self.policy, products):
                yield
            return
        if self._factor_names():
            values |= lora_products.factor_values(self.policy, products)
        with exchanged(self.policy, values):
            yield

    def _is_spread(self) -> bool:
        """Whether factors of the policy are spread over processes."""
        return is_adapted(self.policy) and lora_products.is_spread(self.policy)

    def _write_products(self, products: Mapping[str, Tensor]) -> None:
        if products:
            self._products.write(products, is_shared=self._is_spread())

    def _factor_names(self) -> set[str]:
        """The names of the parameters that are mixed by products and not one by one."""
        return lora_products.factor_names(self.policy) if is_adapted(self.policy) else set()

    def _plain_of_policy(self) -> dict[str, Tensor]:
        """The policy's trainable tensors without those that are mixed by products."""
        factors = self._factor_names()
        return {name: value for name, value in trainable(self.policy).items() if name not in factors}

    def _state_of_policy(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The state of a reference that is the policy: its plain tensors in fp32, and the state of its products."""
        plain = {name: value.float() for name, value in self._plain_of_policy().items()}
        return plain, lora_products.policy_state(self.policy) if self._factor_names() else {}
