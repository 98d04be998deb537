"""`Preference`s -> token ids, many at a time: what `holdfast.data.tokenize.tokenize` does one by one, faster.

Conversations of nothing but roles and texts go straight to the compiled chat template; others through
`apply_chat_template`. All texts of a batch are then encoded together, and what they share is encoded once (`Encoder`).
The ids are those of `tokenize`: the first preferences are tokenized by it as well, and if one differs, so are all.

Given up: speed for tokenizers that are written in Python or that render conversations in a way of their own.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

import numpy as np
from transformers import PreTrainedTokenizerBase

from holdfast.data.control_text import NOTHING, ControlText
from holdfast.data.encoder import NUM_ID_BYTES, Encoder, as_bytes, from_bytes
from holdfast.data.formats import Preference
from holdfast.data.note import Note
from holdfast.data.rendering.message_shapes import fitted, is_plain
from holdfast.data.rendering.omissions import prints_all
from holdfast.data.rendering.template import rendered_prompt, renderer, template_of
from holdfast.data.text_pair import TextPairs
from holdfast.data.tokenize import TokenizedPair, tokenize
from holdfast.data.turns.exchange import Exchange, exchange_of
from holdfast.data.turns.masks_of_turns import Scored, TurnMasks
from holdfast.data.turns.token_masks import completion_mask
from holdfast.internals.transformers import compiled_template, has_own_templates

NUM_COMPARED = 8
"""So many preferences are tokenized both ways before the fast one is trusted, and then one of each large batch."""
_LARGE = 100
_MOST_CHARACTERS = 10_000_000
"""So many are encoded at once: rows of any length need bounded memory."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """A `TokenizedPair` whose token ids are bytes, see `holdfast.data.encoder`, and whose masks have a byte a token."""

    prompt_ids: bytes
    chosen_ids: bytes
    rejected_ids: bytes
    cut_ids: bytes
    as_text: str | None = None
    as_token: str | None = None
    chosen_mask: bytes | None = None
    rejected_mask: bytes | None = None
    notes: tuple[Note, ...] = ()

    @classmethod
    def of(cls, pair: TokenizedPair) -> "EncodedPair":
        """The same pair."""
        return cls(
            prompt_ids=as_bytes(pair.prompt_ids),
            chosen_ids=as_bytes(pair.chosen_ids),
            rejected_ids=as_bytes(pair.rejected_ids),
            cut_ids=as_bytes(pair.cut_ids),
            as_text=pair.as_text,
            as_token=pair.as_token,
            chosen_mask=None if pair.chosen_mask is None else np.asarray(pair.chosen_mask, dtype=np.int8).tobytes(),
            rejected_mask=None
            if pair.rejected_mask is None
            else np.asarray(pair.rejected_mask, dtype=np.int8).tobytes(),
            notes=pair.notes,
        )


class _Texts(NamedTuple):
    """The three texts of a preference, notes on them, and what is scored of the two full ones; None for all of the
    completions."""

    texts: list[str]
    notes: tuple[Note, ...]
    scored: list[Scored] | None = None


@final
class BatchTokenizer:
    """Tokenizes with one tokenizer and one date. `one_by_one` is `tokenize`, or what stands for it.
    `special_tokens_in_text` is the mode of `ControlText`."""

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase,
        template_date: str | None,
        one_by_one: Callable[..., TokenizedPair] = tokenize,
        *,
        special_tokens_in_text: str = "text",
        assistant_only: bool = True,
    ) -> None:
        self._tokenizer = processing_class
        self._date = template_date
        self._control_text = ControlText(processing_class, special_tokens_in_text)
        self._turn_masks = TurnMasks(processing_class, template_date, assistant_only=assistant_only)
        self._one_by_one = one_by_one
        self._is_trusted = not has_own_templates(processing_class)
        self._num_compared = 0

    def one(self, preference: Preference) -> EncodedPair:
        """A preference by itself, as `tokenize` has it."""
        finders = self._control_text, self._turn_masks
        return EncodedPair.of(self._one_by_one(preference, self._tokenizer, self._date, *finders))

    def __call__(self, preferences: Sequence[Preference]) -> list[EncodedPair]:
        """The pairs of the preferences. Any error says that one of them cannot be tokenized; `one` tells which."""
        if self._is_trusted:
            pairs = self._together(preferences)
            wanted = max(NUM_COMPARED - self._num_compared, int(len(preferences) >= _LARGE))
            compared = [self.one(preference) for preference in preferences[:wanted]]
            self._num_compared += len(compared)
            if compared == pairs[: len(compared)]:
                return pairs
            self._is_trusted = False
        return [self.one(preference) for preference in preferences]

    def _together(self, preferences: Sequence[Preference]) -> list[EncodedPair]:
        is_text = bool(preferences) and not preferences[0].is_conversational
        if any(preference.is_conversational is is_text for preference in preferences):
            raise ValueError("text and messages in one batch")
        pairs: list[EncodedPair] = []
        waiting: list[_Texts] = []
        num_characters = 0
        for number, preference in enumerate(preferences, 1):
            waiting.append(self._texts(preference))
            num_characters += sum(map(len, waiting[-1].texts))
            if num_characters >= _MOST_CHARACTERS or number == len(preferences):
                pairs += self._pairs(preferences[len(pairs) : number], waiting)
                waiting, num_characters = [], 0
        return pairs

    def _pairs(self, preferences: Sequence[Preference], texts: Sequence[_Texts]) -> list[EncodedPair]:
        ids = self._encoder.encode([text for each in texts for text in each.texts])
        of_pairs = [ids[first : first + 3] for first in range(0, len(ids), 3)]
        return [self._pair(*each) for each in zip(preferences, texts, of_pairs, strict=True)]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer)

    @cached_property
    def _compiled_template(self) -> Callable[..., str] | None:
        return compiled_template(self._tokenizer, template_of(self._tokenizer, {}, self._date))

    @cached_property
    def _text_pairs(self) -> TextPairs:
        return TextPairs(self._tokenizer)

    def _texts(self, preference: Preference) -> _Texts:
        """The prompt, and the prompt with each completion, as they are tokenized, and what is scored of them."""
        if isinstance(preference.prompt, str):
            return _Texts(self._text_pairs.texts(preference), self._text_pairs.notes(preference))
        exchange = exchange_of(preference, assistant_only=self._turn_masks.assistant_only)
        shaped, texts, notes = self._rendered(exchange)
        conversations = exchange.conversations(shaped)
        notes = (*notes, *exchange.notes, *self._turn_masks.notes(conversations, texts))
        return _Texts(texts, notes, self._turn_masks.scored(exchange, shaped, texts))

    def _rendered(self, exchange: Exchange) -> tuple[Preference, list[str], tuple[Note, ...]]:
        """The exchange's preference in the shape that the template needs, its three renderings, and notes on them."""
        preference, known_texts = exchange.preference, None
        if self._compiled_template is not None and exchange.prefill is None and is_plain(preference):
            with suppress(Exception):  # whatever the template's own code raises: it may take another shape
                prompt, chosen, rejected = (
                    self._compiled_template(
                        messages=messages, add_generation_prompt=number == 0 and exchange.opens_turn
                    )
                    for number, messages in enumerate(exchange.conversations(preference))
                )
                if prints_all(preference, (chosen, rejected)):
                    return preference, [prompt, chosen, rejected], ()
                known_texts = (chosen, rejected)
        preference, full_texts, notes = fitted(preference, renderer(self._tokenizer, self._date), known_texts)
        if full_texts is None:
            raise ValueError("the chat template cannot render a conversation")
        prompt = rendered_prompt(exchange, preference, self._tokenizer, self._date)
        return preference, [prompt, *full_texts], notes

    def _pair(self, preference: Preference, texts: _Texts, ids: Sequence[bytes]) -> EncodedPair:
        if self._control_text.find(preference) is not NOTHING:
            return self.one(preference)  # few rows: what is special about them stands at one place
        if not preference.is_conversational:
            ids = self._text_pairs.surrounded(ids, *map(as_bytes, (self._text_pairs.before, self._text_pairs.after)))
        prompt, chosen, rejected = ids
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            length = len(prompt)
        else:
            length = min(_common_prefix_length(prompt, chosen), _common_prefix_length(prompt, rejected))
        masks: list[bytes | None] = [None, None]
        if texts.scored is not None:
            masks = [self._mask(texts, number, ids[number], length) for number in (1, 2)]
        return EncodedPair(
            prompt_ids=prompt[:length],
            chosen_ids=chosen[length:],
            rejected_ids=rejected[length:],
            cut_ids=prompt[length:],
            chosen_mask=masks[0],
            rejected_mask=masks[1],
            notes=texts.notes,
        )

    def _mask(self, texts: _Texts, number: int, ids: bytes, length: int) -> bytes | None:
        """The mask of the completion that follows so many bytes of prompt in one of the full texts."""
        assert texts.scored is not None
        num_tokens = len(ids) // NUM_ID_BYTES
        whole = texts.scored[number - 1].mask(texts.texts[number], num_tokens, self._encoder.tokens_at)
        mask = completion_mask(whole, length // NUM_ID_BYTES)
        return None if mask is None else mask.tobytes()


def _common_prefix_length(ids: bytes, others: bytes) -> int:
    """Bytes of the ids with which both begin."""
    shorter = min(len(ids), len(others))
    differs = from_bytes(ids[:shorter]) != from_bytes(others[:shorter])
    return NUM_ID_BYTES * int(np.argmax(differs)) if differs.any() else shorter
