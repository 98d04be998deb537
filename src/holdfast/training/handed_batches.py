"""Batches as the hooks of a subclass get them: padded rows with the keys of the common DPO trainer, and no others.

A subclass that overrides `compute_loss` reads `inputs`. Rows of many sequences would give it other numbers without a
word, so it gets `input_ids`, `attention_mask` and `completion_mask` [2P T], the chosen rows first, and log-probs that
were scored ahead as `ref_chosen_logps` and `ref_rejected_logps` [P]. `super().compute_loss` reads these keys alone, so
that a subclass may change them. Given up: sharing prompts for such a class, unless it says that it leaves batches
unread; and content ids without hashing in host memory.
"""

from collections.abc import Mapping
from typing import Any, Protocol, final

from torch import Tensor

from holdfast.data.columns import REFERENCE_COLUMNS
from holdfast.data.inputs import completed
from holdfast.data.layouts.choose import LAYOUTS
from holdfast.losses import PairLogps
from holdfast.reference.user_columns import columns_read
from holdfast.scoring.causal_lm import unwrap

LOSS_HOOK = "compute_loss"
BATCH_HOOKS = (LOSS_HOOK, "training_step", "prediction_step")
"""Methods that get batches, and that scripts override."""

_AHEAD = "reference_logps"


class LayoutChoice(Protocol):
    """The options of a run (`DPOConfig`) that say how rows are laid out."""

    layout: str
    padding_free: bool
    tokens_per_batch: int | None


def batch_hooks(kind: type) -> dict[str, Any]:
    """The methods of a class that get batches, by name."""
    return {name: getattr(kind, name) for name in BATCH_HOOKS}


def overridden(kind: type, own: Mapping[str, Any]) -> list[str]:
    """Which of the methods `own` are others in the class `kind`."""
    return [name for name, method in own.items() if getattr(kind, name) is not method]


def assigned_hooks(trainer: Any, own: Mapping[str, Any]) -> list[str]:
    """In place of which of the methods `own` a script has assigned another function to the trainer itself."""
    values = {name: vars(trainer)[name] for name in own if name in vars(trainer)}
    return [name for name, value in values.items() if getattr(value, "__func__", value) is not own[name]]


def in_host_memory(trainer: Any, collator: Any) -> Any:
    """`collator`, with batches that are complete before they are moved to the device. It is `collator` itself where a
    script overrides a method that gets batches: such a method reads the keys that the collator returned."""
    own: Mapping[str, Any] = trainer._own_hooks
    if overridden(type(trainer), own) or assigned_hooks(trainer, own):
        return collator
    return completed(collator, unwrap(trainer.model), columns_read(trainer.reference))


def check_layout(names: list[str], kind: type, options: LayoutChoice) -> None:
    """ValueError where a class `kind` that overrides the methods `names` would get rows that it cannot read."""
    if not names:
        return
    if options.layout in LAYOUTS and LAYOUTS[options.layout].fills_rows:
        asked = f"layout={options.layout!r}"
    elif options.padding_free:
        asked = "padding_free=True"
    elif options.tokens_per_batch is not None and LOSS_HOOK in names:
        asked = f"tokens_per_batch={options.tokens_per_batch}"
    else:
        return
    found = "compute a whole batch at once" if asked.startswith("tokens") else "read padded rows, chosen ones first"
    raise ValueError(
        f"{asked} was asked for, but {kind.__name__} overrides {', '.join(names)}, which may {found}. Drop the option "
        "(rows are then padded, with the keys input_ids, attention_mask and completion_mask), or set the class "
        f"attribute `reads_any_layout = True` in {kind.__name__} if it hands batches on unread."
    )


def padded_line(names: list[str], kind: type) -> str:
    """What is said where rows are padded for such a class."""
    return (
        f"layout: padded, because {kind.__name__} overrides {', '.join(names)}: its batches have the keys input_ids, "
        "attention_mask and completion_mask, the chosen rows first. (A class that hands batches on unread may set "
        "`reads_any_layout = True`.)"
    )


@final
class HandedBatch:
    """The batch that an overridden `compute_loss` has now, and what is known of it besides its keys."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._ahead: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def handed_out(self, tensors: Mapping[str, Tensor], sums: PairLogps | None) -> dict[str, Tensor]:
        """The batch that the hook gets. `sums` are the reference's log-probs where they were scored ahead."""
        self._tensors = {name: tensor for name, tensor in tensors.items() if name not in (_AHEAD, *REFERENCE_COLUMNS)}
        self._ahead = tensors.get(_AHEAD)
        values = () if sums is None else (sums.chosen, sums.rejected)
        self._sums = dict(zip(REFERENCE_COLUMNS, values, strict=False))
        return self._tensors | self._sums

    def taken_back(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the hook handed on, with what was scored ahead if it is the same batch. ValueError where the hook put
        log-probs of its own in place of the reference's."""
        for name, tensor in self._sums.items():
            if name in tensors and tensors[name] is not tensor:
                raise ValueError(
                    f"`compute_loss` was handed another {name!r} than the batch had, and the loss would compare with "
                    "the reference's own. Pass them as the dataset's columns, or compute that loss in the subclass."
                )
        batch = {name: tensor for name, tensor in tensors.items() if name not in self._sums}
        is_same = self._tensors.keys() == batch.keys() and all(batch[name] is self._tensors[name] for name in batch)
        return batch | {_AHEAD: self._ahead} if is_same and self._ahead is not None else batch
