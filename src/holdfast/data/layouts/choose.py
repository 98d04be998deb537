"""Which layout the rows of a run get: what was asked for, once the models have been seen to compute it right.

Rows that hold several sequences are read wrongly, and without a word, by models that carry state along a row, count
distance in columns, or drop the arguments of their attention. So before anything is scored each model of the run,
policy and references alike, is tried on the first batch (`trial.LayoutTrial`). One layout holds for all of them: padded
and shared rows differ by rounding, and a margin is a difference of two log-probs.

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
    """The layout in which `collator` lays pairs out; None for a user's own collator, of which nothing is known."""
    if type(collator) is DataCollatorForPreference:
        options = (collator.max_length, collator.truncation_mode, collator.pad_to_multiple_of)
        return PaddedLayout(collator.pad_token_id, *options)
    return collator if isinstance(collator, Layout) else None


def choose_layout(collator: Any, options: ChoiceOptions, trial: LayoutTrial) -> Any:
    """`collator`, once the models have been seen to compute right what it lays out. Where they do not, and
    `options.layout` is `auto`, the next fallback that they do, with a line on why. A user's own collator comes back as
    it is.

    Raises ValueError where the layout that was named is wrong for a model, and where padded rows are all that is right
    and `options.padding_free` forbids them.
    """
    if trial.is_sharded and options.tokens_per_batch is not None:
        raise ValueError(
            f"tokens_per_batch={options.tokens_per_batch} was asked for, but the weights are sharded: all processes "
            "must compute equally many parts, and their batches differ. Lower per_device_train_batch_size instead."
        )
    asked = layout_of(collator)
    if asked is None or (reason := trial.problem(asked)) is None:
        return collator
    if options.layout != "auto" or asked.name != FIRST.name:
        raise ValueError(
            f"layout={asked.name!r} was asked for, but {reason}. Use layout='auto', which takes one that fits."
        )
    layout = asked.fallback()
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
