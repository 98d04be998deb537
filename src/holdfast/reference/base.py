"""The roles of a reference: a scorer computes its log-probs, a moving one can be synced, a captured one copies late.

A way to hold a reference is one final class in a file of its own that takes one or several of these roles. Everything
that all ways share (log-probs that are known already, scoring ahead, windows) is in `reference.reference`, which never
asks for the way. Given up: scorers with a module of their own repeat a few lines, so that none inherits from another.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.policy.sharding import own_part
from holdfast.reference.identity.identity import Identity
from holdfast.scoring.frozen import Autocast, frozen_logps

Share = tuple[float, nn.Module]
"""A model and its share in a mixture; 1 where it is the only one."""


class Scorer(abc.ABC):
    """Computes `log pi_ref` of a batch.

    Laws: a fresh scorer captured from the policy gives the policy's own log-probs (L1); a fixed one never changes (L2);
    however the reference is held, its log-probs agree to 1e-5 per token in fp32 (L3).
    """

    kind: ClassVar[str]
    """The name of this way to hold a reference in a checkpoint's manifest."""
    module: nn.Module | None = None
    """The reference's own module; None for one inside the policy."""
    parts: Sequence["Scorer"] = ()
    """The scorers that it mixes."""
    is_off_device: bool = False
    """Whether `in_place()` moves weights between devices, so that scoring many batches within it saves time."""

    sums_states: bool = True
    """Whether it sums hidden states where a batch asks for that (`SequenceLogps.state_sums`)."""

    @abc.abstractmethod
    def logps(self, batch: PairBatch) -> SequenceLogps:
        """`log pi_ref` (nats, fp32) of the batch's completion tokens; no gradients, eval mode, no dropout."""

    @abc.abstractmethod
    def in_place(self) -> AbstractContextManager[None]:
        """A context within which the reference's weights are where they compute. All batches that are scored within it
        share the cost of entering it. It may be entered again while it is active."""

    @abc.abstractmethod
    def models(self) -> Sequence[Share]:
        """The models that compute as the reference within `in_place()`; none where its log-probs come from no model."""

    @abc.abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the reference has in memory on top of the policy. A tensor that stands for one of the
        policy's has its name."""

    @abc.abstractmethod
    def identity(self) -> Identity:
        """Everything that the log-probs depend on beside the token ids, as it is now. It must be read before training
        changes the policy."""

    @abc.abstractmethod
    def describe(self, when: str) -> str:
        """One line: which reference it is, where it is held, when it is asked (`when`), and whether it moves."""


class InsidePolicy(Scorer):
    """A reference without a module of its own: within `in_place()` the policy's module computes as the reference."""

    def __init__(self, policy: nn.Module, autocast: Autocast) -> None:
        self.policy = policy
        self.autocast = autocast

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Scorer.logps`."""
        with self.in_place():
            return frozen_logps(self.policy, batch, self.autocast)

    def models(self) -> Sequence[Share]:
        """See `Scorer.models`: the policy's."""
        return [(1.0, self.policy)]

    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        with self.in_place():
            return Identity.of(self.policy)


class LateCopy(abc.ABC):
    """A reference that *is* the policy until training changes the policy, and copies the policy's values only then."""

    @abc.abstractmethod
    def before_policy_changes(self) -> None:
        """Copies the policy's values if the policy is still the reference. It is called before training changes
        them."""


class Moving(abc.ABC):
    """A reference that follows the policy (TR-DPO). A checkpoint holds its state, from which it is restored (law
    L5)."""

    version: int
    """Number of syncs so far."""
    drift: float
    """L2 norm of the last move in weight space; 0 before the first."""

    @abc.abstractmethod
    def sync(self, mixup_alpha: float) -> None:
        """Sets the reference to `mixup_alpha * policy + (1 - mixup_alpha) * reference` and adds 1 to `version`.

        The mix is of effective weights and is accumulated in fp32 (law L4; Gorbatovski et al. 2024, Eq. 3,
        arXiv:2404.09656).
        """

    @abc.abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors of `state_dict`, of each this process's part."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold, whole. Collective where they are spread over processes."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """Restores the reference after `version` syncs, bit for bit. The last sync moved it by `drift`."""


class HasTensors(Protocol):
    """A reference, or its scorer."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in memory on top of the policy."""
        ...


def num_bytes(reference: HasTensors) -> int:
    """Bytes that a reference, or its scorer, has in memory on top of the policy."""
    return sum(own_part(tensor).nbytes for _, tensor in reference.tensors())
