"""Which tokens of a conversation are scored: what the model is to say in the completions, and nothing else.

A template that marks what the assistant says (`{% generation %}`) is taken at its word, for completions of one message
as well. For others the assistant's turns are looked for in the rendering (`holdfast.data.turns`), where a completion
has several messages, or one that is not all scored. A completion of one message is scored to its end.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
from transformers import PreTrainedTokenizerBase

from holdfast.data.formats import ASSISTANTS, Message, Preference
from holdfast.data.note import Note
from holdfast.data.rendering.template import (
    cannot_continue,
    has_generation_marks,
    rendered_text,
    template_of,
    template_options,
    text_and_marks,
)
from holdfast.data.turns.exchange import Exchange
from holdfast.data.turns.marked_messages import first_mark, with_mark_after, without_marks
from holdfast.data.turns.scored import ScoredTurns
from holdfast.data.turns.sentences import NO_END
from holdfast.data.turns.spans import Span
from holdfast.data.turns.token_masks import TokensAt, mask_of_marks, mask_of_turns


class Scored(NamedTuple):
    """The characters of a rendering that are scored. `are_marks` says that the template marked them."""

    spans: list[Span]
    are_marks: bool

    def mask(self, text: str, num_tokens: int, tokens_at: TokensAt) -> np.ndarray:
        """An int8 for each token of the text, 1 where it is scored."""
        return (mask_of_marks if self.are_marks else mask_of_turns)(text, self.spans, num_tokens, tokens_at)


class _Template(NamedTuple):
    has_marks: bool
    turns: ScoredTurns


@final
class TurnMasks:
    """Says what is scored of conversations that one tokenizer's templates render."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_date: str | None, *, assistant_only: bool) -> None:
        self._tokenizer = tokenizer
        self._date = template_date
        self.assistant_only = assistant_only
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special: set[Any] = {token.content for token in added if token.special and token.content.strip()}
        if tokenizer.eos_token:
            special.add(tokenizer.eos_token)
        self._ends: tuple[str, ...] = tuple(sorted(special, key=len, reverse=True))
        self._special = re.compile("|".join(map(re.escape, self._ends)) or "(?!)")
        self._usual_end = "\0"
        self._templates: dict[str, _Template] = {}
        self._usual: _Template | None = None

    def scored(self, exchange: Exchange, preference: Preference, texts: Sequence[str]) -> list[Scored] | None:
        """What is scored of the conversation with the chosen and of that with the rejected completion. `preference` is
        that of the exchange in the shape that the template needs, and `texts` are its three renderings. None where all
        of both completions is.

        Raises `ValueError` where the assistant's turns cannot be told.
        """
        prompt, *wholes = texts
        is_continued_in_both = exchange.prefill is None or all(whole.startswith(prompt) for whole in wholes)
        if not self.assistant_only:
            if not is_continued_in_both:
                raise ValueError(_no_beginning(prompt))
            return None
        template = self._template(preference)
        if exchange.scored is None and not template.has_marks and is_continued_in_both:
            return None
        return [self._side(template, exchange, preference, side, texts) for side in (0, 1)]

    def notes(self, conversations: Sequence[Sequence[Message]], texts: Sequence[str]) -> tuple[Note, ...]:
        """A note where an assistant's message at the end of a conversation is not ended by a token. The prompt, which
        stands first, does not count."""
        for messages, text in zip(conversations[1:], texts[1:], strict=True):
            if messages[-1]["role"] in ASSISTANTS and not self._ends_turn(text):
                return (Note(NO_END, text[-60:]),)
        return ()

    def _ends_turn(self, text: str) -> bool:
        """Whether a rendering ends with a special token, but for white space."""
        if text.endswith(self._usual_end):
            return True
        stripped = text.rstrip()
        for end in self._ends:
            if stripped.endswith(end):
                self._usual_end = text[len(stripped) - len(end) :]
                return True
        return False

    def _template(self, preference: Preference) -> _Template:
        is_usual = not preference.tools and not preference.chat_template_kwargs
        if is_usual and self._usual is not None:
            return self._usual
        options = template_options(preference, self._tokenizer, self._date)
        text = template_of(self._tokenizer, options, self._date)
        found = self._templates.get(text)
        if found is None:
            found = _Template(has_generation_marks(text), ScoredTurns(text, self._special))
            self._templates[text] = found
        if is_usual:
            self._usual = found
        return found

    def _side(
        self, template: _Template, exchange: Exchange, preference: Preference, side: int, texts: Sequence[str]
    ) -> Scored:
        whole = texts[1 + side]
        messages = exchange.conversations(preference)[1 + side]
        first = len(preference.prompt)
        begin = (
            0 if exchange.prefill is None else self._prefill_end(preference, exchange.prefill, messages, texts, side)
        )
        if template.has_marks:
            text, spans = text_and_marks(preference, messages, self._tokenizer, self._date)
            assert text == whole, "the template renders a conversation in one way"
            left_out = self._turns(template, preference, messages, exchange.unscored[side], whole)
            spans = [span for span in spans if not any(_overlap(span, other) for other in left_out)]
            return Scored([(max(start, begin), end) if end > begin else (start, end) for start, end in spans], True)
        scored = (first,) if exchange.scored is None else exchange.scored[side]
        spans = self._turns(template, preference, messages, scored, whole)
        if begin and first in scored:
            spans[0] = (begin, max(begin, spans[0][1]))  # the completion begins within the message
        return Scored(spans, False)

    def _prefill_end(
        self, preference: Preference, prefill: Message, messages: list[Message], texts: Sequence[str], side: int
    ) -> int:
        """Where the prefill ends in the conversation with the chosen or the rejected completion."""
        prompt, whole = texts[0], texts[1 + side]
        if whole.startswith(prompt):
            return len(prompt)
        first = len(preference.prompt)
        marked = [*messages[:first], with_mark_after(messages[first], prefill), *messages[first + 1 :]]
        rendered = rendered_text(preference, marked, self._tokenizer, self._date)
        if without_marks(rendered) != whole or rendered == whole:
            raise ValueError(_no_beginning(prompt))
        return first_mark(rendered)

    def _turns(
        self, template: _Template, preference: Preference, messages: list[Message], wanted: tuple[int, ...], whole: str
    ) -> list[Span]:
        def render(some: Sequence[Message], add_generation_prompt: bool) -> str:
            return rendered_text(
                preference, list(some), self._tokenizer, self._date, add_generation_prompt=add_generation_prompt
            )

        given = preference.tools, preference.chat_template_kwargs
        found = template.turns.spans(messages, wanted, whole, render, repr(given) if any(given) else None)
        if found is None:
            raise ValueError(
                "only what the assistant says is scored, and its turns cannot be told apart in what the chat template "
                f"makes of messages of the roles {[message['role'] for message in messages]}. Use a chat template that "
                "marks them ({% generation %} before and {% endgeneration %} after what the assistant says), or set "
                "`assistant_only=False`: then all tokens of the completions are scored."
            )
        return [found[number] for number in wanted]


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _no_beginning(prompt: str) -> str:
    return cannot_continue(
        f"makes of it ...{prompt[-60:]!r}, which is no beginning of what it makes of the whole message"
    )
