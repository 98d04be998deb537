"""Who decides that a row is unusable: `unusable_reason`, and the texts that tell the user.

A pair is judged by its token ids after truncation, so the decision depends on `max_length` too. `prepare` leaves
unusable rows out. Given up: guessing what a row was meant to be.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from holdfast.data.completion_mask import cut
from holdfast.data.tokenize import TokenizedPair, TruncationMode

PROMPT_FILLS = "prompt fills max_length"
EMPTY_COMPLETION = "empty completion"
EQUAL_COMPLETIONS = "chosen equals rejected"
NOTHING_TO_PREDICT = "no token to predict"
NO_SCORED_TOKEN = "no scored token"
UNUSABLE_REASONS = (PROMPT_FILLS, EMPTY_COMPLETION, EQUAL_COMPLETIONS, NOTHING_TO_PREDICT, NO_SCORED_TOKEN)

_NUM_ROWS_NAMED = 5


def unusable_reason(pair: TokenizedPair, max_length: int | None, mode: TruncationMode) -> str | None:
    """Why nothing can be learned from a pair after truncation, one of `UNUSABLE_REASONS`; None if something can.

    The first token of a sequence has no predecessor, so without a prompt a completion of one token predicts nothing.
    Completions are compared as they are cut (`completion_mask.cut`): token ids, and which of them are scored.
    """
    if len(pair.chosen_ids) == 0 or len(pair.rejected_ids) == 0:
        return EMPTY_COMPLETION
    chosen_prompt, chosen, chosen_mask = _cut(pair, pair.chosen_ids, pair.chosen_mask, max_length, mode)
    rejected_prompt, rejected, rejected_mask = _cut(pair, pair.rejected_ids, pair.rejected_mask, max_length, mode)
    empty = [
        prompt for prompt, completion in ((chosen_prompt, chosen), (rejected_prompt, rejected)) if not len(completion)
    ]
    if empty:
        return PROMPT_FILLS if any(len(prompt) == max_length for prompt in empty) else NO_SCORED_TOKEN
    if np.array_equal(chosen, rejected) and np.array_equal(chosen_mask, rejected_mask):
        return EQUAL_COMPLETIONS
    if not chosen_mask[len(chosen_prompt) == 0 :].any() or not rejected_mask[len(rejected_prompt) == 0 :].any():
        return NOTHING_TO_PREDICT
    return None


def _cut(
    pair: TokenizedPair, ids: Any, mask: Any, max_length: int | None, mode: TruncationMode
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`completion_mask.cut` of one side, with a mask of ones in the place of None."""
    flags = None if mask is None else np.asarray(mask, dtype=bool)
    prompt, completion, flags = cut(np.asarray(pair.prompt_ids), np.asarray(ids), flags, max_length, mode)
    return prompt, completion, np.ones(len(completion), dtype=bool) if flags is None else flags


def nothing_usable(
    counts: Mapping[str, int], max_length: int | None, truncation_mode: TruncationMode, name: str
) -> str:
    """The error for a dataset of this name whose rows are all unusable; `counts` is by reason."""
    by_reason = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()))
    return (
        f"the {name} dataset must have at least one usable row; found none in {sum(counts.values())} ({by_reason}; "
        f"max_length={max_length}, truncation_mode={truncation_mode!r}). "
        f"{remedy(counts, max_length)}"
    )


def some_unusable(rows: Mapping[str, Sequence[int]], num_rows: int, max_length: int | None, name: str) -> str:
    """The warning for a map-style dataset of `num_rows` rows; `rows` are the unusable ones by reason."""
    counts = {reason: len(numbers) for reason, numbers in rows.items()}
    by_reason = "; ".join(f"{reason}: {counts[reason]} ({_first(numbers)})" for reason, numbers in sorted(rows.items()))
    return (
        f"{share(sum(counts.values()), num_rows)} of the {name} dataset cannot be used and are left out. "
        f"{by_reason}. {remedy(counts, max_length)}"
    )


def remedy(reasons: Mapping[str, int], max_length: int | None) -> str:
    """What a user can do about rows that are unusable for these reasons."""
    if PROMPT_FILLS in reasons:
        return (
            f"Raise `max_length` (now {max_length}), or set `truncation_mode='keep_end'`, to use the rows "
            "whose prompt fills it."
        )
    if max_length is not None:
        return f"Correct these rows, or raise `max_length` (now {max_length}), to use them."
    return "Correct these rows to use them."


def prompt_is_cut(where: str, cut_text: str, row: str) -> str:
    """The warning for prompts whose tokens are not those that the full text begins with; `cut_text` is an example."""
    return (
        f"The tokenized prompt is not a prefix of the tokenized prompt and completion {where}: the chat template "
        "renders a prompt alone in another way, or tokens merge across the boundary. Completions begin where they "
        f"part, and the rest of the prompt is left out: {cut_text!r} in {row}. At inference the model is shown that "
        "rest. To avoid it, use a chat template that renders a prompt alike with and without a completion, or move "
        "white space from the prompt's end to the completions."
    )


def spells_special_tokens(
    name: str, as_text: tuple[str, str, str] | None, as_token: tuple[str, str, str] | None
) -> str:
    """The warning for rows whose text spells out special tokens. Each part is where (`in 3 of 9 rows`), an example of
    the token, and its row: of tokens that were tokenized as text, and of those that are special tokens; None if there
    are none."""
    parts = []
    if as_text is not None:
        where, token, row = as_text
        parts.append(
            f"{where} by messages that are not the assistant's, such as {token!r} in {row}. There it is tokenized as "
            "text, so that no message can end itself and speak for another role."
        )
    if as_token is not None:
        where, token, row = as_token
        parts.append(
            f"{where} where it becomes this token, such as {token!r} in {row}: in an assistant's message, in a row of "
            "plain text, or where the tokenizer or the chat template cannot tell text from tokens. Remove it from "
            "the rows where it is not meant."
        )
    return f"Special tokens are spelled out in the text of the {name} dataset: {' And '.join(parts)}"


def share(count: int, total: int) -> str:
    """`count` of `total` rows in words, with the percentage."""
    return f"{count} of {total} rows ({100 * count / total:.1f} %)"


def _first(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_NUM_ROWS_NAMED]))
    return f"row(s) {shown}, ..." if len(rows) > _NUM_ROWS_NAMED else f"row(s) {shown}"
