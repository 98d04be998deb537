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
from typing import final

import numpy as np
from transformers import PreTrainedTokenizerBase

from holdfast.data.control_text import NOTHING, ControlText
from holdfast.data.encoder import NUM_ID_BYTES, Encoder, as_bytes, from_bytes
from holdfast.data.formats import Preference
from holdfast.data.message_shapes import fitted, is_plain
from holdfast.data.notes import Note
from holdfast.data.omissions import prints_all
from holdfast.data.tokenize import (
    TokenizedPair,
    conversations,
    rendered_text,
    renderer,
    template_of,
    texts_with_eos,
    tokenize,
)
from holdfast.internals.transformers import compiled_template, has_own_templates

NUM_COMPARED = 8
"""So many preferences are tokenized both ways before the fast one is trusted, and then one of each large batch."""
_LARGE = 100
_MOST_CHARACTERS = 10_000_000
"""So many are encoded at once: rows of any length need bounded memory."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """A `TokenizedPair` whose token ids are bytes, see `holdfast.data.encoder`."""

    prompt_ids: bytes
    chosen_ids: bytes
    rejected_ids: bytes
    cut_ids: bytes
    as_text: str | None = None
    as_token: str | None = None
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
            notes=pair.notes,
        )


@final
class BatchTokenizer:
    """Tokenizes with one tokenizer and one date. `one_by_one` is `tokenize`, or what stands for it.
    `special_tokens_in_text` is the mode of `ControlText`."""

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase,
        template_date: str | None,
        one_by_one: Callable[..., TokenizedPair] = tokenize,
        special_tokens_in_text: str = "text",
    ) -> None:
        self._tokenizer = processing_class
        self._date = template_date
        self._control_text = ControlText(processing_class, special_tokens_in_text)
        self._one_by_one = one_by_one
        self._is_trusted = not has_own_templates(processing_class)
        self._num_compared = 0

    def one(self, preference: Preference) -> EncodedPair:
        """A preference by itself, as `tokenize` has it."""
        return EncodedPair.of(self._one_by_one(preference, self._tokenizer, self._date, self._control_text))

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
        adds_tokens = is_text and self._tokenizer.num_special_tokens_to_add() > 0
        ids: list[bytes] = []
        texts: list[str] = []
        notes: list[tuple[Note, ...]] = []
        num_characters = 0
        for number, preference in enumerate(preferences, 1):
            texts_of_pair, notes_of_pair = self._texts(preference)
            texts += texts_of_pair
            notes.append(notes_of_pair)
            num_characters += sum(map(len, texts[-3:]))
            if num_characters >= _MOST_CHARACTERS or number == len(preferences):
                ids += self._with_added_tokens(texts) if adds_tokens else self._encoder.encode(texts)
                texts, num_characters = [], 0
        return [self._pair(preference, ids[3 * n : 3 * n + 3], notes[n]) for n, preference in enumerate(preferences)]

    def _with_added_tokens(self, texts: list[str]) -> list[bytes]:
        return [as_bytes(ids) for ids in self._tokenizer(texts)["input_ids"]]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer)

    @cached_property
    def _compiled_template(self) -> Callable[..., str] | None:
        return compiled_template(self._tokenizer, template_of(self._tokenizer, {}, self._date))

    def _texts(self, preference: Preference) -> tuple[list[str], tuple[Note, ...]]:
        """The prompt, and the prompt with each completion, as they are tokenized, and notes on what they leave out."""
        if isinstance(preference.prompt, str):
            return texts_with_eos(preference, self._tokenizer), ()
        if self._compiled_template is not None and is_plain(preference):
            with suppress(Exception):  # whatever the template's own code raises: it may take another shape
                prompt, chosen, rejected = (
                    self._compiled_template(messages=messages, add_generation_prompt=number == 0)
                    for number, messages in enumerate(conversations(preference))
                )
                if prints_all(preference, (chosen, rejected)):
                    return [prompt, chosen, rejected], ()
        preference, full_texts, notes = fitted(preference, renderer(self._tokenizer, self._date))
        prompt = conversations(preference)[0]
        text = rendered_text(preference, prompt, self._tokenizer, self._date, add_generation_prompt=True)
        if full_texts is None:
            raise ValueError("the chat template cannot render a conversation")
        return [text, *full_texts], notes

    def _pair(self, preference: Preference, ids: Sequence[bytes], notes: tuple[Note, ...]) -> EncodedPair:
        found = self._control_text.find(preference)
        if found is not NOTHING:
            return self.one(preference)  # few rows: what is special about them stands at one place
        prompt, chosen, rejected = ids
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            length = len(prompt)
        else:
            length = min(_common_prefix_length(prompt, chosen), _common_prefix_length(prompt, rejected))
        return EncodedPair(
            prompt_ids=prompt[:length],
            chosen_ids=chosen[length:],
            rejected_ids=rejected[length:],
            cut_ids=prompt[length:],
            notes=notes,
        )


def _common_prefix_length(ids: bytes, others: bytes) -> int:
    """Bytes of the ids with which both begin."""
    shorter = min(len(ids), len(others))
    differs = from_bytes(ids[:shorter]) != from_bytes(others[:shorter])
    return NUM_ID_BYTES * int(np.argmax(differs)) if differs.any() else shorter
