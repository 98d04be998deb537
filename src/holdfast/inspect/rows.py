"""A row as it is trained on, token by token: what the model is shown, what is scored, and what is cut off.

Each token's text is what it adds to the text before it, so that the texts of all tokens together are the row's. Tokens
that only together make a character (bytes of an emoji) are one piece with several ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, final

import numpy as np
from transformers import PreTrainedTokenizerBase

from holdfast.inspect.pairs import Pair
from holdfast.inspect.pairs import Sequence as TokenIds

_CONTEXT = 6
"""So many tokens before a token decide how it is written: whether with a space, or as part of a character."""
_LONGEST_CHARACTER = 8


class Use(StrEnum):
    """What becomes of a token."""

    PROMPT = "prompt"
    SCORED = "scored"
    UNSCORED = "unscored"
    CUT = "cut"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The text of a token, or of tokens that make a character together. `is_special` is so for special tokens, and not
    for text that spells one out."""

    text: str
    ids: tuple[int, ...]
    use: Use
    is_special: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SideView:
    """A completion and the prompt before it. A prompt differs between the sides of a row where `max_length` cuts off
    another part of it."""

    prompt: tuple[Piece, ...]
    completion: tuple[Piece, ...]
    num_seen: int
    num_scored: int
    num_beyond: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """A row: its number, counted from 0, where it stands (file and line) and its source where they are known, why it is
    left out (None if it is used), and its two sides."""

    index: int
    place: str | None
    source: str | None
    reason: str | None
    chosen: SideView
    rejected: SideView


@final
class Writer:
    """Writes token ids as pieces of text, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added: Any = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special}
        self._special = special | set(tokenizer.all_special_ids)

    def sides(self, pair: Pair) -> tuple[SideView, SideView]:
        """The chosen and the rejected side of a pair."""
        return self._side(pair.chosen), self._side(pair.rejected)

    def excerpt(self, pair: Pair, num_tokens: int = 30) -> str:
        """The end of a pair's prompt and the beginning of its chosen completion, to tell rows apart."""
        prompt, completion = pair.chosen.prompt, pair.chosen.completion
        ids = [*prompt[-num_tokens:], *completion[:num_tokens]]
        text: Any = self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)
        return f"{'...' if len(prompt) > num_tokens else ''}{' '.join(str(text).split())}"

    def _side(self, sequence: TokenIds) -> SideView:
        prompt = _uses(len(sequence.prompt), sequence.seen_prompt, Use.PROMPT)
        completion = _uses(len(sequence.completion), sequence.seen_completion, Use.UNSCORED)
        for position in np.flatnonzero(sequence.scored):
            completion[position] = Use.SCORED
        ids = [*map(int, sequence.prompt), *map(int, sequence.completion)]
        pieces = self.pieces(ids, [*prompt, *completion], boundary=len(prompt))
        split, num_ids = 0, 0
        while num_ids < len(prompt):
            num_ids += len(pieces[split].ids)
            split += 1
        return SideView(
            prompt=tuple(pieces[:split]),
            completion=tuple(pieces[split:]),
            num_seen=sequence.num_seen,
            num_scored=int(sequence.scored.sum()),
            num_beyond=sequence.num_beyond,
        )

    def pieces(self, ids: Sequence[int], uses: Sequence[Use], boundary: int = 0) -> list[Piece]:
        """The ids as pieces. None has tokens of different uses, or of both sides of the `boundary`."""
        made: list[Piece] = []
        start = 0
        while start < len(ids):
            stop = start + 1
            text = self._added(ids, start, stop)
            while text.endswith("\ufffd") and self._goes_on(ids, uses, start, stop, boundary):
                stop += 1
                text = self._added(ids, start, stop)
            group = tuple(ids[start:stop])
            is_special = len(group) == 1 and group[0] in self._special
            text = text or "".join(f"<{each}>" for each in group)  # of an id that has no text
            made.append(Piece(text=text, ids=group, use=uses[start], is_special=is_special))
            start = stop
        return made

    def _goes_on(self, ids: Sequence[int], uses: Sequence[Use], start: int, stop: int, boundary: int) -> bool:
        """Whether the token at `stop` may be part of the piece that begins at `start`."""
        return (
            stop < len(ids)
            and stop - start < _LONGEST_CHARACTER
            and stop != boundary
            and uses[stop] is uses[start]
            and ids[stop] not in self._special
        )

    def _added(self, ids: Sequence[int], start: int, stop: int) -> str:
        """What these tokens add to the text of those before."""
        if ids[start] in self._special:
            return str(self._tokenizer.convert_ids_to_tokens(ids[start]))
        before = list(ids[max(0, start - _CONTEXT) : start])
        text, of_both = self._decode(before), self._decode([*before, *ids[start:stop]])
        return of_both.removeprefix(text) if of_both.startswith(text) else self._decode(ids[start:stop])

    def _decode(self, ids: Sequence[int]) -> str:
        decoded: Any = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)


def _uses(num_tokens: int, seen: slice, use: Use) -> list[Use]:
    """What becomes of so many tokens, of which the model is shown some."""
    return [use if seen.start <= position < seen.stop else Use.CUT for position in range(num_tokens)]
