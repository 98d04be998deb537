"""A batch of any layout -> the same pairs with a row for each completion.

A user's function that gets logits needs such rows, [2P T]. Given up: rows as long as the collator would have made them;
the number of padding tokens may differ.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.sequences import TokenSequence
from holdfast.scoring.segments import SEGMENTS


def row_per_completion(tensors: Mapping[str, Any], pad_token_id: int) -> dict[str, Tensor]:
    """The pairs of a batch as `PaddedLayout` lays them out; a batch whose rows hold no segments comes back as it is."""
    if SEGMENTS not in tensors:
        return dict(tensors)
    ids, positions, source, target, sequence = (
        tensors[name].reshape(-1).cpu().numpy()
        for name in ("input_ids", "position_ids", "source", "target", "sequence")
    )
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    sequences = []
    for first, completion in zip(source[starts], np.split(target, starts[1:]), strict=True):
        num_prompt = positions[first] + 1  # or the completion's own first token, where there is no prompt
        sequences.append(
            TokenSequence(np.concatenate([ids[first + 1 - num_prompt : first + 1], completion]), int(num_prompt))
        )
    order = torch.cat([tensors["chosen"], tensors["rejected"]]).tolist()
    return PaddedLayout(pad_token_id).of_pairs([sequences[index] for index in order])
