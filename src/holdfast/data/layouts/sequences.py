"""Tokenized pairs -> truncated sequences, and what every layout does with them.

Truncation happens here and not in the dataset, so that a dataset prepared once serves every `max_length`. A sequence is
a numpy array, which is hashed and copied into place without a loop over tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdfast.data.columns import CHOSEN_IDS, PROMPT_IDS, REJECTED_IDS
from holdfast.data.tokenize import TruncationMode, check_truncation, content_id, truncate


class TokenSequence(NamedTuple):
    """One sequence after truncation: int64 ids, of which the first `num_prompt` are the prompt."""

    ids: np.ndarray
    num_prompt: int


def content_id_of(sequence: TokenSequence) -> tuple[int, int]:
    """The content id of a sequence whose completion tokens all count."""
    return content_id(sequence.ids[: sequence.num_prompt], sequence.ids[sequence.num_prompt :])


def truncated_sequences(
    features: Sequence[Mapping[str, Any]], max_length: int | None, truncation_mode: TruncationMode
) -> list[TokenSequence]:
    """All chosen sequences, then all rejected ones."""
    prompts = [np.asarray(pair[PROMPT_IDS], dtype=np.int64) for pair in features]
    sequences = []
    for column in (CHOSEN_IDS, REJECTED_IDS):
        for whole_prompt, pair in zip(prompts, features, strict=True):
            whole_completion = np.asarray(pair[column], dtype=np.int64)
            prompt, completion = truncate(whole_prompt, whole_completion, max_length, truncation_mode)
            sequences.append(TokenSequence(np.concatenate([prompt, completion]), len(prompt)))
    return sequences


def padded_rows(
    sequences: Sequence[TokenSequence], pad_token_id: int, multiple: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `attention_mask`, [R T] int64, padded on the right to the longest row and up to a multiple."""
    longest = max(len(sequence.ids) for sequence in sequences)
    num_tokens = longest if multiple is None else -(-longest // multiple) * multiple
    input_ids = np.full((len(sequences), num_tokens), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for ids, mask, sequence in zip(input_ids, attention_mask, sequences, strict=True):
        ids[: len(sequence.ids)] = sequence.ids
        mask[: len(sequence.ids)] = 1
    return input_ids, attention_mask


def pairs_of_halves(num_rows: int) -> dict[str, Tensor]:
    """`chosen` and `rejected` of a batch whose first half are the chosen rows, its second half the rejected ones."""
    chosen, rejected = torch.arange(num_rows).chunk(2)
    return {"chosen": chosen, "rejected": rejected}


def no_pairs() -> dict[str, Tensor]:
    """`chosen` and `rejected` of completions without pairs: empty."""
    none = torch.empty(0, dtype=torch.int64)
    return {"chosen": none, "rejected": none}


def check_counts(counts: np.ndarray) -> None:
    """ValueError where a sequence has no completion token to predict. `counts` are those of all chosen sequences, then
    of all rejected ones."""
    empty = np.flatnonzero(counts <= 0)
    if len(empty) > 0:
        num_pairs = len(counts) // 2
        found = [f"{'chosen' if row < num_pairs else 'rejected'} of pair {row % num_pairs}" for row in empty.tolist()]
        raise ValueError(
            "every sequence of a batch must have a completion token to predict (after truncation, and not at the start "
            f"of the row); found none in {found}. Prepare the dataset with the `max_length` and `truncation_mode` of "
            "the collator: `prepare_dataset` leaves out such rows."
        )


def check_row_options(max_length: int | None, truncation_mode: str, pad_to_multiple_of: int | None) -> None:
    """ValueError where sequences cannot be truncated, or rows padded, as these options say."""
    check_truncation(max_length, truncation_mode)
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(
            f"pad_to_multiple_of must be at least 1; found {pad_to_multiple_of}. Give a length such as 8, or None."
        )
