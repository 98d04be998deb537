"""The reference interface: where `log pi_ref(y|x)` comes from.

Everything that differs between the ways to hold a reference is behind these methods; nothing else in the package asks
which way it is. Implementations are final: to vary one, wrap it (as `PrecomputedReference` does).
"""

import abc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.reference.digests import digest as digest
from holdfast.reference.identity import Identity

PER_BATCH = "asked per batch"


class Reference(abc.ABC):
    """pi_ref: the anchor that the policy is compared with.

    Laws: a fresh one captured from the policy gives the policy's own log-probs (L1); a fixed one never changes (L2);
    however it is held, its log-probs agree to 1e-5 per token in fp32 (L3); a sync is exactly
    `alpha * policy + (1 - alpha) * reference` in effective weights, accumulated in fp32 (L4).
    """

    version: int
    """Number of syncs so far: 0 for a reference that never moved."""
    drift: float
    """L2 norm of the last move in weight space; 0 before the first."""

    @abc.abstractmethod
    def logps(self, batch: PairBatch) -> SequenceLogps:
        """`log pi_ref` (nats, fp32) of the batch's completion tokens; no gradients, eval mode, no dropout."""

    @abc.abstractmethod
    def held(self) -> AbstractContextManager[None]:
        """A context within which many batches are asked about: what an asking costs however much is asked (weights that
        have to be put in place) is paid once. May be entered within itself."""

    @abc.abstractmethod
    def sync(self, mixup_alpha: float) -> None:
        """Move to `mixup_alpha * policy + (1 - mixup_alpha) * reference` (TR-DPO, Gorbatovski et al. 2024, Eq. 3,
        arXiv:2404.09656) and count `version` up. ValueError where the reference cannot move."""

    @abc.abstractmethod
    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Called with every dataset (name -> its completions, read when they are asked for) that will be asked about.
        Whoever scores ahead does it here; the others leave them unread."""

    @abc.abstractmethod
    def release(self) -> None:
        """Called whenever training is about to change the policy: the last moment to read it as the reference."""

    @abc.abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors it holds on top of the policy, under the policy's names for them where it has any."""

    @abc.abstractmethod
    def identity(self) -> Identity:
        """All that its log-probs depend on beside the token ids, as it is now. To be asked before training changes the
        policy."""

    def fingerprint(self) -> str:
        """Digest of all weights that its log-probs depend on."""
        return self.identity().weights

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to bring it back (law L5); empty for a fixed one, which is made again."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """Back to where it was after `version` syncs, the last of length `drift`, bit for bit."""

    @abc.abstractmethod
    def describe(self, asked: str = PER_BATCH) -> str:
        """What it is, where it is held, when it is asked (a wrapper says so), and whether it moves, in one line."""

    @property
    @abc.abstractmethod
    def module(self) -> nn.Module | None:
        """The reference's own module where it has one, else None."""


class FixedReference(Reference):
    """A reference that stays as it is: it has no state of its own to bring back, and refuses to be synced."""

    def __init__(self) -> None:
        self.version = 0
        self.drift = 0.0

    def sync(self, mixup_alpha: float) -> None:
        """ValueError: this reference is fixed."""
        raise ValueError(
            f"A sync (alpha {mixup_alpha}) was asked of a reference that stays as it is: {self.describe()}. Use "
            "reference='model', whose weights can move."
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: it is made again."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """Nothing to bring back."""
        assert not state
        assert version == 0


def num_bytes(reference: Reference) -> int:
    """Bytes that a reference holds on top of the policy."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in reference.tensors())
