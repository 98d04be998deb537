"""The numbers that losses read."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """The numbers that losses read, named as in `DPOConfig`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0


def require_known(option: str, name: str, known: Iterable[str]) -> None:
    """ValueError where `name` is none of the `known` values of an option; it says which is the nearest."""
    if name not in (names := list(known)):
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(f"{option} '{name}' is unknown. Did you mean '{nearest}'? There are {', '.join(names)}.")
