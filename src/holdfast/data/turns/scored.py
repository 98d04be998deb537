"""Which characters of a rendered conversation are scored: those of the assistant's turns.

Conversations of one shape (the same roles, in the same order) are rendered alike. So turns are looked for once in a
rendering that has marks for texts, and then taken over wherever the texts in the places of their marks give just the
rendering at hand. Where they do not, the row's own messages get marks; see `holdfast.data.turns`. The last resort are
renderings of the row as it is.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, final

from holdfast.data.formats import Message
from holdfast.data.turns.marked_messages import (
    MarkedMessages,
    Rendering,
    by_marks,
    num_marks_before,
    tags_in,
    with_marks,
    without_marks,
)
from holdfast.data.turns.spans import Conversation, Span, turns

RenderMessages = Callable[[Sequence[Message], bool], str]
"""What the template makes of messages, with or without the generation prompt."""

_MOST_SHAPES = 1_000


class _Shape(NamedTuple):
    """Where the turns are in conversations of one shape: the first and the last place of each, with the number of marks
    before it. `places` is None where they cannot be told."""

    rendering: Rendering
    places: dict[int, tuple[int, int, int, int]] | None


@final
class ScoredTurns:
    """Finds turns in what one chat template renders. `special` matches the tokenizer's special tokens."""

    def __init__(self, template: str, special: re.Pattern[str]) -> None:
        self._tags = tags_in(template)
        self._special = special
        self._shapes: dict[Any, _Shape] = {}

    def spans(
        self, messages: Sequence[Message], wanted: tuple[int, ...], whole: str, render: RenderMessages, options: Any
    ) -> dict[int, Span] | None:
        """The characters of `whole`, the rendering of the messages, that belong to the turns of the messages with these
        numbers. `options` is all else that the template is given. None where a turn cannot be told."""
        if not wanted:
            return {}
        found = self._by_shape(messages, wanted, whole, render, options)
        if found is None and (marked := with_marks(messages)) is not None:
            found = self._by_marks(marked, wanted, whole, render)
        if found is None:
            plain = MarkedMessages(messages=list(messages), texts=[], owners=[])
            found = self._turns(plain, wanted, whole, render)
        return found

    def _by_shape(
        self, messages: Sequence[Message], wanted: tuple[int, ...], whole: str, render: RenderMessages, options: Any
    ) -> dict[int, Span] | None:
        texts, key = self._plain_texts(messages), None
        marked = None
        if texts is not None:
            shape_of = tuple(
                (message["role"], message["content"]) if message["content"].isspace() else message["role"]
                for message in messages
            )
            key = (shape_of, wanted, options)
        elif (marked := by_marks(messages, self._tags)) is not None:
            texts, key = marked.texts, repr((marked.messages, wanted, options))
        if texts is None:
            return None
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._learned(marked or by_marks(messages, self._tags), wanted, render)
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = shape
        if shape.places is None:
            return None
        lengths = shape.rendering.lengths(texts, whole)
        if lengths is None:
            return None
        widths = shape.rendering.widths
        ahead = list(accumulate((n - width for n, width in zip(lengths, widths, strict=True)), initial=0))
        return {
            number: (start + ahead[before], end + ahead[until])
            for number, (start, before, end, until) in shape.places.items()
        }

    def _plain_texts(self, messages: Sequence[Message]) -> list[str] | None:
        """The texts of messages that have nothing but a role and a text without tags; None for others."""
        texts: list[str] = []
        for message in messages:
            content = message.get("content")
            if len(message) != 2 or type(content) is not str or not content:
                return None
            if ("<" in content or "[" in content) and self._tags.search(content):
                return None
            if not content.isspace():
                texts.append(content)
        return texts

    def _learned(self, marked: MarkedMessages | None, wanted: tuple[int, ...], render: RenderMessages) -> _Shape:
        nothing = _Shape(Rendering(pieces=[], marks=[], widths=[]), None)
        if marked is None:
            return nothing
        try:
            whole = render(marked.messages, False)
        except Exception:  # a template that asks for the texts
            return nothing
        found = self._turns(marked, wanted, whole, render)
        if found is None:
            return nothing
        return _Shape(
            Rendering.of(whole),
            {
                number: (start, num_marks_before(whole, start), end, num_marks_before(whole, end))
                for number, (start, end) in found.items()
            },
        )

    def _by_marks(
        self, marked: MarkedMessages, wanted: tuple[int, ...], whole: str, render: RenderMessages
    ) -> dict[int, Span] | None:
        try:
            rendered = render(marked.messages, False)
        except Exception:  # a template that asks for the texts
            return None
        found = self._turns(marked, wanted, rendered, render) if without_marks(rendered) == whole else None
        if found is None:
            return None
        return {
            number: (start - num_marks_before(rendered, start), end - num_marks_before(rendered, end))
            for number, (start, end) in found.items()
        }

    def _turns(
        self, marked: MarkedMessages, wanted: tuple[int, ...], whole: str, render: RenderMessages
    ) -> dict[int, Span] | None:
        def beginning(num_messages: int, add_generation_prompt: bool) -> str:
            return render(marked.messages[:num_messages], add_generation_prompt)

        conversation = Conversation(
            whole=whole,
            num_messages=len(marked.messages),
            owners=marked.owners,
            render=beginning,
            special=self._special,
        )
        return turns(conversation, wanted)
