"""What stands in the rows of a batch that hold several sequences, and which tokens see each other there.

A row is a run of segments, each a prompt and its completions (`data.layouts.prefix_shared` lays them out), and then
padding. A completion sees its prompt and itself. A *span* is a run of tokens that is attended in one call: a prompt, a
group of its completions, or both together where they are few. Each span has a mask of its own, so no row pays for its
neighbours and no [T T] mask exists.

The model's own mask function says which earlier tokens a layer may see (sliding windows, chunks). It is called with
*positions*, not columns. So a sequence gets the mask that it would have alone in its row.

Given up: the scores between completions of one group, which are computed and then masked.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any, Self, TypeVar, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from holdfast.scoring.row_plan import RowPlan, SegmentLengths

SEGMENTS = "row_segments"
"""The model input under which a batch has its `Segments`; attention layers get it as a keyword argument."""

GROUP_TOKENS = 256
"""Most tokens of the completions that are attended together, and of a prompt with its completions. More would be fewer
calls, but more scores that are masked."""


Prepared = TypeVar("Prepared")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A prompt's number of tokens, and its completions' numbers of tokens, in groups that are attended together.

    A sequence that shares its prompt with no other is one segment without groups; `prompt` is then its whole length.
    """

    prompt: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def is_joined(self) -> bool:
        """Whether prompt and completions are one span."""
        return len(self.groups) == 1 and self.prompt + sum(self.groups[0]) <= GROUP_TOKENS

    def span_lengths(self) -> list[int]:
        """The number of tokens of each span, in reading order."""
        groups = [*map(sum, self.groups)]
        return [self.prompt + groups[0]] if self.is_joined else [self.prompt, *groups]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """The segments of every row of a batch, in reading order; what is left of a row's `num_columns` is padding.

    The lengths are Python numbers and stay in host memory wherever the batch goes. Reading them from a device would
    wait for the device. What kernels read on the device is the `plan`, which goes with the batch: data loaders and
    accelerate call `pin_memory` and `to`. What else is worked out from the lengths, on whatever device, is kept beside
    them for every model that scores the batch.
    """

    rows: tuple[tuple[Segment, ...], ...]
    num_columns: int
    plan: RowPlan | None = field(default=None, compare=False, repr=False)
    _prepared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int, bool]], num_rows: int, num_columns: int) -> "Segments":
        """From one (row, number of tokens, whether it is a prompt) for each prompt and each of its completions.

        A completion follows its prompt.
        """
        rows: list[list[tuple[int, list[int]]]] = [[] for _ in range(num_rows)]
        for row, length, is_prompt in lengths:
            if is_prompt:
                rows[row].append((length, []))
            else:
                rows[row][-1][1].append(length)
        segments = tuple(tuple(Segment(prompt=p, groups=_grouped(lengths)) for p, lengths in row) for row in rows)
        return cls(rows=segments, num_columns=num_columns)

    def lengths(self) -> list[list[SegmentLengths]]:
        """Of each row's segments the number of tokens of the prompt, and of each completion."""
        return [[(segment.prompt, [*chain.from_iterable(segment.groups)]) for segment in row] for row in self.rows]

    def planned(self) -> Self:
        """These segments with their plan, in host memory."""
        return replace(self, plan=RowPlan.of(self.lengths(), self.num_columns))

    def of_rows(self, first: int, last: int) -> Self:
        """The segments of the rows from `first` to before `last`, with a plan where these have one."""
        own = replace(self, rows=self.rows[first:last], plan=None)
        return own if self.plan is None else own.planned()

    def pin_memory(self) -> Self:
        """These segments with their plan, if they have one, in memory that is copied without waiting."""
        return self if self.plan is None else replace(self, plan=self.plan.pin_memory())

    def to(self, device: Any, non_blocking: bool = True) -> Self:
        """These segments with their plan on `device`; made here if there is none and the device is not the CPU."""
        device = torch.device(device)
        plan = self.plan
        if plan is None:
            if device.type == "cpu":
                return self
            plan = RowPlan.of(self.lengths(), self.num_columns)
        if plan.numbers.device.type == device.type and device.index in (None, plan.numbers.device.index):
            return self if plan is self.plan else replace(self, plan=plan)
        if plan.numbers.device.type == "cpu" and device.type == "cuda" and not plan.numbers.is_pinned():
            plan = plan.pin_memory()
        return replace(self, plan=plan.to(device, non_blocking))

    def plan_on(self, device: torch.device) -> RowPlan:
        """The plan on `device`."""
        plan = self.to(device).plan
        return RowPlan.of(self.lengths(), self.num_columns) if plan is None else plan

    def __iter__(self) -> Iterator[Segment]:
        for row in self.rows:
            yield from row

    def prepared_once(self, key: Hashable, prepare: Callable[[], Prepared]) -> Prepared:
        """What `prepare` returned when it was first asked for under this key."""
        if key not in self._prepared:
            self._prepared[key] = prepare()
        return self._prepared[key]

    def span_lengths(self, row: int) -> list[int]:
        """The number of tokens of each span of a row, and last of its padding."""
        lengths = [n for segment in self.rows[row] for n in segment.span_lengths()]
        return [*lengths, self.num_columns - sum(lengths)]

    def unread_and_read(self) -> list[int]:
        """Numbers of tokens of all rows laid end to end, in turn: of a run whose last hidden states are not read, of a
        run whose last hidden states are read, and so on.

        The read tokens are those that predict a completion token: a prompt's last one, and its completions. A segment
        without groups counts as read in full, because it does not record where its completion begins.
        """
        runs = [0, 0]

        def extend(unread: int, read: int) -> None:
            if unread > 0 and runs[-1] > 0:
                runs.extend([0, 0])
            runs[-2:] = [runs[-2] + unread, runs[-1] + read]

        for index, row in enumerate(self.rows):
            for segment in row:
                unread = max(0, segment.prompt - 1) if segment.groups else 0
                extend(unread, segment.prompt - unread + sum(map(sum, segment.groups)))
            extend(self.span_lengths(index)[-1], 0)
        return runs

    @property
    def share_no_prompt(self) -> bool:
        """Whether every sequence has its own copy of its prompt: the rows are packed, and share nothing."""
        return not any(segment.groups for segment in self)

    def flash_arguments(self, device: torch.device) -> dict[str, Any]:
        """The keyword arguments that tell FlashAttention where sequences end in all rows laid end to end, padding among
        them. Only for segments that `share_no_prompt`."""
        lengths = [n for row in range(len(self.rows)) for n in self.span_lengths(row) if n > 0]
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
        longest = max(lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def masks(self, visible: Callable[..., Tensor], device: torch.device) -> Bool[Tensor, "M"]:
        """Which keys each query sees, True where it does: the masks of all spans, flattened, one after another.

        The prompts' masks come first, unless all are plainly causal. The mask of each group follows: [tokens of the
        group, tokens of its prompt and of itself], with the prompt among the queries too where the two are joined.
        `visible` is a mask function of transformers; it is called with positions.
        """
        prompts = [] if visible is causal_mask_function else self._prompt_masks(visible, device)
        groups = [
            _group_mask(visible, segment.prompt, group, device, is_joined=segment.is_joined)
            for segment in self
            for group in segment.groups
        ]
        none = torch.empty(0, dtype=torch.bool, device=device)
        return torch.cat([none, *(mask.flatten() for mask in (*prompts, *groups))])

    def _prompt_masks(self, visible: Callable[..., Tensor], device: torch.device) -> list[Tensor]:
        """Every prompt begins at position 0, so its mask is a corner of that of the longest one."""
        prompts = [segment.prompt for segment in self if not segment.is_joined]
        longest = max(prompts, default=0)
        positions = torch.arange(longest)
        seen = _seen(visible, positions, positions)  # in host memory: the comparison must not wait for the device
        if torch.equal(seen, torch.ones_like(seen).tril()):
            return []
        positions = torch.arange(longest, device=device)
        seen = _seen(visible, positions, positions)
        return [seen[:prompt, :prompt] for prompt in prompts]

    def split_masks(self, masks: Tensor) -> tuple[Iterator[Tensor | None], Iterator[Tensor]]:
        """The masks of `masks` taken apart again: one for each prompt (None: plainly causal), one for each group."""
        prompts = [(segment.prompt, segment.prompt) for segment in self if not segment.is_joined]
        groups = [
            (sum(group) + segment.prompt * segment.is_joined, segment.prompt + sum(group))
            for segment in self
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
    # Everything is made on the device: a copy from host memory would wait for it.
    owners = [torch.full((length,), index, device=device) for index, length in enumerate((prompt, *group))]
    starts = (0, *(prompt for _ in group))
    lengths = (prompt, *group)
    ranges = [torch.arange(start, start + length, device=device) for start, length in zip(starts, lengths, strict=True)]
    owner, positions = torch.cat(owners), torch.cat(ranges)
    first = 0 if is_joined else prompt
    is_own = (owner == 0) | (owner == owner[first:, None])  # owner 0 is the prompt, whose keys every query sees
    return _seen(visible, positions[first:], positions) & is_own


def _seen(visible: Callable[..., Tensor], queries: Int[Tensor, "q"], keys: Int[Tensor, "k"]) -> Bool[Tensor, "q k"]:
    first = torch.zeros((), dtype=torch.int64, device=queries.device)  # row and head
    return visible(first, first, queries[:, None], keys[None, :]).expand(len(queries), len(keys))


def _shaped(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    masks = flat.split([queries * keys for queries, keys in shapes])
    return [mask.view(shape) for mask, shape in zip(masks, shapes, strict=True)]
