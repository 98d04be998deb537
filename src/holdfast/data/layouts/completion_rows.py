"""A batch of any layout -> the same pairs with a row for each completion.

A user's function that gets logits needs such rows, [2P T]. Given up: rows as long as the collator would have made them;
the number of padding tokens may differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.sequences import TokenSequence
from holdfast.scoring.segments import SEGMENTS


def row_per_completion(tensors: Mapping[str, Any], pad_token_id: int) -> dict[str, Any]:
    """The pairs of a batch as `PaddedLayout` lays them out; a batch whose rows hold no segments comes back as it is."""
    if SEGMENTS not in tensors:
        return dict(tensors)
    ids, positions, source, target, sequence = (
        tensors[name].reshape(-1).cpu().numpy()
        for name in ("input_ids", "position_ids", "source", "target", "sequence")
    )
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    runs = _Runs.of(ids, positions)
    sequences = [
        _sequence(runs.up_to(sources[-1]), targets, positions[sources] + 1)
        for sources, targets in zip(np.split(source, starts[1:]), np.split(target, starts[1:]), strict=True)
    ]
    order = torch.cat([tensors["chosen"], tensors["rejected"]]).tolist()
    return PaddedLayout(pad_token_id).of_pairs([sequences[index] for index in order])


def _sequence(ids: np.ndarray, targets: np.ndarray, places: np.ndarray) -> TokenSequence:
    """The sequence with `ids` before its last token, whose scored tokens are `targets` and stand at `places`. What is
    before the first of them counts as prompt."""
    num_prompt = int(places[0])
    scored = np.zeros(len(ids) + 1 - num_prompt, dtype=bool)
    scored[places - num_prompt] = True
    return TokenSequence(np.append(ids, targets[-1]), num_prompt, None if scored.all() else scored)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    """Filled rows as runs of tokens at consecutive positions: a prompt with its first completion, or a further
    completion. `starts` are the flat positions at which runs begin."""

    ids: np.ndarray
    positions: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, positions: np.ndarray) -> "_Runs":
        """The runs of rows, laid end to end, of `ids` at these positions of their sequences."""
        return cls(ids=ids, positions=positions, starts=np.flatnonzero(np.diff(positions, prepend=-2) != 1))

    def up_to(self, last: int) -> np.ndarray:
        """The ids of a sequence from its beginning to the flat position `last`."""
        number = int(np.searchsorted(self.starts, last, side="right")) - 1
        start = self.starts[number]
        num_prompt = self.positions[start]  # of a further completion; else 0
        while self.positions[self.starts[number]] > 0:
            number -= 1
        prompt = self.starts[number]
        return np.concatenate([self.ids[prompt : prompt + num_prompt], self.ids[start : last + 1]])
