"""Text in a row that reads like a special token, such as `<|im_end|>` in what a user wrote.

The template writes special tokens between messages, and the tokenizer then finds them in the text wherever they stand.
So a message that spells one out could end itself and speak for another role. In messages of every role but the
assistant's such text is therefore tokenized as text, as at inference it should be too. So it is in tool calls (which
are data, whoever makes them), in tools and in variables of the template. What the assistant says is left as it is,
since it is what the model learns to say; so is a row of plain text, which has no roles. Both are counted. A user may
also ask for tokens everywhere; nothing is counted then.

How it is told apart: the conversation is rendered again with a private character in the place of each such text. Where
the special tokens of that rendering are, the template (or the assistant) wrote them. The parts between them are
tokenized with `split_special_tokens=True`, each with its text put back. This is done only where it is proved for the
row: with the text put back, the rendering must be the ordinary one, and the ordinary rendering, cut in the same way,
must have its ordinary token ids. Otherwise the row stays as it is and is counted with the others.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from holdfast.data.formats import ASSISTANTS, Message, Preference
from holdfast.data.rendering.omissions import REASONING_KEYS
from holdfast.data.rendering.tool_text import strings_in
from holdfast.internals.transformers import backend_of

CONTROL_TEXT_MODES = ("text", "token")
"""What becomes of special tokens that are spelled out by others than the assistant (`special_tokens_in_text`)."""

_FIRST_HIDDEN = 0xF0000
"""The first character of a plane that Unicode leaves to private use, as no text in earnest does."""
_OF_ALL = ("role",)
_OF_ASSISTANT = (*_OF_ALL, "content", *REASONING_KEYS)
"""Keys of messages in which such text stays as it is: those of all, and those of the assistant's."""
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
    """Finds such text, and tokenizes conversations in which it stays text. With the mode `token` it finds none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: str = "text") -> None:
        check_control_text(mode)
        self._tokenizer = tokenizer
        self._is_asked_for = mode == "token"
        added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
        self._tokens = {token.content: token for token in added if token.special and token.content.strip()}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._spelled_out = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def find(self, preference: Preference) -> Found:
        """Which special token the texts of a preference spell out, the first of each kind. The eos token at the end of
        a text completion does not count."""
        if self._is_asked_for:
            return NOTHING
        search = self._spelled_out.search
        by_others = elsewhere = None
        for role, text in _texts(preference, self._tokenizer.eos_token):
            match = search(text)
            if match is None:
                continue
            if role is not None and role not in ASSISTANTS:
                by_others = by_others or match[0]
            else:
                elsewhere = elsewhere or match[0]
        return NOTHING if by_others is elsewhere is None else Found(by_others=by_others, elsewhere=elsewhere)

    def encoded(
        self,
        messages: list[Message],
        render: Callable[[list[Message]], str],
        ordinary_ids: Sequence[int],
        render_hidden: Callable[[list[Message]], str] | None = None,
    ) -> Encoded | None:
        """The tokens of a conversation in which other roles than the assistant's spell out special tokens, as text.
        `ordinary_ids` are those of `render(messages)`, and `render_hidden` renders with `hiding_of` the preference;
        leave it out where that has no such text. None where it cannot be proved that nothing else changes."""
        render_hidden = render_hidden or render
        if backend_of(self._tokenizer) is None:
            return None
        ordinary = render(messages)
        shown = {character: text for text, character in self._hidden.items()}
        if any(character in ordinary for character in shown):
            return None
        try:
            rendered = render_hidden([self._hiding(message) for message in messages])
        except Exception:  # a template that asks for the text which is hidden
            return None
        if _replaced(rendered, shown) != ordinary:
            return None
        usual = self._encoded(ordinary, {})
        return self._encoded(rendered, shown) if usual is not None and usual.ids == list(ordinary_ids) else None

    def hiding_of(self, preference: Preference) -> Preference:
        """The preference with such text hidden in its tools and variables of the template, for `render_hidden`."""
        variables = {
            key: value if key == "chat_template" else self._hidden_in(value)
            for key, value in preference.chat_template_kwargs.items()
        }
        return replace(preference, tools=self._hidden_in(preference.tools), chat_template_kwargs=variables)

    def _hidden_in(self, value: Any) -> Any:
        """The value with such text hidden in all its texts, keys of objects included."""
        if isinstance(value, str):
            return self._spelled_out.sub(lambda match: self._hidden[match[0]], value)
        if isinstance(value, Mapping):
            return {self._hidden_in(key): self._hidden_in(item) for key, item in value.items()}
        return [self._hidden_in(item) for item in value] if isinstance(value, list) else value

    @cached_property
    def _hidden(self) -> dict[str, str]:
        """The private character for each special token."""
        return {text: chr(_FIRST_HIDDEN + number) for number, text in enumerate(self._tokens)}

    def _hiding(self, message: Message) -> Message:
        own = _OF_ASSISTANT if message["role"] in ASSISTANTS else _OF_ALL
        return {key: value if key in own else self._hidden_in(value) for key, value in message.items()}

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


def check_control_text(mode: str) -> None:
    """ValueError for an unknown value of the option `special_tokens_in_text`."""
    if mode not in CONTROL_TEXT_MODES:
        raise ValueError(
            f"special_tokens_in_text={mode!r} was asked for; it is one of {CONTROL_TEXT_MODES}. Choose one of them."
        )


def _texts(preference: Preference, eos_token: Any) -> Iterator[tuple[str | None, str]]:
    """Each text of a preference, with the role of who says it: None in rows of text, and empty where it is no message's
    content."""
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
            if len(message) == 2 and type(content) is str:
                yield message["role"], content
            else:
                yield from _texts_of(message)
    if not preference.tools and not preference.chat_template_kwargs:
        return
    yield from (("", text) for text in strings_in(preference.tools))
    variables = {key: value for key, value in preference.chat_template_kwargs.items() if key != "chat_template"}
    yield from (("", text) for text in strings_in(variables))


def _texts_of(message: Message) -> Iterator[tuple[str, str]]:
    content = message.get("content")
    if isinstance(content, str):
        yield message["role"], content
    else:
        yield from ((message["role"], part["text"]) for part in content or ())
    if len(message) > 2 or content is None:
        for key, value in message.items():
            role = message["role"] if key in REASONING_KEYS else ""
            if key not in _OF_ALL and key != "content":
                yield from ((role, text) for text in strings_in(value))


def _replaced(text: str, shown: dict[str, str]) -> str:
    for character, replacement in shown.items():
        text = text.replace(character, replacement)
    return text
