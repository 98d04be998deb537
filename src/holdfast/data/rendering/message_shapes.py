"""Messages -> the same messages as the chat template needs them, and what it leaves out of them all the same.

Templates differ in what they take: the text of a message or a list of its parts, a content of None beside tool calls or
an empty one, the arguments of a call as an object or as JSON text, reasoning under one key or another. What is given in
another shape is not an error for them: parts are printed as Python writes them, arguments are written as JSON twice,
calls are not printed. So a row is rendered as it is; where its texts are not all there, or not as they should be, other
shapes are tried, and the one that loses least is taken, the earlier one of two that lose the same. A row depends on
nothing but itself and the template.

Parts are joined as they are, without a space or a line between them, as templates print parts that they know.

Given up: a shape for each message by itself, but for system prompts, and speed for rows with tools, which are rendered
twice to see what is printed of them (see `holdfast.data.rendering.tool_text`).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple, final

from holdfast.data.formats import Message, Preference
from holdfast.data.note import Note
from holdfast.data.rendering.omissions import (
    EARLIER_REASONING,
    REASONING,
    REASONING_KEYS,
    SYSTEM_ROLES,
    missing_texts,
    prints_all,
)
from holdfast.data.rendering.tool_text import (
    AS_PYTHON,
    TOOL,
    TOOL_CALL,
    TOOL_DESCRIPTION,
    MarkedTools,
    Omission,
    has_tool_text,
    json_of,
    strings_in,
)

Render = Callable[[Preference, list[Message]], str]
"""Makes the text of a conversation, with the tools and the template variables of the preference."""

_Shape = Callable[[Message], Message]

_LONGEST_DETAIL = 60
_PART = re.compile(r"""\\?['"]type\\?['"]: ?\\?['"]text\\?['"]""")
_NONE = re.compile(r"\bNone\b")

Dimension = Literal["contents", "empty", "arguments", "reasoning"]
_MENDS: Mapping[str, Dimension | None] = {
    "parts": "contents",
    "None": "empty",
    TOOL_CALL: "empty",
    "arguments": "arguments",
    REASONING: "reasoning",
    EARLIER_REASONING: None,
    TOOL: None,
    TOOL_DESCRIPTION: None,
}
"""By kind of loss, in what its messages may be shaped otherwise. Other kinds are missing contents."""

_PRINTED_WRONG = frozenset({"parts", "None", "arguments"})
"""Kinds of loss that are printed, but not as they should be."""


class Fitted(NamedTuple):
    """A preference in the shape that the template needs, its two full renderings (None where it has none, since the
    template fails), and notes on what they leave out."""

    preference: Preference
    texts: tuple[str, str] | None
    notes: tuple[Note, ...]


def fitted(preference: Preference, render: Render, texts: tuple[str, str] | None = None) -> Fitted:
    """The conversational preference as the template needs it. `texts` are its full renderings, where they are known."""
    texts = texts or _texts(preference, render)
    if texts is not None and is_plain(preference) and prints_all(preference, texts):
        return Fitted(preference, texts, ())
    shapes = _shapes(preference)
    best = _tried(preference, texts, render)
    if best.texts is None:
        failed = best
        for names in product(*(range(len(options)) for options in shapes.values())):
            shape = [options[number] for options, number in zip(shapes.values(), names, strict=True)]
            best = _better(best, _reshaped(preference, shape, render))
            if best.texts is not None and not best.can_be_mended:
                break
        if not _PRINTED_WRONG.isdisjoint(kind for kind, _ in best.losses):
            best = failed  # its error says more than a shape that the template did not expect
    else:
        for dimension, options in shapes.items():
            start = best.preference
            for option in options[1:]:
                if dimension not in best.can_be_mended:
                    break
                best = _better(best, _reshaped(start, [option], render))
    notes: dict[str, Note] = {}
    for note in (_note(kind, text) for kind, text in best.losses):
        notes.setdefault(note.kind, note)
    return Fitted(best.preference, best.texts, tuple(notes.values()))


def is_plain(preference: Preference) -> bool:
    """Whether all messages have nothing but a role and a text, and the template gets nothing beside them."""
    if preference.tools or preference.chat_template_kwargs or isinstance(preference.prompt, str):
        return False
    sides: tuple[Any, ...] = (preference.prompt, preference.chosen, preference.rejected)
    return all(
        len(message) == 2 and type(message.get("content")) is str and type(message["role"]) is str
        for side in sides
        for message in side
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """A preference in some shape, its renderings, and what they lose."""

    preference: Preference
    texts: tuple[str, str] | None
    losses: tuple[Omission, ...]

    @property
    def can_be_mended(self) -> set[Dimension]:
        found: set[Dimension | None] = {_MENDS.get(kind, "contents") for kind, _ in self.losses}
        return {dimension for dimension in found if dimension is not None}

    @property
    def cost(self) -> int:
        if self.texts is None:
            return 1_000_000
        return sum(_MENDS.get(kind, "contents") is not None for kind, _ in self.losses)


def _better(best: _Trial, other: _Trial) -> _Trial:
    return other if other.cost < best.cost else best


def _texts(preference: Preference, render: Render) -> tuple[str, str] | None:
    """The full renderings; None where the template fails."""
    with suppress(Exception):  # whatever the template's own code raises
        chosen, rejected = (render(preference, messages) for messages in _conversations(preference))
        return chosen, rejected
    return None


def _reshaped(preference: Preference, shape: Sequence[_Shape], render: Render) -> _Trial:
    preference = _shaped(preference, shape)
    return _tried(preference, _texts(preference, render), render)


def _tried(preference: Preference, texts: tuple[str, str] | None, render: Render) -> _Trial:
    losses: list[Omission] = []
    for messages, text in zip(_conversations(preference), texts or (), strict=False):
        losses += missing_texts(messages, text)
        losses += _losses_of_shape(preference, messages, text, render)
        if has_tool_text(messages, preference.tools):
            losses += _missing_tool_text(preference, messages, text, render)
    return _Trial(preference=preference, texts=texts, losses=tuple(dict.fromkeys(losses)))


def _conversations(preference: Preference) -> list[list[Message]]:
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, list)
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    return [prompt + chosen, prompt + rejected]


def _missing_tool_text(preference: Preference, messages: list[Message], text: str, render: Render) -> list[Omission]:
    marked = MarkedTools(messages, preference.tools)
    try:
        marked_text = render(replace(preference, tools=marked.tools), marked.messages)
    except Exception:  # a template that looks into the texts
        return marked.missing_unmarked(text)
    return marked.missing(marked_text)


# --- what is printed, but not as it should be -------------------------------------------------------------------------


def _losses_of_shape(preference: Preference, messages: list[Message], text: str, render: Render) -> Iterator[Omission]:
    parts = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    if parts and _PART.search(text):
        own = sum(len(_PART.findall(string)) for string in strings_in([messages, preference.tools]))
        if len(_PART.findall(text)) > own:
            yield Omission("parts", str(parts[0]))
    if any("content" in message and message["content"] is None for message in messages):
        yield from _printed_none(preference, messages, text, render)
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = _function(call).get("arguments")
            if any(form in text for form in _wrong_forms(arguments)):
                yield Omission("arguments", str(arguments))


def _printed_none(preference: Preference, messages: list[Message], text: str, render: Render) -> Iterator[Omission]:
    count = len(_NONE.findall(text))
    if count == 0:
        return
    empty = [{**message, "content": ""} if message.get("content", "") is None else message for message in messages]
    try:
        usual = len(_NONE.findall(render(preference, empty)))
    except Exception:  # a template that refuses an empty content
        usual = sum(len(_NONE.findall(string)) for string in strings_in([messages, preference.tools]))
    if count > usual:
        yield Omission("None", "None")


def _wrong_forms(arguments: Any) -> list[str]:
    """How a template prints arguments that it expects in the other shape."""
    if isinstance(arguments, str) and isinstance(json_of(arguments), Mapping):
        return [json.dumps(arguments, ensure_ascii=False), json.dumps(arguments)]
    if isinstance(arguments, Mapping) and arguments:
        return [str(dict(arguments))]
    return []


# --- other shapes -----------------------------------------------------------------------------------------------------


def _shapes(preference: Preference) -> dict[Dimension, list[_Shape]]:
    """In what the messages may be shaped otherwise, and how, beginning with how they are. What is empty may then become
    a part, so contents come last."""
    messages = [message for messages in _conversations(preference) for message in messages]
    shapes: dict[Dimension, list[_Shape]] = {
        "reasoning": [_same], "empty": [_same], "arguments": [_same], "contents": [_same]
    }  # fmt: skip
    if any(isinstance(message.get("content"), list) for message in messages):
        shapes["contents"] += [_joined, _with_text_of_system]
    shapes["contents"] += [_in_parts, _in_parts_but_system]
    if any(_has_calls_alone(message) for message in messages):
        shapes["empty"] += [_with_none, _with_empty, _without_content]
    if any(message.get("tool_calls") for message in messages):
        shapes["arguments"] += [_with_objects, _with_json_text]
    if any(key in message for message in messages for key in REASONING_KEYS):
        shapes["reasoning"] += [_with_reasoning_under_all_keys]
    return shapes


def _shaped(preference: Preference, shape: Sequence[_Shape]) -> Preference:
    def side(messages: Any) -> list[Message]:
        for change in shape:
            messages = [change(message) for message in messages]
        return messages

    return replace(
        preference,
        prompt=side(preference.prompt),
        chosen=side(preference.chosen),
        rejected=side(preference.rejected),
    )


def _same(message: Message) -> Message:
    return message


def _joined(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": "".join(part["text"] for part in content)} if isinstance(content, list) else message


def _in_parts(message: Message) -> Message:
    """The message with its text as one part."""
    content = _joined(message).get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_text_of_system(message: Message) -> Message:
    return _joined(message) if message["role"] in SYSTEM_ROLES else message


def _in_parts_but_system(message: Message) -> Message:
    return _joined(message) if message["role"] in SYSTEM_ROLES else _in_parts(message)


def _has_calls_alone(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message.get("content")


def _with_none(message: Message) -> Message:
    return {**message, "content": None} if _has_calls_alone(message) else message


def _with_empty(message: Message) -> Message:
    return {**message, "content": ""} if _has_calls_alone(message) else message


def _without_content(message: Message) -> Message:
    if not _has_calls_alone(message):
        return message
    return {key: value for key, value in message.items() if key != "content"}


def _with_objects(message: Message) -> Message:
    def changed(arguments: Any) -> Any:
        value = json_of(arguments) if isinstance(arguments, str) else None
        return value if isinstance(value, Mapping) else arguments

    return _with_arguments(message, changed)


def _with_json_text(message: Message) -> Message:
    def changed(arguments: Any) -> Any:
        return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments

    return _with_arguments(message, changed)


def _with_reasoning_under_all_keys(message: Message) -> Message:
    """The message with its reasoning under each key that templates have for it, where it is under one of them."""
    found = [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)]
    return {**message, **dict.fromkeys(REASONING_KEYS, found[0])} if len(found) == 1 else message


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with(call, change) for call in calls]}


def _call_with(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _function(call: Any) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        return {}
    return call["function"] if isinstance(call.get("function"), Mapping) else call


def _note(kind: str, text: str) -> Note:
    kind = AS_PYTHON if kind in ("parts", "None", "arguments") else kind
    return Note(kind, text if len(text) <= _LONGEST_DETAIL else text[:_LONGEST_DETAIL] + "...")
