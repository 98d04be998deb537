"""Which tokens of a completion are scored, and which are only seen: reading a mask, and cutting it with its token ids.

A completion of several turns holds messages that the model is not to say: those of the user, and results of tools. The
mask has a 0 for their tokens. Such a token is context for what follows, and no loss, metric or length counts it.

In a causal model nothing depends on the tokens after the last scored one. They are left out here, before truncation and
again after it. So they take no room in `max_length`, and none of a batch. A mask of ones is no mask: both give the same
rows, the same content id, the same numbers.

Given up: the load-balancing loss of those last tokens, in models with experts.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from holdfast.data.tokenize import TruncationMode, truncate

Mask = Bool[np.ndarray, "n"]


def read_mask(value: Any, column: str, ids_column: str, num_tokens: int) -> Mask | None:
    """The mask that a row has in `column`, for the `num_tokens` ids that it has in `ids_column`. None where all tokens
    are scored: for None, an empty list and a list of ones.

    Raises `ValueError` for anything but a list with a 0 or a 1 for each token.
    """
    if value is None:
        return None
    try:
        mask = np.asarray(value)
    except ValueError:  # lists of unlike lengths inside of it
        mask = np.empty((0, 0))
    if mask.ndim == 1 and mask.size == 0:
        return None
    is_flags = mask.ndim == 1 and mask.dtype.kind in "biu" and bool(((mask == 0) | (mask == 1)).all())
    if not is_flags or len(mask) != num_tokens:
        found = f"{len(mask)} values" if is_flags else f"{type(value).__name__} {str(value)[:60]}"
        raise ValueError(
            f"the column {column!r} must hold a list with a 1 (scored) or a 0 (only seen) for each of the {num_tokens} "
            f"token ids in {ids_column!r}; found {found}. Correct the row, or give None there: then all tokens are "
            "scored."
        )
    return None if mask.all() else mask.astype(bool)


def cut(
    prompt_ids: Int[np.ndarray, "p"],
    completion_ids: Int[np.ndarray, "n"],
    mask: Mask | None,
    max_length: int | None,
    mode: TruncationMode,
) -> tuple[Int[np.ndarray, "q"], Int[np.ndarray, "m"], Mask | None]:
    """Prompt, completion and mask, cut to `max_length` tokens and to the last scored token. The mask is None where all
    tokens that are left are scored; where none is, the completion is empty."""
    if mask is None:
        return *truncate(prompt_ids, completion_ids, max_length, mode), None
    length = _length_scored(mask)
    completion_ids, mask = completion_ids[:length], mask[:length]
    _, mask = truncate(prompt_ids, mask, max_length, mode)
    prompt_ids, completion_ids = truncate(prompt_ids, completion_ids, max_length, mode)
    length = _length_scored(mask)
    completion_ids, mask = completion_ids[:length], mask[:length]
    return prompt_ids, completion_ids, None if mask.all() else mask


def _length_scored(mask: Mask) -> int:
    """The number of tokens up to the last scored one."""
    return len(mask) - int(mask[::-1].argmax()) if mask.any() else 0
