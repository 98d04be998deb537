"""Where an assistant's turns stand in a rendered conversation: what the model has to produce, and nothing else.

A turn begins right after the generation prompt (`<|im_start|>assistant\\n`) and goes up to and including its
end-of-turn token (`<|im_end|>`), without the white space after it. Templates do not say where that is, so renderings of
the conversation's beginnings are compared with the rendering of the whole:

- Up to message i with the generation prompt: turn i begins where that ends.
- Up to and including message i: turn i ends where that ends.

A template may write an earlier turn in another way once others follow: Qwen 3 leaves its thinking out, Mistral moves
the system prompt. So the texts of the messages carry marks, characters of private use. Where a beginning is no prefix
of the whole, what follows its last mark is looked for after the same mark in the whole: the rest of the previous turn
and the generation prompt, or the end-of-turn token. They may differ only after the header.

Given up: turns whose place no rendering tells. There is no guess; the caller gets None.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

FIRST_MARK = 0x100000
"""Marks are the characters from here on: a plane that Unicode leaves to private use, as no text in earnest does."""
MOST_MARKS = 65_000

Span = tuple[int, int]
"""First character and the one after the last."""

_MARK = re.compile("[\U00100000-\U0010fffd]")
_HEADER_ENDS = r"\n|>|\]"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation whose texts carry marks. `owners` has the number of the message of each mark. `render` gives what
    the template makes of the first `n` messages, with or without the generation prompt."""

    whole: str
    num_messages: int
    owners: Sequence[int]
    render: Callable[[int, bool], str]
    special: re.Pattern[str]


def turns(conversation: Conversation, wanted: Sequence[int]) -> dict[int, Span] | None:
    """The turns of the messages with these numbers, ascending. None where one of them cannot be told."""
    found: dict[int, Span] = {}
    before = 0
    for number in wanted:
        try:
            start = _start(conversation, number)
            end = None if start is None else _end(conversation, number, start)
        except Exception:  # a template that refuses a beginning of the conversation
            return None
        if start is None or end is None or not before <= start <= end:
            return None
        found[number] = (start, end)
        before = end
    return found


def _start(conversation: Conversation, number: int) -> int | None:
    """Where the generation prompt of this turn ends."""
    asked = conversation.render(number, True)
    whole = conversation.whole
    if whole.startswith(asked):
        return len(asked)
    last = _last_mark(asked)
    at = whole.rfind(asked[last]) if last is not None else -1
    if last is None or at < 0:
        return None
    tail = asked[last + 1 :]
    common = _common(tail, whole[at + 1 :], conversation.special)
    if common < len(tail):  # is what they share more than the end of the message before?
        plain = conversation.render(number, False)
        last = _last_mark(plain)
        if last is None or common <= len(plain) - last - 1:
            return None
    return at + 1 + common


def _end(conversation: Conversation, number: int, start: int) -> int | None:
    """Where the end-of-turn token of this turn ends."""
    limit = _limit(conversation, number, start)
    if limit is None:
        return None
    whole = conversation.whole
    content = start
    for match in _MARK.finditer(whole, start, limit):
        if conversation.owners[ord(match[0]) - FIRST_MARK] == number:
            content = match.end()
    tokens = list(conversation.special.finditer(whole, content, limit))
    return tokens[-1].end() if tokens else max(content, len(whole[:limit].rstrip()))


def _limit(conversation: Conversation, number: int, start: int) -> int | None:
    """Where nothing of this turn is left."""
    whole = conversation.whole
    if number == conversation.num_messages - 1:
        return len(whole)
    shorter = conversation.render(number + 1, False)
    if whole.startswith(shorter):
        return len(shorter)
    last = _last_mark(shorter)
    if last is not None and conversation.owners[ord(shorter[last]) - FIRST_MARK] == number:
        at = whole.rfind(shorter[last]) + 1
        rest = shorter[last + 1 :]
        if at == 0:
            return None
    else:  # a message without a text of its own
        at = start
        rest = shorter[start:]
        if shorter[:start] != whole[:start]:
            return None
    common = _common(rest, whole[at:], conversation.special)
    if common == len(rest) or _ends_with(conversation.special, rest[:common]):
        return at + common
    if rest[:common].strip():
        return None
    token = re.compile(rf"\s*(?:{conversation.special.pattern})").match(whole, at)
    return token.end() if token else None  # another token ends a turn within the conversation, as in gpt-oss


def _ends_with(special: re.Pattern[str], text: str) -> bool:
    stripped = text.rstrip()
    return any(match.end() == len(stripped) for match in special.finditer(stripped))


def _last_mark(text: str) -> int | None:
    return max((match.start() for match in _MARK.finditer(text)), default=None)


def _common(text: str, other: str, special: re.Pattern[str]) -> int:
    """How far both are the same; where that is not the whole of `text`, up to the end of a token, a tag or a line."""
    length = next((place for place, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), None)
    if length is None:
        length = min(len(text), len(other))
    if length == len(text):
        return length
    ends = [match.end() for match in re.finditer(rf"{special.pattern}|{_HEADER_ENDS}", text)]
    return max((end for end in ends if end <= length), default=0)
