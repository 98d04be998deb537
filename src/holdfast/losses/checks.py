"""Whether the losses of a run, their options and their modifiers make sense together.

`DPOConfig` calls `check_losses` once, before any model is loaded. An option that no loss of the run would read is
refused, not ignored.
"""

from collections.abc import Sequence

from holdfast.losses.modifiers import ModifierOptions
from holdfast.losses.objective import LossOptions
from holdfast.losses.options import check_values, is_finite_number, option_names, rules
from holdfast.losses.other_names import require_loss
from holdfast.losses.table import LOSSES


def check_losses(
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    options: LossOptions,
    *,
    ld_alpha: float | None,
    use_weighting: bool,
    weight_column: str | None = None,
    margin_column: str | None = None,
) -> None:
    """ValueError where losses, options and modifiers contradict each other, or where no loss would read an option."""
    names = list(loss_types)
    if not names:
        raise ValueError(f"loss_type must name at least one loss, got none. Choose from {', '.join(LOSSES)}.")
    for name in names:
        require_loss(name, LOSSES)
    if len(loss_weights) != len(names) or not all(map(is_finite_number, loss_weights)):
        raise ValueError(f"loss_weights must be finite, one per loss, got {list(loss_weights)}. Weigh each of {names}.")
    if not any(loss_weights):
        raise ValueError(f"loss_weights must not all be 0, got {list(loss_weights)}. Weigh one of {names}.")
    check_values(options)
    check_values(ModifierOptions(ld_alpha=ld_alpha, use_weighting=use_weighting))
    for name in names:
        objection = LOSSES[name].objection
        if objection is not None and (reason := objection(options)) is not None:
            raise ValueError(f"{name} {reason}")
    sorting = [name for name in names if LOSSES[name].sorts_batch]
    weighing = "use_weighting" if use_weighting else "weight_column" if weight_column is not None else None
    if weighing is not None and sorting:
        raise ValueError(f"{weighing} weighs pairs, but {sorting[0]} sorts them apart. Give up one of the two.")
    if margin_column is not None and not any(LOSSES[name].reads_margins for name in names):
        able = ", ".join(name for name, loss in LOSSES.items() if loss.reads_margins)
        raise ValueError(
            f"margin_column={margin_column!r} is not read by {', '.join(names)}. Leave it out, or choose from {able}."
        )
    _check_readers(names, options)
    _check_read_under(options)
    if ld_alpha is not None and not _with_options(names):
        raise ValueError(f"ld_alpha={ld_alpha} is not read by {names[0]}. Set it to None, or add a preference loss.")


def _with_options(names: Sequence[str]) -> list[str]:
    """The losses that have options. One without (`sft`) may be combined with any loss and any option."""
    return [name for name in names if option_names(LOSSES[name].options)]


def _check_readers(names: Sequence[str], options: LossOptions) -> None:
    """ValueError where an option that is not at its default is read by no loss, or by too few of them."""
    defaults, readers = LossOptions(), _with_options(names)
    for option, rule in rules(LossOptions).items():
        value, default = getattr(options, option), getattr(defaults, option)
        if value == default or option == "beta" or rule.read_under is not None:  # the logged rewards read beta
            continue
        unable = [name for name in readers if option not in LOSSES[name].reads]
        if len(unable) == len(readers) or (unable and rule.concerns_all_losses):
            able = ", ".join(name for name, loss in LOSSES.items() if option in loss.reads)
            unread = f"{option}={value} is not read by {', '.join(unable) or names[0]}"
            raise ValueError(f"{unread}. Leave it at {default}, or choose from {able}.")


def _check_read_under(options: LossOptions) -> None:
    """ValueError where an option that is not at its default only counts under another value of a second option."""
    defaults = LossOptions()
    for option, rule in rules(LossOptions).items():
        value = getattr(options, option)
        if rule.read_under is not None and value not in (getattr(defaults, option), *rule.other_defaults):
            other, needed = rule.read_under
            if (setting := getattr(options, other)) != needed:
                raise ValueError(f"{option}={value} is not read by {setting}. Drop it or use {needed}.")
