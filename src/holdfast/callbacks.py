"""The callback that syncs a moving reference (TR-DPO) between two optimizer steps.

It counts optimizer steps as the trainer does, so a resumed run syncs at the same steps.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from holdfast.peers.phase import doing
from holdfast.reference.reference import Reference


@final
class SyncCallback(TrainerCallback):
    """Syncs `reference` after every `steps`-th optimizer step, each time within `around()`."""

    def __init__(
        self,
        reference: Reference,
        mixup_alpha: float,
        steps: int,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._reference = reference
        self._mixup_alpha = mixup_alpha
        self._steps = steps
        self._around = around

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `transformers.TrainerCallback`. ValueError where the run ends before the first sync."""
        if state.max_steps < self._steps:
            raise ValueError(
                f"sync_ref_model=True was asked for every {self._steps} steps, but the run has {state.max_steps}: the "
                "reference would never move. Lower ref_model_sync_steps, or use a fixed reference."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`: syncs where the step is due."""
        if state.global_step % self._steps == 0:
            with doing("syncing the reference"), self._around():
                self._reference.sync(self._mixup_alpha)
