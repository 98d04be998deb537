"""Whether the losses of a run, their options and modifiers make sense together."""

import math
from collections.abc import Callable, Sequence

from holdfast.losses.modifiers import F_DIVERGENCES
from holdfast.losses.options import LossOptions, require_known
from holdfast.losses.table import LOSSES

# Per option: what holds of an allowed value, that in words, and what to do.
_RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "beta": (lambda value: value > 0, " above 0", "0.1 is a usual value."),
    "label_smoothing": (lambda value: 0 <= value < 0.5, " in [0, 0.5)", "If most labels are wrong, swap the columns."),
    "f_alpha_divergence_coef": (lambda _: True, "", "Choose one between 0 (forward_kl) and 1 (reverse_kl)."),
    "discopop_tau": (lambda value: value > 0, " above 0", "0.05 is the value of its paper."),
    "simpo_gamma": (lambda value: value >= 0, " of at least 0", "Use 0 for no target margin."),
    "cpo_alpha": (lambda value: value >= 0, " of at least 0", "Use 0 for no likelihood term."),
}


def check_losses(
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    options: LossOptions,
    *,
    ld_alpha: float | None,
    use_weighting: bool,
) -> None:
    """None; ValueError where losses, options and modifiers make no sense together, or no loss would read an option."""
    given, defaults = list(loss_types), LossOptions()
    if not given:
        raise ValueError(f"loss_type must name at least one loss, got none. Choose from {', '.join(LOSSES)}.")
    for name in given:
        require_known("loss_type", name, LOSSES)
    if len(loss_weights) != len(given) or not all(map(math.isfinite, loss_weights)):
        raise ValueError(f"loss_weights must be finite, one per loss, got {list(loss_weights)}. Weigh each of {given}.")
    for field, (is_allowed, rule, remedy) in _RANGES.items():
        if not (math.isfinite(value := getattr(options, field)) and is_allowed(value)):
            raise ValueError(f"{field} must be a finite number{rule}, got {value}. {remedy}")
    require_known("f_divergence_type", options.f_divergence_type, F_DIVERGENCES)
    if ld_alpha is not None and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {ld_alpha}. Use None (or 1) to count all tokens alike.")
    if "exo_pair" in given and options.label_smoothing == 0:
        raise ValueError("exo_pair takes the log of label_smoothing, got 0. Set 1e-3, as its paper recommends.")
    sorting = [name for name in given if LOSSES[name].sorts_batch]
    if use_weighting and sorting:
        raise ValueError(f"use_weighting weighs pairs, but {sorting[0]} sorts them apart. Give up one of the two.")
    others = [name for name in given if name != "sft"]  # sft reads no option, and may stand beside any loss
    for field in ("label_smoothing", "f_divergence_type", "discopop_tau", "simpo_gamma", "cpo_alpha"):
        value, default = getattr(options, field), getattr(defaults, field)
        unable = [name for name in others if field not in LOSSES[name].reads]
        # A number may concern one term of a sum; a divergence says what is optimal, so all terms must share it.
        if value != default and (len(unable) == len(others) or (unable and field == "f_divergence_type")):
            readers = ", ".join(name for name, loss in LOSSES.items() if field in loss.reads)
            unread = f"{field}={value} is not read by {', '.join(unable) or 'sft'}"
            raise ValueError(f"{unread}. Leave it at {default}, or choose from {readers}.")
    coef, divergence = options.f_alpha_divergence_coef, options.f_divergence_type
    if coef != defaults.f_alpha_divergence_coef and divergence != "alpha_divergence":
        raise ValueError(
            f"f_alpha_divergence_coef={coef} is not read by {divergence}. Drop it or use alpha_divergence."
        )
    if ld_alpha is not None and not others:
        raise ValueError(f"ld_alpha={ld_alpha} is not read by sft. Set it to None, or add a preference loss.")
