"""What stands in the rows of a batch that hold several sequences, and who sees whom there.

A row is a run of segments, each a prompt and its completions (`data.layouts.prefix_shared` makes them). A completion
sees its prompt and itself. What is attended in one, a prompt, a group of its completions, or both where they are few,
gets a mask of its own, so that no row pays for its neighbours and no [T T] mask exists.

Which earlier tokens a layer may see (sliding windows, chunks) is asked of the model's own mask function, in
*positions*, not in columns: the same answer that the model gives itself when it has a row alone.

Given up: skipping what a group of completions computes for each other in vain.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import causal_mask_function

PIECES = "shared_pieces"
"""Where a batch has its `Pieces`, and the keyword argument under which attention layers find them."""

GROUP_TOKENS = 256
"""Completions of a prompt are attended together up to so many tokens, and with the prompt as well where all are so few:
fewer calls, little computed for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A prompt's number of tokens, and its completions' in groups that are attended together."""

    prompt: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def is_joined(self) -> bool:
        """Whether prompt and completions are attended in one."""
        return len(self.groups) == 1 and self.prompt + sum(self.groups[0]) <= GROUP_TOKENS

    def lengths(self) -> list[int]:
        """The tokens of what is attended in one, in reading order."""
        groups = [*map(sum, self.groups)]
        return [self.prompt + groups[0]] if self.is_joined else [self.prompt, *groups]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The pieces of every row of a batch, in reading order; what is left of a row's `num_columns` is padding.

    Python numbers and no tensor, so that they stay in host memory wherever the batch goes: to read lengths from a
    device is to wait for it.
    """

    rows: tuple[tuple[Segment, ...], ...]
    num_columns: int

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, int, bool]], num_rows: int, num_columns: int) -> "Pieces":
        """From (row, number of tokens, whether it is a prompt or else a completion of the last one) of each piece."""
        rows: list[list[tuple[int, list[int]]]] = [[] for _ in range(num_rows)]
        for row, length, is_prompt in pieces:
            if is_prompt:
                rows[row].append((length, []))
            else:
                rows[row][-1][1].append(length)
        made = tuple(tuple(Segment(prompt=p, groups=_grouped(completions)) for p, completions in row) for row in rows)
        return cls(rows=made, num_columns=num_columns)

    def segments(self) -> Iterator[Segment]:
        """Those of all rows."""
        for row in self.rows:
            yield from row

    def lengths(self, row: int) -> list[int]:
        """The tokens of what is attended in one in a row, then of its padding."""
        lengths = [n for segment in self.rows[row] for n in segment.lengths()]
        return [*lengths, self.num_columns - sum(lengths)]

    def read_runs(self) -> list[int]:
        """All rows laid end to end, as numbers of tokens in turn that predict no token of a completion, and that do:
        each prompt's last one, and its completions. A sequence that stands for itself counts in full."""
        runs = [0, 0]

        def extend(unread: int, read: int) -> None:
            if unread > 0 and runs[-1] > 0:
                runs.extend([0, 0])
            runs[-2:] = [runs[-2] + unread, runs[-1] + read]

        for index, row in enumerate(self.rows):
            for segment in row:
                unread = max(0, segment.prompt - 1) if segment.groups else 0
                extend(unread, segment.prompt - unread + sum(map(sum, segment.groups)))
            extend(self.lengths(index)[-1], 0)
        return runs

    @property
    def are_whole(self) -> bool:
        """Whether every sequence stands for itself, and shares its prompt with none."""
        return not any(segment.groups for segment in self.segments())

    def varlen(self, device: torch.device) -> dict[str, Any]:
        """What FlashAttention must be told of the sequences, if they `are_whole`: where they end in all rows laid end
        to end, padding among them."""
        lengths = [n for row in range(len(self.rows)) for n in self.lengths(row) if n > 0]
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
        longest = max(lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def masks(self, visible: Callable[..., Tensor], device: torch.device) -> Bool[Tensor, "M"]:
        """Which keys each query sees, all pieces one after another, True where it does.

        First that of the prompts, unless it is plainly causal; then for each group [tokens of the group, tokens of
        its prompt and of itself], where the prompt is among the queries too if it is joined. `visible` is a mask
        function of transformers, asked with positions.
        """
        prompts = [] if visible is causal_mask_function else self._prompt_masks(visible, device)
        groups = [
            _group_mask(visible, segment.prompt, group, device, is_joined=segment.is_joined)
            for segment in self.segments()
            for group in segment.groups
        ]
        none = torch.empty(0, dtype=torch.bool, device=device)
        return torch.cat([none, *(mask.flatten() for mask in (*prompts, *groups))])

    def _prompt_masks(self, visible: Callable[..., Tensor], device: torch.device) -> list[Tensor]:
        """Every prompt begins at position 0, so its mask is a corner of that of the longest one."""
        prompts = [segment.prompt for segment in self.segments() if not segment.is_joined]
        longest = max(prompts, default=0)
        positions = torch.arange(longest)
        seen = _seen(visible, positions, positions)  # asked in host memory, which is not waited for
        if torch.equal(seen, torch.ones_like(seen).tril()):
            return []
        positions = torch.arange(longest, device=device)
        seen = _seen(visible, positions, positions)
        return [seen[:prompt, :prompt] for prompt in prompts]

    def split(self, masks: Tensor) -> tuple[Iterator[Tensor | None], Iterator[Tensor]]:
        """`masks` taken apart again: one for each prompt (None: plainly causal), and one for each group."""
        prompts = [(segment.prompt, segment.prompt) for segment in self.segments() if not segment.is_joined]
        groups = [
            (sum(group) + segment.prompt * segment.is_joined, segment.prompt + sum(group))
            for segment in self.segments()
            for group in segment.groups
        ]
        num_of_groups = sum(queries * keys for queries, keys in groups)
        of_prompts, of_groups = masks.flatten().split([masks.numel() - num_of_groups, num_of_groups])
        shaped = _shaped(of_prompts, prompts) if of_prompts.numel() > 0 else [None] * len(prompts)
        return iter(shaped), iter(_shaped(of_groups, groups))


def _grouped(completions: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    groups: list[list[int]] = []
    for length in completions:
        if groups and sum(groups[-1]) + length <= GROUP_TOKENS:
            groups[-1].append(length)
        else:
            groups.append([length])
    return tuple(map(tuple, groups))


def _group_mask(
    visible: Callable[..., Tensor], prompt: int, group: Sequence[int], device: torch.device, *, is_joined: bool
) -> Bool[Tensor, "q k"]:
    # Nothing here is copied from the host, which would wait for the device.
    owners = [torch.full((length,), index, device=device) for index, length in enumerate((prompt, *group))]
    starts = (0, *(prompt for _ in group))
    lengths = (prompt, *group)
    ends = [torch.arange(start, start + length, device=device) for start, length in zip(starts, lengths, strict=True)]
    owner, positions = torch.cat(owners), torch.cat(ends)
    first = 0 if is_joined else prompt
    is_own = (owner == 0) | (owner == owner[first:, None])  # the prompt's keys are everybody's
    return _seen(visible, positions[first:], positions) & is_own


def _seen(visible: Callable[..., Tensor], queries: Int[Tensor, "q"], keys: Int[Tensor, "k"]) -> Bool[Tensor, "q k"]:
    first = torch.zeros((), dtype=torch.int64, device=queries.device)  # row and head
    return visible(first, first, queries[:, None], keys[None, :]).expand(len(queries), len(keys))


def _shaped(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = flat.split([queries * keys for queries, keys in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
