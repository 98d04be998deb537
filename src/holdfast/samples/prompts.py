"""The prompts of a dataset that are completed at evaluations: the first ones that differ.

They are the same in every evaluation, so that completions of different steps can be compared. Rows often share their
prompt, which is then completed once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast, final

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from holdfast.data.columns import CHOSEN_IDS, PROMPT_IDS, REJECTED_IDS
from holdfast.data.tokenize import TruncationMode, truncate
from holdfast.data.used_rows import used_rows

ROWS_PER_PROMPT = 64
"""So many rows are looked at for each prompt that is wanted."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, as token ids and as text, and its row's completions as text.

    `row` is the row's number in the dataset as it was loaded, counted from 0; in a stream, among the rows that are
    used. The prompt's text has its special tokens, the completions' have none.
    """

    row: int
    ids: tuple[int, ...]
    text: str
    chosen: str
    rejected: str


def choose_prompts(
    dataset: Any,
    num_prompts: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: TruncationMode,
    longest: int | None,
) -> list[Prompt]:
    """The first `num_prompts` prompts of a prepared dataset that differ; fewer where it has no more.

    They are cut as the run cuts its rows. A prompt of more than `longest` tokens is passed over. The rows of a stream
    are read anew.
    """
    found: dict[tuple[int, ...], Prompt] = {}
    numbers = _numbers(dataset)
    for row, values in enumerate(islice(iter(dataset), num_prompts * ROWS_PER_PROMPT)):
        ids, _ = truncate(list(values[PROMPT_IDS]), [], max_length, truncation_mode)
        if tuple(ids) in found or (longest is not None and len(ids) > longest):
            continue
        found[tuple(ids)] = _prompt(row if numbers is None else numbers[row], ids, values, tokenizer)
        if len(found) == num_prompts:
            break
    return [*found.values()]


def _numbers(dataset: Any) -> Sequence[Any] | None:
    return used_rows(dataset).tolist() if isinstance(dataset, Dataset) else None


def _prompt(row: int, ids: Sequence[int], values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    chosen, rejected = (text_of(values[name], tokenizer) for name in (CHOSEN_IDS, REJECTED_IDS))
    return Prompt(row=row, ids=tuple(ids), text=str(tokenizer.decode([*ids])), chosen=chosen, rejected=rejected)


def text_of(completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a completion, without special tokens."""
    return str(tokenizer.decode([*completion_ids], skip_special_tokens=True))


def stop_ids(dataset: Any, tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """The tokens that end a completion: those that the model's generation config names, the tokenizer's end of
    sequence, and the special token that ends the dataset's first chosen completion (a chat template may have its
    own)."""
    named, eos = getattr(generation_config, "eos_token_id", None), cast(Any, tokenizer.eos_token_id)
    ids: list[Any] = [*named] if isinstance(named, list | tuple) else [named]
    first = next(iter(dataset), None)
    if first is not None:
        ids.append(_last_special(first[CHOSEN_IDS], tokenizer))
    return sorted({int(token) for token in (*ids, eos) if token is not None})


def _last_special(completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token at the completion's end, after which a template may still have a line break."""
    special = {*tokenizer.all_special_ids}
    for token in reversed(completion_ids):
        if token in special:
            return token
        if str(tokenizer.decode([token])).strip():
            break
    return None
