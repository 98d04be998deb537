"""Pairs in whose completions only some tokens are scored, one of each kind, and what the oracle says of them."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

import oracle
from families import VOCABULARY

SIDES = {"chosen_ids": "chosen_mask", "rejected_ids": "rejected_mask"}

MASKS: list[tuple[list[int] | None, list[int] | None]] = [
    ([1, 1, 0, 0, 1, 1], [1, 0, 1]),  # turns of others in the middle
    ([0, 0, 1, 1], [1, 1, 1, 1, 1]),  # a turn of the user first; a mask of ones
    ([1, 1, 1, 0, 0, 0], None),  # a turn of the user last; no mask
    ([], [0, 1, 0, 1, 0, 0]),  # an empty mask; everything at once
    ([0, 1, 0], [0, 0, 0, 0, 1, 0]),  # one token each
    (None, None),
]


def masked_rows() -> list[dict[str, Any]]:
    """A pair for each of `MASKS`, and three of one prompt: one completion twice with other masks, then with its own
    scored end alone, and a longer one."""
    draw = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()

    lengths = [[len(mask) if mask else 4 for mask in masks] for masks in MASKS]
    rows = [
        {"prompt_ids": ids(3 + n), "chosen_ids": ids(a), "rejected_ids": ids(b), "chosen_mask": c, "rejected_mask": r}
        for n, ((a, b), (c, r)) in enumerate(zip(lengths, MASKS, strict=True))
    ]
    prompt, shared, other = ids(5), ids(6), ids(7)
    first = {"prompt_ids": prompt, "chosen_ids": shared, "chosen_mask": [1, 1, 0, 0, 1, 1]}
    rows += [
        first | {"rejected_ids": other, "rejected_mask": [1, 1, 1, 0, 0, 1, 0]},
        first | {"chosen_mask": [1, 0, 0, 0, 1, 1], "rejected_ids": shared[:2], "rejected_mask": None},
        first | {"chosen_mask": None, "rejected_ids": other, "rejected_mask": [0, 0, 0, 0, 1, 1, 1]},
    ]
    return rows


def masked_data() -> Dataset:
    """The rows as a dataset; a mask of None stays None."""
    return Dataset.from_list(masked_rows())


def scored_logps(model: nn.Module, row: dict[str, Any], side: str) -> Tensor:
    """The oracle's log-probs of the scored tokens of one completion, which the model reads whole."""
    return oracle.scored(oracle.sequence_logps(model, row["prompt_ids"], row[side]), row.get(SIDES[side]))


def scored_log_sum_sq_probs(model: nn.Module, row: dict[str, Any], side: str) -> Tensor:
    """What WPO normalises by, of the same tokens."""
    return oracle.scored(oracle.sequence_log_sum_sq_probs(model, row["prompt_ids"], row[side]), row.get(SIDES[side]))


def oracle_losses(
    loss: str,
    policy: nn.Module,
    reference: nn.Module,
    batch: list[dict[str, Any]],
    options: dict[str, Any],
    *,
    is_weighted: bool = False,
) -> Tensor:
    """The losses of the pairs of `batch`, [P]; with `is_weighted` each times its WPO weight."""
    chosen, rejected = ([scored_logps(policy, row, side) for row in batch] for side in SIDES)
    with torch.no_grad():
        of_reference = [[scored_logps(reference, row, side) for row in batch] for side in SIDES]
        squares = [[scored_log_sum_sq_probs(policy, row, side) for row in batch] for side in SIDES]
    losses = oracle.LOSS_ORACLE[loss](chosen, rejected, *of_reference, options)
    return losses * oracle.wpo_weights(chosen, rejected, *squares) if is_weighted else losses
