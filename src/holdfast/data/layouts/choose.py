"""Which layout a run has: the one that its options ask for, once a trial shows that the models compute it right.

Some models silently read rows of several sequences wrongly: those that carry state along a row, count distance in
columns, or drop the arguments of their attention. So before anything is scored each model of the run, policy and
references alike, is tried on the first batch (`trial.LayoutTrial`). All models get the same layout: padded and shared
rows differ by rounding, and a margin is a difference of two log-probs.

Given up: a layout for each model, which would let a policy share prompts although its reference cannot.
"""

import logging
from typing import Any, Protocol

from holdfast.data.layouts.base import Layout, LayoutOptions
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.preference_collator import DataCollatorForPreference
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.data.layouts.trial import LayoutTrial

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[type[Layout], ...] = (SharedLayout, PackedLayout, PaddedLayout)

LAYOUTS = {layout.name: layout for layout in _LAYOUTS}
"""The layouts by the name that the option `layout` has for them."""

FIRST = SharedLayout
"""What `layout="auto"` tries first; the next is its `fallback`."""


class ChoiceOptions(LayoutOptions, Protocol):
    """The options of a run (`DPOConfig`) that say which layout it has."""

    layout: str
    padding_free: bool


def make_layout(options: ChoiceOptions, pad_token_id: int) -> Layout:
    """The layout that `options.layout` names, untried; for `auto` the first one to try."""
    return LAYOUTS.get(options.layout, FIRST).of_options(pad_token_id, options)


def layout_of(collator: Any) -> Layout | None:
    """The layout of the batches that `collator` makes; None for a user's own collator, whose layout is unknown."""
    if type(collator) is DataCollatorForPreference:
        return PaddedLayout(
            collator.pad_token_id, collator.max_length, collator.truncation_mode, collator.pad_to_multiple_of
        )
    return collator if isinstance(collator, Layout) else None


def preference_collator(layout: Layout) -> DataCollatorForPreference:
    """The collator of padded rows with the keys that scripts know, which cuts and pads as `layout` does."""
    return DataCollatorForPreference(
        layout.pad_token_id, layout.max_length, layout.truncation_mode, layout.pad_to_multiple_of
    )


def choose_layout(collator: Any, options: ChoiceOptions, trial: LayoutTrial) -> Any:
    """`collator`, where all models compute its layout right or it is a user's own.

    Otherwise, if `options.layout` is `auto`, the first fallback that all models compute right; a warning says why.
    Raises ValueError where `options.layout` names the layout that a model computes wrongly, and where padded rows are
    the only right ones and `options.padding_free` forbids them.
    """
    first = layout_of(collator)
    if first is None or (reason := trial.problem(first)) is None:
        return collator
    if options.layout != "auto" or first.name != FIRST.name:
        raise ValueError(
            f"layout={first.name!r} was asked for, but {reason}. Use layout='auto', which takes one that fits."
        )
    layout = first.fallback()
    while layout is not None and trial.problem(layout) is not None:
        layout = layout.fallback()
    assert layout is not None, "the last layout to fall back to is right for every model"
    if options.padding_free and not layout.fills_rows:
        raise ValueError(
            f"padding_free=True was asked for, but {reason}. Drop it, and the rows of this model will be padded."
        )
    if trial.accelerator.is_main_process:
        logger.warning("layout: %s, because %s", layout.name, reason)
    return layout
