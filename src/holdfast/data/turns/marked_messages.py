"""Marks in the texts of messages, by which they are found again in what a chat template makes of them.

A mark stands for a text (`by_marks`), so that the rendering is that of all conversations of this shape; or right after
its last character (`with_marks`), where a template looks into the text. The texts are contents, reasoning and the
arguments of tool calls; where marks stand for texts, the ids of calls as well, with as many marks as they are long.
Everything else in a message stays as it is.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from holdfast.data.formats import Message
from holdfast.data.turns.spans import FIRST_MARK, MOST_MARKS

_FIELDS = ("content", "reasoning_content", "thinking", "reasoning")
_TAG = re.compile(r"</?[A-Za-z_]\w*>|\[/?[A-Z_]+\]")
_MARKS = re.compile("(([\U00100000-\U0010fffd])\\2*)")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedMessages:
    """Messages with marks, the text of each mark, and the number of its message."""

    messages: list[Message]
    texts: list[str]
    owners: list[int]


def tags_in(template: str) -> re.Pattern[str]:
    """Matches the tags, such as `</think>`, that a template writes or looks for."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(set(_TAG.findall(template))))) or '(?!)'})")


def by_marks(messages: Sequence[Message], tags: re.Pattern[str]) -> MarkedMessages | None:
    """The messages with a mark in the place of each text between tags. None for more texts than there are marks."""

    def marked(text: str, take: Callable[[str], str], *, is_id: bool = False) -> str:
        if not text or text.isspace():
            return text
        if is_id:
            return take(text) * len(text)
        pieces = tags.split(text)
        return "".join(piece if n % 2 or not piece.strip() else take(piece) for n, piece in enumerate(pieces))

    return _marked(messages, marked)


def with_marks(messages: Sequence[Message]) -> MarkedMessages | None:
    """The messages with a mark after the last character of each text that is no white space."""

    def marked(text: str, take: Callable[[str], str], *, is_id: bool = False) -> str:
        if is_id:
            return text
        body = text.rstrip()
        return body + take(body) + text[len(body) :] if body else text

    return _marked(messages, marked)


def _marked(messages: Sequence[Message], marked: Callable[..., str]) -> MarkedMessages | None:
    texts: list[str] = []
    owners: list[int] = []
    number = 0

    def take(text: str) -> str:
        texts.append(text)
        owners.append(number)
        return chr(FIRST_MARK + len(texts) - 1)

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return marked(value, take)
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else value

    changed: list[Message] = []
    for number, message in enumerate(messages):  # noqa: B007, `take` reads it
        copy = dict(message)
        for field in _FIELDS:
            value = message.get(field)
            if isinstance(value, str):
                copy[field] = marked(value, take)
            elif isinstance(value, list):
                copy[field] = [
                    {**part, "text": marked(part["text"], take)} if isinstance(part.get("text"), str) else part
                    for part in value
                ]
        if isinstance(message.get("tool_call_id"), str):
            copy["tool_call_id"] = marked(message["tool_call_id"], take, is_id=True)
        if message.get("tool_calls"):
            copy["tool_calls"] = [
                _call(call, walk, lambda text: marked(text, take, is_id=True)) for call in message["tool_calls"]
            ]
        changed.append(copy)
    if len(texts) > MOST_MARKS:
        return None
    return MarkedMessages(messages=changed, texts=texts, owners=owners)


def _call(call: Any, walk: Callable[[Any], Any], of_id: Callable[[str], str]) -> Any:
    if not isinstance(call, dict):
        return call
    changed = dict(call)
    if isinstance(call.get("id"), str):
        changed["id"] = of_id(call["id"])
    if isinstance(call.get("function"), dict):
        changed["function"] = _call(call["function"], walk, of_id)
    if "arguments" in call:
        changed["arguments"] = walk(call["arguments"])
    return changed


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A rendering with marks, cut at them: `marks[n]`, so many characters wide, is between `pieces[n]` and the next."""

    pieces: list[str]
    marks: list[int]
    widths: list[int]

    @classmethod
    def of(cls, rendered: str) -> "Rendering":
        """The rendering cut at its marks."""
        parts = _MARKS.split(rendered)
        return cls(
            pieces=parts[::3],
            marks=[ord(mark) - FIRST_MARK for mark in parts[2::3]],
            widths=[len(marks) for marks in parts[1::3]],
        )

    def lengths(self, texts: Sequence[str], whole: str) -> list[int] | None:
        """The length of the text at each mark, where `whole` is this rendering with the texts in the places of their
        marks; else None. A template may strip a text or write it as JSON: that is found here, text by text."""
        if not whole.startswith(self.pieces[0]):
            return None
        at = len(self.pieces[0])
        found: list[int] = []
        for mark, after in zip(self.marks, self.pieces[1:], strict=True):
            for form in _forms(texts[mark]):
                end = at + len(form)
                if whole.startswith(form, at) and whole.startswith(after, end):
                    break
            else:
                return None
            at = end + len(after)
            found.append(len(form))
        return found if at == len(whole) else None


def _forms(text: str) -> Iterator[str]:
    """How a template may write a text."""
    yield text
    yield text.strip()
    for strip in (str.lstrip, str.rstrip):
        yield strip(text)
        yield strip(text, "\n")
    yield text.strip("\n")
    for is_ascii in (False, True):
        yield json.dumps(text, ensure_ascii=is_ascii)[1:-1]
        yield json.dumps(text.strip(), ensure_ascii=is_ascii)[1:-1]


def without_marks(text: str) -> str:
    """The text without marks."""
    return _MARKS.sub("", text)


def num_marks_before(rendered: str, place: int) -> int:
    """How many marks stand before a place in a rendering."""
    return sum(1 for _ in _MARKS.finditer(rendered, 0, place))


def with_mark_after(message: Message, beginning: Message) -> Message:
    """The message with a mark where `beginning` ends, whose content is the beginning of its content."""
    content, text = message["content"], beginning["content"]
    mark = chr(FIRST_MARK)
    if isinstance(content, str):
        length = len(text) if isinstance(text, str) else sum(len(part["text"]) for part in text)
        return {**message, "content": content[:length] + mark + content[length:]}
    last = 0 if isinstance(text, str) else len(text) - 1
    changed = [*content]
    changed[last] = {**content[last], "text": content[last]["text"] + mark}
    return {**message, "content": changed}


def first_mark(rendered: str) -> int:
    """The place of the first mark in a rendering that has one."""
    match = _MARKS.search(rendered)
    assert match is not None
    return match.start()
