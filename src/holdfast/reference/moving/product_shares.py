"""Where the state of LoRA products is held: whole, or a share of it in each process where factors are spread.

All processes compute the same products, so each keeps its share only, and they join them to score and to mix. Given up
there: an exchange between the processes whenever the reference's weights are put in place.
"""

from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from holdfast.policy.sharding import cut_evenly, joined
from holdfast.reference.tensor_file import OwnTensors


@final
class ProductShares:
    """The state of products (see `lora_products.policy_state`), held by `tensors`."""

    def __init__(self, tensors: OwnTensors) -> None:
        self._tensors = tensors
        self._shapes: dict[str, torch.Size] = {}

    def write(self, products: Mapping[str, Tensor], *, is_shared: bool) -> None:
        """Replaces the state. With `is_shared` all processes have the same, and each keeps its share."""
        self._shapes = {name: value.shape for name, value in products.items()} if is_shared else {}
        self._tensors.write({name: cut_evenly(value) if is_shared else value for name, value in products.items()})

    def whole(self) -> dict[str, Tensor]:
        """The state. Collective where it is shared."""
        if not self._shapes:
            return dict(self._tensors.items())
        return {name: joined(share, self._shapes[name]) for name, share in self._tensors.items()}

    def own(self) -> Iterator[tuple[str, Tensor]]:
        """What this process has of the state."""
        return self._tensors.items()

    def in_memory(self) -> Mapping[str, Tensor]:
        """What of that is in memory."""
        return self._tensors.in_memory()
