"""Tokenized pairs -> truncated sequences, and what every layout does with them.

Truncation happens here and not in the dataset, so that a dataset prepared once serves every `max_length`. A sequence is
a numpy array, which is hashed and copied into place without a loop over tokens. It ends with its last scored token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdfast.data.columns import CHOSEN_IDS, CHOSEN_MASK, PROMPT_IDS, REJECTED_IDS, REJECTED_MASK
from holdfast.data.completion_mask import cut, read_mask
from holdfast.data.tokenize import TruncationMode, check_truncation, content_id


class TokenSequence(NamedTuple):
    """One sequence after truncation: int64 ids, of which the first `num_prompt` are the prompt.

    `scored` is true for the completion tokens that count, the last one among them; None where all count.
    """

    ids: np.ndarray
    num_prompt: int
    scored: np.ndarray | None = None

    @property
    def num_targets(self) -> int:
        """The number of completion tokens that count and have a token before them."""
        is_first_scored = self.num_prompt == 0 and (self.scored is None or bool(self.scored[:1].any()))
        num_scored = len(self.ids) - self.num_prompt if self.scored is None else int(self.scored.sum())
        return max(0, num_scored - is_first_scored)

    def of_targets(self, values: np.ndarray) -> np.ndarray:
        """Of one value for each completion token that has a token before it: the values of those that count."""
        return values if self.scored is None else values[self.scored[self.num_prompt == 0 :]]


def content_id_of(sequence: TokenSequence) -> tuple[int, int]:
    """The content id of a sequence. Tokens before the first scored one count as prompt in it, as nothing but their
    name tells them from a prompt."""
    ids, num_prompt, scored = sequence
    if scored is None:
        return content_id(ids[:num_prompt], ids[num_prompt:])
    start = int(scored.argmax())
    num_prompt, scored = num_prompt + start, scored[start:]
    return content_id(ids[:num_prompt], ids[num_prompt:], None if scored.all() else scored)


def truncated_sequences(
    features: Sequence[Mapping[str, Any]], max_length: int | None, truncation_mode: TruncationMode
) -> list[TokenSequence]:
    """All chosen sequences, then all rejected ones. ValueError for a mask that does not fit its token ids."""
    prompts = [np.asarray(pair[PROMPT_IDS], dtype=np.int64) for pair in features]
    sequences = []
    for column, mask_column in ((CHOSEN_IDS, CHOSEN_MASK), (REJECTED_IDS, REJECTED_MASK)):
        for whole_prompt, pair in zip(prompts, features, strict=True):
            whole_completion = np.asarray(pair[column], dtype=np.int64)
            mask = read_mask(pair.get(mask_column), mask_column, column, len(whole_completion))
            prompt, completion, scored = cut(whole_prompt, whole_completion, mask, max_length, truncation_mode)
            sequences.append(TokenSequence(np.concatenate([prompt, completion]), len(prompt), scored))
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
            "every sequence of a batch must have a completion token to predict (scored, after truncation, and not at "
            f"the start of the row); found none in {found}. Prepare the dataset with the `max_length` and "
            "`truncation_mode` of the collator: `prepare_dataset` leaves out such rows."
        )


def check_row_options(max_length: int | None, truncation_mode: str, pad_to_multiple_of: int | None) -> None:
    """ValueError where sequences cannot be truncated, or rows padded, as these options say."""
    check_truncation(max_length, truncation_mode)
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(
            f"pad_to_multiple_of must be at least 1; found {pad_to_multiple_of}. Give a length such as 8, or None."
        )
