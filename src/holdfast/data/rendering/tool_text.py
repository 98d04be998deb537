"""What a template prints of tools and of tool calls, found by putting a word of its own in the place of each text.

Names and arguments are short, and stand elsewhere, too: in what the user asked, or in the description of the tool. So
they are not searched for. The conversation is rendered again, with a word that stands nowhere else in the place of each
name, description and argument that is text, and these words are looked for. What is no text (numbers, the names of
parameters) stays, and is looked for as it is. Where the template refuses such words, the texts themselves are looked
for.

Given up: what a template prints of a tool beside its name, its descriptions and its parameters.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

from holdfast.data.formats import Message

OLD_CALL = "function_call"
"""Where messages of older data have the one call that they make."""


class Omission(NamedTuple):
    """Something of a row that its rendering does not have: a kind of note, and the text."""

    kind: str
    text: str


TOOL, TOOL_DESCRIPTION, TOOL_CALL = "tool", "tool description", "tool call"
AS_PYTHON = "as Python writes it"
"""The kind for what is printed as Python writes it, or as JSON within JSON."""


@final
class MarkedTools:
    """Messages and tools with words in the place of their texts. `messages` and `tools` are to be rendered."""

    def __init__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._words: dict[str, Omission] = {}
        self._values: list[tuple[str, Omission]] = []
        self.messages = [self._message(message) for message in messages]
        self.tools = None if tools is None else [self._tool(tool) for tool in tools]

    def missing(self, marked_text: str) -> list[Omission]:
        """What the rendering of `messages` and `tools` does not have."""
        lowered = marked_text.lower()
        found = [omission for word, omission in self._words.items() if word not in lowered]
        return found + self._missing_values(marked_text)

    def missing_unmarked(self, text: str) -> list[Omission]:
        """The same, as far as it can be seen in the ordinary rendering."""
        found = [omission for omission in self._words.values() if not _is_printed(omission.text, text)]
        return found + self._missing_values(text)

    def _missing_values(self, text: str) -> list[Omission]:
        return [omission for value, omission in self._values if not _is_printed(value, text)]

    def _word(self, kind: str, text: str) -> str:
        word = f"qz{len(self._words):04d}xqz"
        self._words[word] = Omission(kind, text)
        return word

    def _message(self, message: Message) -> Message:
        marked = dict(message)
        if isinstance(message.get("tool_calls"), list):
            marked["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        if isinstance(message.get(OLD_CALL), Mapping):
            marked[OLD_CALL] = self._call(message[OLD_CALL])
        return marked

    def _call(self, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"])}
        marked = dict(call)
        if isinstance(call.get("name"), str) and call["name"]:
            marked["name"] = self._word(TOOL_CALL, call["name"])
        if "arguments" in call:
            marked["arguments"] = self._arguments(call["arguments"])
        return marked

    def _arguments(self, arguments: Any) -> Any:
        if not isinstance(arguments, str):
            return self._argument(arguments)
        value = json_of(arguments)
        if isinstance(value, Mapping | list):
            return json.dumps(self._argument(value), ensure_ascii=False)
        return self._argument(arguments)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._word(TOOL_CALL, value) if value.strip() else value
        if isinstance(value, Mapping):
            self._values += [(str(key), Omission(TOOL_CALL, str(key))) for key in value]
            return {key: self._argument(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._values.append((str(value), Omission(TOOL_CALL, str(value))))
        return value

    def _tool(self, tool: Mapping[str, Any]) -> Any:
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self._tool(tool["function"])}
        if not isinstance(tool.get("name"), str) or not tool["name"]:
            return tool  # one that the template knows, such as {"type": "code_interpreter"}
        marked = {**tool, "name": self._word(TOOL, tool["name"])}
        return {key: item if key == "name" else self._schema(item, key) for key, item in marked.items()}

    def _schema(self, value: Any, key: str) -> Any:
        if isinstance(value, str):
            return self._word(TOOL_DESCRIPTION, value) if key == "description" and value.strip() else value
        if isinstance(value, Mapping):
            if key == "properties":
                self._values += [(str(name), Omission(TOOL, str(name))) for name in value]
                return {name: self._schema(item, "") for name, item in value.items()}
            return {inner: self._schema(item, inner) for inner, item in value.items()}
        if isinstance(value, list):
            return [self._schema(item, "") for item in value]
        return value


def has_tool_text(messages: Sequence[Message], tools: Any) -> bool:
    """Whether there are tools or calls of tools."""
    return bool(tools) or any(message.get("tool_calls") or message.get(OLD_CALL) for message in messages)


def json_of(text: str) -> Any:
    """The value that JSON text is; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def strings_in(value: Any) -> Iterator[str]:
    """All texts in a value, the keys of its objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def escaped_forms(text: str) -> Iterator[str]:
    """The text as it stands in JSON (with and without characters beyond ASCII, and as Jinja's own `tojson` has it) and
    in HTML, where that differs."""
    plain = json.dumps(text, ensure_ascii=False)[1:-1]
    ascii_only = json.dumps(text)[1:-1]
    safe = ascii_only
    for character in "<>&'":
        safe = safe.replace(character, f"\\u{ord(character):04x}")
    html = text.replace("&", "&amp;")
    for character, name in (("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ('"', "&#34;")):
        html = html.replace(character, name)
    yield from (form for form in dict.fromkeys((plain, ascii_only, safe, html)) if form != text)


def _is_printed(text: str, rendering: str) -> bool:
    text = text.strip()
    if text in rendering or any(form in rendering for form in escaped_forms(text)):
        return True
    return text.lower() in rendering.lower()
