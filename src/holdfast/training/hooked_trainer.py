"""`HookedTrainer`: what a subclass that overrides a method which gets batches is given instead of the run's own rows.

Such a method reads padded rows (see `handed_batches`). So the data collator is another one for it, and the loss that it
returns is the one that an evaluation reports.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from holdfast.config import DPOConfig
from holdfast.data.layouts.choose import make_layout, preference_collator
from holdfast.data.layouts.preference_collator import DataCollatorForPreference
from holdfast.losses import PairLogps
from holdfast.training.handed_batches import (
    LOSS_HOOK,
    HandedBatch,
    assigned_hooks,
    check_layout,
    overridden,
    padded_line,
)
from holdfast.training.script_attributes import ScriptableTrainer

logger = logging.getLogger(__name__)


class HookedTrainer(ScriptableTrainer):
    """Gives overridden methods batches that they can read."""

    reads_any_layout: ClassVar[bool] = False
    """Whether a subclass that overrides a method which gets batches hands them on unread, or reads every layout."""

    _own_hooks: ClassVar[Mapping[str, Any]]
    """The methods of `DPOTrainer` that get batches."""

    _has_said_assigned: bool = False

    def _overridden_hooks(self, args: DPOConfig) -> list[str]:
        """The methods that get batches and are none of `DPOTrainer`'s. ValueError for those that cannot read the
        rows which `args` ask for."""
        hooks = [] if self.reads_any_layout else overridden(type(self), self._own_hooks)
        check_layout(hooks, type(self), args)
        return hooks

    def _make_collator(self, args: DPOConfig, hooks: list[str]) -> Any:
        """The run's data collator where the user has none; for `hooks`, one with the common trainer's keys."""
        layout = make_layout(args, self._pad_token_id)
        return preference_collator(layout) if hooks else layout

    def _begin_handing_out(self, hooks: list[str]) -> None:
        self._handed = HandedBatch() if LOSS_HOOK in hooks else None
        is_chosen_here = type(self.data_collator) is DataCollatorForPreference and self.args.layout == "auto"
        if hooks and is_chosen_here and self.is_world_process_zero():
            logger.warning(padded_line(hooks, type(self)))

    def _heed_hooks(self) -> None:
        """See `PairTrainer._heed_hooks`. ValueError for a `compute_loss_func`, which would not be called."""
        if self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` was set, which gets the logits and labels of single rows and would not be called: "
                "the loss is of pairs. Choose `loss_type`, or override `compute_loss` in a subclass of DPOTrainer."
            )
        assigned = LOSS_HOOK in assigned_hooks(self, self._own_hooks)
        if assigned and not self.reads_any_layout and not self._has_said_assigned and self.is_world_process_zero():
            self._has_said_assigned = True
            logger.warning(
                "`compute_loss` was assigned to the trainer: its batches have rows of layout %r, and an evaluation "
                "reports the loss of DPOTrainer. Override it in a subclass to read padded rows with the keys "
                "input_ids, attention_mask and completion_mask.", self._layout_name(),
            )  # fmt: skip

    def _handed_out(self, inputs: Any) -> Any:
        if self._handed is None:
            return inputs
        self._handed, inputs = HandedBatch(), self._prepare_inputs(inputs)
        sums = None
        if self.reference is not None and self.reference.is_precomputed:
            sums = self._reference_logps(self._pair_batch(inputs))
        return self._handed.handed_out(inputs, sums)

    @abstractmethod
    def _layout_name(self) -> str:
        """The name of the layout in which the run's rows are."""

    @abstractmethod
    def _reference_logps(self, batch: Any) -> PairLogps | None:
        """The reference's log-probs of a batch; None where there is no reference."""
