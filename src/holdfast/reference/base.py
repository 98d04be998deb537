"""The roles of a reference: who computes its log-probs, and what one that moves can do besides.

A way to hold a reference is one final class in a file of its own, which takes one of these roles. What is common to all
ways (looking up log-probs that are known, scoring ahead, windows) is in `reference.reference`, and nothing there asks
which way it is.
"""

import abc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.reference.identity.identity import Identity
from holdfast.scoring.frozen import Autocast, frozen_logps


class Scorer(abc.ABC):
    """Computes `log pi_ref` of a batch.

    Laws: a fresh scorer captured from the policy gives the policy's own log-probs (L1); a fixed one never changes (L2);
    however the reference is held, its log-probs agree to 1e-5 per token in fp32 (L3).
    """

    kind: ClassVar[str]
    """What a checkpoint's manifest calls this way to hold a reference."""
    module: nn.Module | None = None
    """The reference's own module, where it has one."""
    comes_from_afar: bool = False
    """Whether putting the weights in place moves them between devices, so that asking for many batches at once pays."""

    @abc.abstractmethod
    def logps(self, batch: PairBatch) -> SequenceLogps:
        """`log pi_ref` (nats, fp32) of the batch's completion tokens; no gradients, eval mode, no dropout."""

    @abc.abstractmethod
    def in_place(self) -> AbstractContextManager[None]:
        """A context within which the reference's weights are where they compute. Many batches that are scored within it
        share its cost. It may be entered within itself."""

    @abc.abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors it holds in memory on top of the policy, under the policy's names where it has such."""

    @abc.abstractmethod
    def identity(self) -> Identity:
        """All that the log-probs depend on beside the token ids, as it is now. Training must not have changed the
        policy yet."""

    @abc.abstractmethod
    def describe(self, when: str) -> str:
        """What it is, where it is held, when it is asked (`when`), and whether it moves, in one line."""


class InsidePolicy(Scorer):
    """A reference that has no module of its own: within `in_place()` the policy's module computes as the reference."""

    def __init__(self, policy: nn.Module, autocast: Autocast) -> None:
        self.policy = policy
        self.autocast = autocast

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`."""
        with self.in_place():
            return frozen_logps(self.policy, batch, self.autocast)

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        with self.in_place():
            return Identity.of(self.policy)


class Captured(abc.ABC):
    """A reference that *is* the policy until training changes it, and only then needs values of its own."""

    @abc.abstractmethod
    def before_policy_changes(self) -> None:
        """Copies the policy's values, where the policy is still the reference. Training is about to change them."""


class Moving(abc.ABC):
    """A reference that follows the policy (TR-DPO), and what a checkpoint must hold to bring it back (law L5)."""

    version: int
    """Number of syncs so far."""
    drift: float
    """L2 norm of the last move in weight space; 0 before the first."""

    @abc.abstractmethod
    def sync(self, mixup_alpha: float) -> None:
        """Moves to `mixup_alpha * policy + (1 - mixup_alpha) * reference`, in effective weights, accumulated in fp32
        (law L4; Gorbatovski et al. 2024, Eq. 3, arXiv:2404.09656), and counts `version` up."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """Brings the reference back to where it was after `version` syncs, bit for bit. The last was `drift` long."""


class TensorHolder(Protocol):
    """A reference, or its scorer: what holds tensors."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in memory on top of the policy."""
        ...


def num_bytes(holder: TensorHolder) -> int:
    """Bytes that a reference holds in memory on top of the policy."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in holder.tensors())
