"""Which completions the pairs of a dataset have, by content id, as arrays: what is looked up in a store for them."""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from holdfast.batch import ContentId
from holdfast.data.layouts.sequences import TokenSequence, content_id_of


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PairContent:
    """The P pairs of a dataset, in its order, after truncation.

    `content [P 4]` are the content ids of the chosen and of the rejected completion, two halves each. `lengths [P 2]`
    are their numbers of scored tokens, and `prompts [P]` those of tokens in the prompt before the chosen one.
    """

    content: NDArray[np.int64]
    lengths: NDArray[np.int64]
    prompts: NDArray[np.int64]

    def ids(self) -> list[tuple[ContentId, ContentId]]:
        """The content ids of both completions of each pair."""
        return [((a, b), (c, d)) for a, b, c, d in self.content.tolist()]


@final
class PairContentInProgress:
    """`PairContent` while completions are read. Sides are 0 for chosen and 1 for rejected."""

    def __init__(self) -> None:
        self._content: tuple[list[ContentId], list[ContentId]] = ([], [])
        self._lengths: tuple[list[int], list[int]] = ([], [])
        self._prompts: list[int] = []

    def add(self, side: int, sequence: TokenSequence) -> ContentId:
        """Adds the completion of the next pair on that side. Returns its content id."""
        content_id = content_id_of(sequence)
        self._content[side].append(content_id)
        self._lengths[side].append(sequence.num_targets)
        if side == 0:
            self._prompts.append(sequence.num_prompt)
        return content_id

    def done(self) -> PairContent:
        """All that was added."""
        sides = [np.array(side, dtype=np.int64).reshape(-1, 2) for side in self._content]
        return PairContent(
            content=np.concatenate(sides, axis=1),
            lengths=np.array(self._lengths, dtype=np.int64).T,
            prompts=np.array(self._prompts, dtype=np.int64),
        )
