"""Text in a row that reads like a special token, such as `<|im_end|>` in what a user wrote.

The template writes special tokens between messages, and the tokenizer then finds them in the text wherever they stand.
So a message that spells one out could end itself and speak for another role. In messages of every role but the
assistant's such text is therefore tokenized as text, as at inference it should be too. What the assistant says is left
as it is, since it is what the model learns to say; so is a row of plain text, which has no roles. Both are counted.

How it is told apart: the conversation is rendered again with a private character in the place of each such text. Where
the special tokens of that rendering are, the template (or the assistant) wrote them. The parts between them are
tokenized with `split_special_tokens=True`, each with its text put back. This is done only where it is proved for the
row: with the text put back, the rendering must be the ordinary one, and the ordinary rendering, cut in the same way,
must have its ordinary token ids. Otherwise the row stays as it is and is counted with the others.

Given up: text in tool calls, descriptions of tools and template variables.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from holdfast.data.formats import Message, Preference
from holdfast.internals.transformers import backend_of

ASSISTANT = "assistant"

_FIRST_HIDDEN = 0xF0000
"""The first character of a plane that Unicode leaves to private use, as no text in earnest does."""
_SPACES = r"[^\S\x1c-\x1f]*"
"""White space as the `tokenizers` library understands it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A special token that is spelled out in a row: in messages of other roles than the assistant's, and elsewhere.
    None where there is none."""

    by_others: str | None
    elsewhere: str | None


NOTHING = Found(by_others=None, elsewhere=None)


class Encoded(NamedTuple):
    """The ids of a text's tokens, and the characters of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@final
class ControlText:
    """Finds such text, and tokenizes conversations in which it stays text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
        self._tokens = {token.content: token for token in added if token.special and token.content.strip()}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._spelled_out = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def find(self, preference: Preference) -> Found:
        """Which special token the texts of a preference spell out, the first of each kind. The eos token at the end of
        a text completion does not count."""
        search = self._spelled_out.search
        by_others = elsewhere = None
        for role, text in _texts(preference, self._tokenizer.eos_token):
            match = search(text)
            if match is None:
                continue
            if role is not None and role != ASSISTANT:
                by_others = by_others or match[0]
            else:
                elsewhere = elsewhere or match[0]
        return NOTHING if by_others is elsewhere is None else Found(by_others=by_others, elsewhere=elsewhere)

    def ids(
        self,
        messages: list[Message],
        render: Callable[[list[Message]], str],
        ordinary_ids: Sequence[int],
    ) -> list[int] | None:
        """The token ids of `encoded`."""
        found = self.encoded(messages, render, ordinary_ids)
        return None if found is None else found.ids

    def encoded(
        self,
        messages: list[Message],
        render: Callable[[list[Message]], str],
        ordinary_ids: Sequence[int],
    ) -> Encoded | None:
        """The tokens of a conversation in which other roles than the assistant's spell out special tokens, as text.
        `ordinary_ids` are those of `render(messages)`. None where it cannot be proved that nothing else changes."""
        if backend_of(self._tokenizer) is None:
            return None
        ordinary = render(messages)
        hidden = {text: chr(_FIRST_HIDDEN + number) for number, text in enumerate(self._tokens)}
        if any(character in ordinary for character in hidden.values()):
            return None
        shown = {character: text for text, character in hidden.items()}
        try:
            rendered = render([self._hiding(message, hidden) for message in messages])
        except Exception:  # a template that asks for the text which is hidden
            return None
        if _replaced(rendered, shown) != ordinary:
            return None
        usual = self._encoded(ordinary, {})
        return self._encoded(rendered, shown) if usual is not None and usual.ids == list(ordinary_ids) else None

    def _hiding(self, message: Message, hidden: dict[str, str]) -> Message:
        if message["role"] == ASSISTANT or message.get("content") is None:
            return message
        content: Any = message["content"]

        def hide(text: str) -> str:
            return self._spelled_out.sub(lambda match: hidden[match[0]], text)

        if isinstance(content, str):
            return {**message, "content": hide(content)}
        return {**message, "content": [{**part, "text": hide(part["text"])} for part in content]}

    def _encoded(self, rendered: str, shown: dict[str, str]) -> Encoded | None:
        """The tokens of a rendering, of which only the special tokens that are not hidden are special. None where the
        tokenizer makes such a token of plain text, as Unigram models do that have them in their vocabulary."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        length = 0
        for number, part in enumerate(self._between.split(rendered)):
            if number % 2 == 1:  # the pattern's group: a special token, with the white space that it takes
                token = part if part in self._tokens else part.strip()
                ids.append(self._tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
                offsets.append((length, length + len(part)))
                length += len(part)
            elif part:
                text = _replaced(part, shown)
                text_ids, text_offsets = self._as_text(text, is_beginning=number == 0)
                if not self._special_ids.isdisjoint(text_ids):
                    return None
                ids += text_ids
                offsets += [(length + start, length + end) for start, end in text_offsets]
                length += len(text)
        return Encoded(ids, offsets)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        ids: Any = self._tokenizer.convert_tokens_to_ids(list(self._tokens))
        unknown: Any = self._tokenizer.unk_token_id
        return frozenset(ids) - frozenset([unknown])  # text may have unknown characters

    @cached_property
    def _between(self) -> re.Pattern[str]:
        patterns = [
            _SPACES * token.lstrip + re.escape(text) + _SPACES * token.rstrip
            for text, token in sorted(self._tokens.items(), key=lambda item: len(item[0]), reverse=True)
        ]
        return re.compile(f"({'|'.join(patterns)})")

    def _as_text(self, text: str, *, is_beginning: bool) -> Any:
        if not is_beginning and self._without_first_space is not None:
            found = self._without_first_space.encode(text, add_special_tokens=False)
            return found.ids, found.offsets
        found: Any = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        return found["input_ids"], found["offset_mapping"]

    @cached_property
    def _without_first_space(self) -> Tokenizer | None:
        """The tokenizer for parts that are not a text's beginning, where it puts a space in front of that only."""
        backend = backend_of(self._tokenizer)
        assert backend is not None
        only_first = '"prepend_scheme":"first"'
        try:
            description = backend.to_str()
        except Exception:  # a part in Python
            return None
        if only_first not in description:
            return None
        without = Tokenizer.from_str(description.replace(only_first, '"prepend_scheme":"never"'))
        without.no_truncation()
        without.no_padding()
        without.encode_special_tokens = True
        return without


def _texts(preference: Preference, eos_token: Any) -> Iterator[tuple[str | None, str]]:
    """Each text of a preference, with the role of its message."""
    if isinstance(preference.prompt, str):
        yield None, preference.prompt
        for completion in (preference.chosen, preference.rejected):
            assert isinstance(completion, str)
            yield None, completion.removesuffix(eos_token) if eos_token else completion
        return
    for side in (preference.prompt, preference.chosen, preference.rejected):
        assert isinstance(side, list)
        for message in side:
            content = message.get("content")
            if isinstance(content, str):
                yield message["role"], content
            else:
                yield from ((message["role"], part["text"]) for part in content or ())


def _replaced(text: str, shown: dict[str, str]) -> str:
    for character, replacement in shown.items():
        text = text.replace(character, replacement)
    return text
