"""Rotary embeddings whose frequencies change with the longest row of a batch, pinned for the run.

The kinds `dynamic` and `longrope` take their frequencies from the longest row of the batch. Some keep them for the
batches that follow. A log-prob would then depend on the row's neighbours. So such an embedding gets the frequencies for
rows of `max_length` tokens, for the whole run. Given up: the frequencies that the model would use for a batch of short
rows.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from holdfast.data.columns import columns_of_pairs
from holdfast.data.ragged import lengths_of_pairs
from holdfast.policy.untouched import plain_attributes
from holdfast.scoring.causal_lm import unwrap

logger = logging.getLogger(__name__)

MOVING_ROTATIONS = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies change with the longest row of a batch."""


def has_moving_rotations(module: nn.Module) -> bool:
    """Whether `module` is a rotary embedding whose frequencies may change with the longest row of a batch."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    return any(moving in one for one in kinds if isinstance(one, str) for moving in MOVING_ROTATIONS)


_UNPINNED = "_before_it_was_pinned"
"""The attribute in which a pinned rotary embedding keeps its original plain attributes and buffers."""


def pin_rotations(
    models: Sequence[nn.Module], max_length: int | None, dataset: Any, *, is_main: bool = True
) -> int | None:
    """Pins the moving rotary frequencies of `models` to those for rows of `max_length` tokens, and logs that. Without a
    `max_length`, the longest row of the training data gives the length. Returns the length that was pinned; where no
    frequencies move, `max_length`.

    ValueError where frequencies move and the longest row is not known, as of a stream.
    """
    moving = [[part for part in model.modules() if has_moving_rotations(part) or _is_pinned(part)] for model in models]
    if not any(moving):
        return max_length
    length = longest_pair(dataset) if max_length is None else max_length
    if length is None:
        raise ValueError(
            f"max_length=None was asked for with a stream, but {type(unwrap(models[0])).__name__} takes its rotary "
            "frequencies from the longest row of a batch, and how long that can be is not known. Set max_length to the "
            "longest row that is meant; the frequencies are then those for this length in the whole run."
        )
    for model, parts in zip(models, moving, strict=True):
        if sum(pin(part, length) for part in parts) and is_main:
            logger.warning(
                "%s takes its rotary frequencies from the longest row of a batch. In this run they are those for rows "
                "of %d tokens, for all rows, so that a log-prob depends on its own row alone.",
                type(unwrap(model)).__name__, length,
            )  # fmt: skip
    return length


def _is_pinned(module: nn.Module) -> bool:
    return _UNPINNED in vars(module)


@torch.no_grad()
def pin(module: Any, length: int) -> bool:
    """Pins the frequencies of a rotary embedding to those for rows of `length` tokens. It may be pinned to another
    length already. Returns whether these differ from its original frequencies."""
    if not _is_pinned(module):
        plain = {name: value for name, value in plain_attributes(module).items() if not isinstance(value, Tensor)}
        vars(module)[_UNPINNED] = plain, {name: buffer.clone() for name, buffer in module.named_buffers()}
    attributes, buffers = vars(module)[_UNPINNED]
    vars(module).update(attributes)
    for name, buffer in buffers.items():
        setattr(module, name, buffer.to(next(module.buffers()), copy=True))
    kinds = module.rope_type if isinstance(module.rope_type, Mapping) else {None: module.rope_type}
    before = {name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    device = next(module.buffers()).device
    for kind in kinds:
        layer_type = {} if kind is None else {"layer_type": kind}
        last_position = torch.full((1, 1), length - 1, device=device)
        module(torch.zeros(1, 1, 1, device=device), last_position, **layer_type)
    module.rope_type = dict.fromkeys(kinds, "default") if isinstance(module.rope_type, Mapping) else "default"
    return any(not torch.equal(before[name], buffer) for name, buffer in module.named_buffers() if name in before)


def longest_pair(dataset: Any) -> int | None:
    """The number of tokens of the longest prompt with a completion, up to its last scored token, in the data; None for
    a stream."""
    if not isinstance(dataset, Dataset):
        return None
    table: Any = dataset.select_columns(columns_of_pairs(dataset.column_names)).with_format("arrow")
    longest = 0
    for rows in table.iter(1_000):
        prompt, chosen, rejected = lengths_of_pairs(rows)
        longest = max(longest, int((prompt + np.maximum(chosen, rejected)).max()))
    return longest
