"""Whether a mask function of transformers lets each token see the last `w` tokens up to itself, and what `w` is.

Some kernels take such a band as a number in place of a mask. Mask functions are made anew in every forward pass, so a
function is recognised by its code and the values that it closes over. Nothing is computed with it.

Given up: functions that are bands and are written otherwise than transformers' own. They go by another route.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, final

from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Each token sees the last `window` tokens up to itself, or all of them where that is None."""

    window: int | None


def band_of(visible: Callable[..., Any]) -> Band | None:
    """The band that the mask function `visible` is; None where it is none, or cannot be recognised."""
    if visible is causal_mask_function:
        return Band(window=None)
    own = _parts(visible)
    for window in {part for part in own if type(part) is int}:
        if window > 0 and _parts(sliding_window_causal_mask_function(window)) == own:
            return Band(window=window)
    return None


@final
@dataclass(frozen=True, slots=True)
class _Code:
    """The code of a function. Two are equal if they are one object."""

    number: int


def _parts(value: Any) -> tuple[Any, ...]:
    """The code and the closed-over values of a function, of the functions among them too. What is neither a function
    nor a plain value equals nothing else."""
    if isinstance(value, FunctionType):
        cells = [part for cell in value.__closure__ or () for part in _parts(cell.cell_contents)]
        defaults = [part for default in value.__defaults__ or () for part in _parts(default)]
        return (_Code(id(value.__code__)), *cells, *defaults)
    if isinstance(value, tuple):
        return ("(", *(part for item in value for part in _parts(item)), ")")
    return (value,) if isinstance(value, int | float | str | bool | None) else (object(),)
