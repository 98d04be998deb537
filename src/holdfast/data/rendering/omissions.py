"""What a row holds and its rendering does not have: texts of messages, reasoning, tool calls and tools.

A template prints what its author thought of. It may know no system role, drop the reasoning of earlier turns, or never
look at `tool_calls`, and none of this is an error: the model is trained on what is left. So each text of a row is
looked for in what the template made of it.

Templates strip texts, write them as JSON, change their case or their white space; what is found in such a form counts
as printed. A text that holds reasoning in tags (`<think>...</think>`) is taken apart where it is not there as a whole.
First the texts are looked for in their order, which is quick and finds nothing missing in nearly all rows. Else the
longest are found first, and what was found is taken out, so that a short text is not found within another one.

Given up: what a template prints in other words, and a text that by chance stands in the template itself.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from holdfast.data.formats import ASSISTANTS, Message, Preference
from holdfast.data.rendering.tool_text import Omission, escaped_forms

SYSTEM, TEXT, REASONING, EARLIER_REASONING = "system prompt", "text", "reasoning", "earlier reasoning"

SYSTEM_ROLES = ("system", "developer")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The keys of a message under which templates look for reasoning."""

_TAKEN = "\0"
_REASONING_TAGS = [
    *((f"<{tag}>", f"</{tag}>") for tag in ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
]
_REASONING = re.compile(
    "|".join(f"(?:{re.escape(begin)}|\\A)(.*?){re.escape(end)}" for begin, end in _REASONING_TAGS), re.DOTALL
)
"""Reasoning and its tags. The first tag may be missing: some templates write it as the beginning of the answer."""


def prints_all(preference: Preference, texts: tuple[str, str]) -> bool:
    """Whether the renderings of the prompt with each completion have the contents of all messages, which must be text,
    in their order. Where this is False they may be there all the same."""
    prompt: Any = preference.prompt
    first, second = texts
    end = _end_of_all(prompt, first, 0)
    if end < 0 or not second.startswith(first[:end]):
        return False
    completions: tuple[Any, Any] = (preference.chosen, preference.rejected)
    return all(_end_of_all(side, text, end) >= 0 for side, text in zip(completions, texts, strict=True))


def _end_of_all(messages: Sequence[Message], text: str, end: int) -> int:
    """Where the last content ends that is found after that place; -1 where one is not found."""
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, end)
        if start < 0:
            return -1
        end = start + len(content)
    return end


def missing_texts(messages: Sequence[Message], rendering: str) -> list[Omission]:
    """What `rendering` does not have of the contents and the reasoning of these messages."""
    last = max((number for number, message in enumerate(messages) if message["role"] in ASSISTANTS), default=-1)
    pieces = [
        piece
        for number, message in enumerate(messages)
        for piece in _pieces(message, REASONING if number == last else EARLIER_REASONING)
    ]
    if _are_in_order([piece.text for piece in pieces], rendering):
        return []
    rest, missing = _Rest(rendering), []
    while pieces:
        longest = max(pieces, key=lambda piece: len(piece.text))
        pieces.remove(longest)
        if rest.take(longest.text):
            continue
        if longest.reasoning is not None and _REASONING.search(longest.text):
            pieces += _taken_apart(longest, longest.reasoning)
        else:
            missing += _missing_lines(longest, rest)
    return missing


class _Piece(NamedTuple):
    """A text of a message, its kind, and what reasoning in it is called; None where there can be none."""

    text: str
    kind: str
    reasoning: str | None


def _pieces(message: Message, reasoning: str) -> Iterator[_Piece]:
    fields = [message.get(key) for key in REASONING_KEYS]
    for text in dict.fromkeys(text.strip() for text in fields if isinstance(text, str)):
        if text:
            yield _Piece(text, reasoning, None)
    kind = SYSTEM if message["role"] in SYSTEM_ROLES else TEXT
    content = message.get("content")
    for text in [content] if isinstance(content, str) else [part["text"] for part in content or ()]:
        if text.strip():
            yield _Piece(text.strip(), kind, reasoning if message["role"] in ASSISTANTS else None)


def _are_in_order(texts: Sequence[str], rendering: str) -> bool:
    end = 0
    for text in texts:
        start = rendering.find(text, end)
        if start < 0:
            return False
        end = start + len(text)
    return True


class _Rest:
    """What is left of a rendering when the texts that were found are taken out."""

    def __init__(self, rendering: str) -> None:
        self._text = rendering
        self._squeezed: str | None = None

    def take(self, text: str) -> bool:
        """Takes the first place of the text out; False where it is not there."""
        for form in (text, *escaped_forms(text)):
            start = self._text.find(form)
            if start >= 0:
                self._text = self._text[:start] + _TAKEN + self._text[start + len(form) :]
                self._squeezed = None
                return True
        return False

    def has_roughly(self, text: str) -> bool:
        """Whether it is there but for white space and the case of letters."""
        if self._squeezed is None:
            self._squeezed = _squeezed(self._text)
        forms = (text, json.dumps(text, ensure_ascii=False)[1:-1])
        return any(_squeezed(form) in self._squeezed for form in forms)


def _missing_lines(piece: _Piece, rest: _Rest) -> list[Omission]:
    """The first line of the text that is not even roughly there."""
    if rest.has_roughly(piece.text):
        return []
    lines = [line.strip() for line in piece.text.splitlines() if line.strip()]
    return [Omission(piece.kind, line) for line in lines if not rest.has_roughly(line)][:1]


def _taken_apart(piece: _Piece, reasoning: str) -> list[_Piece]:
    """The text as pieces of reasoning and of what is between them, without the tags."""
    parts, end = [], 0
    for match in _REASONING.finditer(piece.text):
        parts.append((piece.text[end : match.start()], piece.kind))
        parts += [(group, reasoning) for group in match.groups() if group]
        end = match.end()
    parts.append((piece.text[end:], piece.kind))
    return [_Piece(text.strip(), kind, None) for text, kind in parts if text.strip()]


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()
