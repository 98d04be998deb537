"""The policy itself, for as long as it has not trained: the captured reference at no cost.

Only good for scoring ahead. Once training has changed the policy this is no reference any more, and it says so.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import final

from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.reference.base import Autocast, FixedReference, digest, frozen_logps


@final
class PolicyReference(FixedReference):
    """The untrained policy as its own reference: the same module, asked only before the first step."""

    def __init__(self, policy: nn.Module, autocast: Autocast) -> None:
        super().__init__()
        self._policy = policy
        self._autocast = autocast
        self._is_over = False

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """See `Reference.logps`. ValueError once training has begun."""
        if self._is_over:
            raise ValueError(
                "Reference log-probs were asked for after training began, but the reference was the policy as it "
                "started, which is no longer in memory. Hand the dataset to the trainer as `eval_dataset`, so that it "
                "is scored before training, or keep the reference: reference='model', or reference='snapshot' with "
                "precompute_ref_log_probs=True and, for no memory at all, snapshot_device='disk'."
            )
        return frozen_logps(self._policy, batch, self._autocast)

    def prepare(self, datasets: Mapping[str, Iterable[PairBatch]]) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """From here on `logps` refuses."""
        self._is_over = True

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """None beyond the policy's own."""
        return iter(())

    def fingerprint(self) -> str:
        """See `Reference.fingerprint`."""
        return digest(self._policy.named_parameters())

    def describe(self) -> str:
        """See `Reference.describe`."""
        return "the policy as it starts to train, asked before training only"

    @property
    def module(self) -> nn.Module | None:
        """None: the module is the policy's."""
        return None
